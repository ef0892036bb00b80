"""Text encoders: those of the hub, with their tokenizers, through the library transformers; and `tiny-text` without weights.

`loading.py` has the table of the hub's encoders. `tiny-text` is for tests and the offline demonstration.
"""

import functools
import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from repa.base import faults, files, imports
from repa.base.errors import UserError
from repa.base.pretrained import CONFIG, Repository, found_of, weights_named
from repa.base.rng import generator
from repa.base.weights import no_larger_than, require_all_read
from repa.conditions.contract import Text, TextEncoder
from repa.conditions.loading import TextFamily, text_family_of

WEIGHTS = weights_named("model", "pytorch_model")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
WORD = re.compile(r"\w+")
BEGIN = ""  # first token of every text of tiny-text, so that the empty text has one
POSITION = 0.3  # scale of the positions relative to words of unit variance, so that words count more than their order


class HubText(TextEncoder):
    """The last hidden states of a text model, or the output of another of its blocks.

    Args:
        net: token ids -> hidden states.
        tokenizer: texts -> ids, padded on the right.
        layer: block, counted from 1, to read, without the final norm; 0: the last hidden states, after the final norm.
    """

    net: Any  # a model of transformers; its settings are untyped

    def __init__(
        self, net: Any, tokenizer: Any, *, name: str, num_tokens: int, masked: bool, layer: int, identity: dict
    ):
        super().__init__()
        self.net, self.tokenizer, self.layer = net.requires_grad_(False).eval(), tokenizer, layer
        self.name, self.num_tokens, self.masked = name, num_tokens, masked
        self.dim = net.config.hidden_size
        self.identity = identity

    def encode(self, texts: Sequence[str]) -> Text:
        rows = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.num_tokens, return_tensors="pt"
        )
        device, known = next(self.net.parameters()).device, self.net.get_input_embeddings().num_embeddings
        if (largest := int(rows["input_ids"].max())) >= known:
            raise UserError(
                f"The tokenizer of {self.name} returned token {largest}, but its network has {known} tokens: use another folder."
            )
        ids, mask = rows["input_ids"].to(device), rows["attention_mask"].to(device).bool()  # (N, S)
        # Some tokenizers return no token for "", but attention over no tokens is NaN.
        mask[:, 0] = True
        seen = {"attention_mask": mask.long()} if self.masked else {}
        if not self.layer:
            hidden = self.net(input_ids=ids, **seen).last_hidden_state
        else:
            hidden = self.net(input_ids=ids, output_hidden_states=True, **seen).hidden_states[self.layer]
        if not self.masked:
            return Text(hidden, None)
        # Features at padding depend on the machine's kernels, so they are set to zero.
        return Text(hidden * mask[..., None], mask)


def load_hub(name: str, weights: Path | None, *, tokens: NonNegativeInt = 0, layer: NonNegativeInt = 0) -> HubText:
    """Load FAMILY-SIZE from `weights`: a folder in the hub's format, or None for our cache, the hub's cache, or the hub.

    Args:
        tokens: number of tokens per text; 0: the family's.
        layer: see HubText.

    Raises:
        UserError: a file is missing, damaged or of another model, or the hub is not reachable and there is no cached copy.
    """
    family, folder = locate_text_encoder(name, weights)
    net, num_tokens = read_network(name, family.model, folder), tokens or family.num_tokens
    blocks = net.config.num_hidden_layers
    if layer > blocks:
        raise UserError(
            f"The text encoder {name} has blocks 1 to {blocks}, but got layer={layer!r}: choose one of them."
        )
    limit = net.config.max_position_embeddings if family.model == "CLIPTextModel" else 4096
    if num_tokens > limit:
        raise UserError(
            f"The text encoder {name} supports 1 to {limit} tokens per text, but got tokens={num_tokens!r}: choose fewer."
        )
    padding = "zero at padding" if family.masked else "all tokens, padding too"
    identity = {
        "name": name,
        "weights_sha256": _checksum(found_of(WEIGHTS, folder)),
        "tokenizer_sha256": _checksum([path for file in sorted(TOKENIZER) if (path := folder / file).is_file()]),
        "preprocessing": f"{num_tokens} tokens; {f'output of block {layer}' if layer else 'last hidden states'}; {padding}",
    }
    tokenizer = read_tokenizer(name, folder)
    return HubText(
        net, tokenizer, name=name, num_tokens=num_tokens, masked=family.masked, layer=layer, identity=identity
    )


