"""Text encoders of the hub over transformers, with their tokenizers; families.py says which."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from repa.base import extras, faults, files, trust
from repa.base.errors import UserError
from repa.conditions.contract import Text, TextEncoder
from repa.conditions.families import TextFamily, text_family_of

CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


class HubText(TextEncoder):
    """The last hidden states of a text model, or those behind another of its blocks.

    Args:
        net: gives hidden states of token ids.
        tokenizer: texts -> ids, padded on the right.
        layer: block, counted from 1, whose output is given as it is; 0: the last, after the final norm.
    """

    net: Any  # a model of transformers, whose settings have no types

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
                f"The tokenizer of {self.name} gives token {largest}, but its network knows {known}: take another folder."
            )
        ids, mask = rows["input_ids"].to(device), rows["attention_mask"].to(device).bool()  # (N, S)
        # Some tokenizers give no token for "", and a text needs one: attention over nothing is NaN.
        mask[:, 0] = True
        seen = {"attention_mask": mask.long()} if self.masked else {}
        if not self.layer:
            hidden = self.net(input_ids=ids, **seen).last_hidden_state
        else:
            hidden = self.net(input_ids=ids, output_hidden_states=True, **seen).hidden_states[self.layer]
        if not self.masked:
            return Text(hidden, None)
        # What stands at padding depends on the machine's kernels: zeros are stored alike everywhere.
        return Text(hidden * mask[..., None], mask)


def load_hub(name: str, weights: Path | None, *, tokens: int = 0, layer: int = 0) -> HubText:
    """`name` is FAMILY-SIZE; `weights` a folder like the hub's repository, or None for our cache, the hub's cache, or the hub.

    Args:
        tokens: of a text; 0 takes the family's.
        layer: see HubText.

    Raises:
        UserError: a file is missing, damaged or of another model, or the hub cannot be reached and holds no cached copy.
    """
    family, folder = locate_text_encoder(name, weights)
    net, num_tokens = read_network(name, family.model, folder), tokens or family.num_tokens
    blocks = net.config.num_hidden_layers
    if type(layer) is not int or not 0 <= layer <= blocks:
        raise UserError(f"The text encoder {name} has blocks 1 to {blocks}, but got layer={layer!r}.")
    limit = net.config.max_position_embeddings if family.model == "CLIPTextModel" else 4096
    if type(num_tokens) is not int or not 1 <= num_tokens <= limit:
        raise UserError(f"The text encoder {name} takes 1 to {limit} tokens of a text, but got tokens={num_tokens!r}.")
    padding = "zero at padding" if family.masked else "all tokens, padding too"
    identity = {
        "name": name,
        "weights_sha256": _checksum(folder, ("*.safetensors",) if list(folder.glob("*.safetensors")) else ("*.bin",)),
        "tokenizer_sha256": _checksum(folder, TOKENIZER),
        "preprocessing": f"{num_tokens} tokens; {f'output of block {layer}' if layer else 'last hidden states'}; {padding}",
    }
    tokenizer = read_tokenizer(name, folder)
    return HubText(
        net, tokenizer, name=name, num_tokens=num_tokens, masked=family.masked, layer=layer, identity=identity
    )


def locate_text_encoder(name: str, weights: Path | None) -> tuple[TextFamily, Path]:
    """The family of an encoder, and the checked folder of its weights and tokenizer: see `load_hub`."""
    family, size = text_family_of(name)
    folder = weights or _found(name, family.hub[size])
    _check_folder(name, family, folder)
    return family, folder


def _found(name: str, hub: str) -> Path:
    """Our cache folder, the hub's, or the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    shelf = files.cache_folder() / "text" / name
    if shelf.exists():
        return shelf
    wanted = [CONFIG, "*.safetensors", "*.safetensors.index.json", *TOKENIZER]
    # The cache first, and without the network: an interrupted download leaves a snapshot that lacks its weights.
    try:
        found = Path(snapshot_download(hub, allow_patterns=wanted, local_files_only=True))
        if any((found / file).is_file() for file in WEIGHTS):
            return found
    except LocalEntryNotFoundError:
        pass
    try:
        found = Path(snapshot_download(hub, allow_patterns=wanted))
        if not any((found / file).is_file() for file in WEIGHTS):  # repositories from before safetensors
            found = Path(snapshot_download(hub, allow_patterns=[*wanted, "pytorch_model*"]))
        return found
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(
            f"The text encoder {name} ({hub}) is not on this machine and the hub cannot be reached: run once with a network, or "
            f"give the folder of a copy of that repository as its weights, or put it in {shelf}."
        ) from error


def _check_folder(name: str, family: TextFamily, folder: Path) -> None:
    """Raises UserError unless it holds a configuration, weights and a tokenizer, of a model of this family."""
    for wanted in ((CONFIG,), WEIGHTS, TOKENIZER):
        if not any((folder / file).is_file() for file in wanted):
            raise UserError(
                f"{folder} holds no {wanted[0]}: the text encoder {name} needs a folder as on the hub, with {CONFIG}, weights and "
                "a tokenizer."
            )
    # transformers would read the network that an adapter names, wherever that lies.
    if (folder / ADAPTER).exists():
        raise UserError(f"{folder} holds an {ADAPTER}: merge the adapter into the weights, and remove it.")
    trust.require_own_weights(folder)
    config = files.read_object(folder / CONFIG)
    trust.require_plain_model(config, folder / CONFIG)
    found = config.get("model_type")
    if found not in family.model_types:
        allowed = " or ".join(map(repr, family.model_types))
        raise UserError(f"{folder} holds a model of type {found!r}, but the text encoder {name} is of type {allowed}.")


def read_network(name: str, model: str, folder: Path) -> Any:
    """The network, a class `model` of transformers, float32, every tensor of it from the folder."""
    transformers = extras.need("transformers", f"The text encoder {name}")
    remedy = "Download or copy them again."
    with faults.reading(folder, f"weights of the text encoder {name}", remedy, damaged=(Exception,)):
        net, report = getattr(transformers, model).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    # transformers would leave these at random values, with a warning.
    if report["missing_keys"]:
        raise UserError(
            f"{folder} lacks weights of the text encoder {name}, for example {min(report['missing_keys'])}."
        )
    return net


def read_tokenizer(name: str, folder: Path) -> Any:
    """Texts -> token ids, padded on the right."""
    transformers = extras.need("transformers", f"The text encoder {name}")
    # tokenizers raises nothing more special than Exception; ImportError comes from kinds that need a further package.
    remedy = "Give a folder with tokenizer.json."
    with faults.reading(folder, f"the tokenizer of the text encoder {name}", remedy, damaged=(Exception,)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"The tokenizer in {folder} has neither a padding token nor an end: it cannot pad texts.")
    return tokenizer


def _checksum(folder: Path, patterns: Sequence[str]) -> str:
    """Of all files that match, by name."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {files.sha256(path)}\n".encode())
    return digest.hexdigest()
