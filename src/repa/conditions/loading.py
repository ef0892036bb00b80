"""The table of the hub's text encoders, `load_text_encoder`, and reading of prompt files. Torch is imported only on use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from repa.base import faults, files
from repa.base.errors import UserError, choices
from repa.base.registry import parse_spec

if TYPE_CHECKING:
    import torch

    from repa.conditions.contract import TextEncoder

MOST_BYTES = 2**28  # largest prompt file


class TextFamily(NamedTuple):
    """A family of text encoders, with its sizes."""

    model: str
    """Class name in transformers of the text encoder."""
    model_types: tuple[str, ...]
    """Allowed values of `model_type` in config.json."""
    hub: Mapping[str, str]
    """Size -> repository."""
    num_tokens: int
    """Default number of tokens per text, see the setting `tokens`."""
    masked: bool
    """Whether padding is masked. CLIP was trained without a mask, and networks attend to all of its 77 tokens."""


FAMILIES = {
    "clip": TextFamily(
        "CLIPTextModel", ("clip", "clip_text_model"),
        {"b": "openai/clip-vit-base-patch32", "l": "openai/clip-vit-large-patch14", "h": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
        num_tokens=77, masked=False,
    ),
    "t5": TextFamily(
        "T5EncoderModel", ("t5",),
        {size: f"google/t5-v1_1-{name}" for size, name in
         {"s": "small", "b": "base", "l": "large", "xl": "xl", "xxl": "xxl"}.items()},
        num_tokens=120, masked=True,
    ),
    "qwen3": TextFamily(
        "Qwen3Model", ("qwen3",), {size: f"Qwen/Qwen3-{size.upper()}" for size in ("0.6b", "1.7b", "4b", "8b")},
        num_tokens=120, masked=True,
    ),
}  # fmt: skip


def text_encoder_names() -> list[str]:
    """clip-b, clip-l, ..., t5-xxl, qwen3-0.6b, ..."""
    return [f"{stem}-{size}" for stem, family in FAMILIES.items() for size in family.hub]


def text_family_of(name: str) -> tuple[TextFamily, str]:
    """'clip-l' -> (the family, 'l')."""
    stem, _, size = name.partition("-")
    if stem not in FAMILIES or size not in FAMILIES[stem].hub:
        raise UserError(
            f"Unknown text encoder {name!r}{choices(name, text_encoder_names(), 'repa list text-encoders')}"
        )
    return FAMILIES[stem], size


def about(name: str) -> str:
    """A line with its repository and the number of tokens per text."""
    family, size = text_family_of(name)
    return f"{family.hub[size]}, {family.num_tokens} tokens per text"


def load_text_encoder(
    spec: str, *, weights: str | Path | None = None, device: "str | torch.device" = "cpu"
) -> "TextEncoder":
    """A frozen text encoder, ready to use on `device`.

    Args:
        spec: a name of TEXT_ENCODERS with its settings, such as "clip-l" or "t5-xxl:tokens=256", or the dotted name of your own
            function(name, weights) -> TextEncoder.
        weights: a local folder in the hub's format; None: the default weights.
        device: device of the encoder.

    Raises:
        UserError: unknown name; weights are missing, damaged or of another model; no network access and no cached weights.
    """
    from repa.base.pretrained import given_weights, load_frozen
    from repa.conditions import TEXT_ENCODERS
    from repa.conditions.contract import TextEncoder

    TEXT_ENCODERS.check(spec)
    path = given_weights(weights, f"text encoder {spec}")
    return load_frozen(TEXT_ENCODERS, TextEncoder, spec, path, device)


def require_text_encoder(spec: str, weights: str | Path | None) -> None:
    """Raises UserError if the weights of a text encoder are missing; downloads them if need be, and loads nothing."""
    from repa.base.pretrained import given_weights
    from repa.conditions.encoders import locate_text_encoder

    path, (name, _) = given_weights(weights, f"text encoder {spec}"), parse_spec(spec)
    if name in text_encoder_names():
        locate_text_encoder(name, path)


def prompts_in(path: Path) -> list[str]:
    """Prompts of a file, one per line; in .jsonl the "prompt" (or "caption", "text") of each line's object. Skips empty lines.

    Raises:
        UserError: no such file, not UTF-8, or no prompt in the file or in a line of .jsonl.
    """
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is larger than {files.size(MOST_BYTES)}: give fewer prompts.")
    with faults.reading(path, "a file of prompts", "Save it as UTF-8."):
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        lines = [_prompt(line, number, path) for number, line in enumerate(lines, start=1)]
    if not lines:
        raise UserError(f"{path} contains no prompts: write one per line.")
    return [files.well_formed(line.strip()) for line in lines]


def _prompt(line: str, number: int, path: Path) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    found = [values.get(key) for key in ("prompt", "caption", "text")] if isinstance(values, dict) else []
    text = next((text for text in found if isinstance(text, str)), "")
    if not text.strip():
        raise UserError(f'Line {number} of {path} is not an object with a "prompt": correct or remove it.')
    return text