def locate_text_encoder(name: str, weights: Path | None) -> tuple[TextFamily, Path]:
    """The family of an encoder, and the checked folder of its weights and tokenizer; see `load_hub`."""
    family, size = text_family_of(name)
    shelf = files.cache_folder() / "text" / name
    by_hand = f"give the folder of a copy of {family.hub[size]} as its weights, or put it in {shelf}"
    repository = Repository(f"text encoder {name}", family.hub[size], ((CONFIG,), WEIGHTS, TOKENIZER), by_hand)
    folder = weights or (shelf if shelf.exists() else repository.folder())
    repository.check(folder, family.model_types)
    return family, folder


def read_network(name: str, model: str, folder: Path) -> Any:
    """The network, of the class `model` of transformers, in float32, with every tensor from the folder."""
    transformers = imports.need("transformers", f"The text encoder {name}")
    remedy = "Download or copy them again."
    kind = getattr(transformers, model)
    with faults.reading(folder, f"weights of the text encoder {name}", remedy, damaged=(Exception,)):
        with no_larger_than(found_of(WEIGHTS, folder), folder / CONFIG):
            kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        net, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            return_dict=True,
        )
    require_all_read(folder, f"the text encoder {name}", report, net)
    return net


def read_tokenizer(name: str, folder: Path) -> Any:
    """Texts -> token ids, padded on the right."""
    transformers = imports.need("transformers", f"The text encoder {name}")
    # tokenizers raises only Exception; some kinds need another package and raise ImportError.
    remedy = "Give a folder with tokenizer.json."
    with faults.reading(folder, f"the tokenizer of the text encoder {name}", remedy, damaged=(Exception,)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"The tokenizer in {folder} has no padding token and no end token, so it cannot pad texts: use another folder."
        )
    return tokenizer


def _checksum(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {files.sha256(path)}\n".encode())
    return digest.hexdigest()


class WordHashes(TextEncoder):
    """A token per word: a Gaussian vector seeded by the word's letters, plus sines and cosines of its position.

    Equal words have equal vectors, and different words nearly orthogonal ones (|cos| about 1/sqrt(E)). Nothing is learned, so
    "cup" is as far from "mug" as from "sky".
    """

    positions: Tensor

    def __init__(self, name: str, num_tokens: int, dim: int):
        super().__init__()
        self.name, self.num_tokens, self.dim, self.masked = name, num_tokens, dim, True
        self.identity = {
            "name": name, "weights_sha256": None,
            "preprocessing": f"NFKC, lower case, words of letters and digits; {num_tokens} tokens of {dim} numbers",
        }  # fmt: skip
        self.register_buffer("positions", POSITION * positions(num_tokens, dim), persistent=False)  # (S, E)
        self._vector = functools.lru_cache(100_000)(lambda word: word_vector(word, dim))

    def encode(self, texts: Sequence[str]) -> Text:
        tokens = torch.zeros(len(texts), self.num_tokens, self.dim)
        mask = torch.zeros(len(texts), self.num_tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            words = [BEGIN, *split_words(text)][: self.num_tokens]
            tokens[row, : len(words)] = torch.stack([self._vector(word) for word in words])
            mask[row, : len(words)] = True
        device = self.positions.device
        tokens, mask = tokens.to(device), mask.to(device)
        return Text((tokens + self.positions) * mask[..., None], mask)


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, in order."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def word_vector(word: str, dim: int) -> Tensor:
    """(E,) standard normal."""
    return torch.randn(dim, generator=generator(0, "word", word))


def positions(num: int, dim: int) -> Tensor:
    """(num, dim): sines, then cosines, with wavelengths from 2 pi to 2 pi 100, because texts are short."""
    rates = 100 ** (-torch.arange(dim // 2) / (dim // 2))
    angles = torch.arange(num)[:, None] * rates
    return math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], 1)


def load_words(
    name: str,
    weights: Path | None,
    *,
    tokens: Annotated[int, Field(ge=1, le=512)] = 16,
    width: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] = 64,
) -> WordHashes:
    """A vector per word, seeded by its letters, without weights; for tests and the demonstration.

    Raises:
        UserError: weights are given.
    """
    if weights is not None:
        raise UserError(f"The text encoder {name} has no weights, but got {weights}: remove the option.")
    return WordHashes(name, tokens, width)
