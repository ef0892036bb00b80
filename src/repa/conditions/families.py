"""The text encoders of the hub that are known by name, as a table. Free of torch."""

from collections.abc import Mapping
from typing import NamedTuple

from repa.base.errors import UserError, choices


class TextFamily(NamedTuple):
    """What the members of a family have in common."""

    model: str
    """Class of transformers that reads the text encoder out of a checkpoint."""
    model_types: tuple[str, ...]
    """What config.json may call the model."""
    hub: Mapping[str, str]
    """Size -> repository."""
    num_tokens: int
    """Tokens of a text, unless the setting `tokens` says otherwise."""
    masked: bool
    """Does padding mean nothing? CLIP was trained without a mask, and networks on it look at all 77 tokens."""


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
    """Its repository and the tokens of a text, in a line."""
    family, size = text_family_of(name)
    return f"{family.hub[size]}, {family.num_tokens} tokens a text"
