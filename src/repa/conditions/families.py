"""Table of the hub's text encoders. Torch-free."""

from collections.abc import Mapping
from typing import NamedTuple

from repa.base.errors import UserError, choices


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
