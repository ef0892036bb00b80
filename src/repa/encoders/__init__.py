"""Frozen vision encoders behind one contract: alignment targets, and feature extractors for distances."""

from typing import TYPE_CHECKING

from repa.base.imports import exports
from repa.encoders import families
from repa.encoders.loading import EncoderRegistry
from repa.encoders.loading import canonical as canonical

ENCODERS = EncoderRegistry(
    "encoder",
    {
        "tiny": "repa.encoders.packaged:load_tiny",
        "tiny-classifier": "repa.encoders.packaged:load_tiny",
        "lite0": "repa.encoders.packaged:load_lite",
        **dict.fromkeys(families.encoder_names(), "repa.encoders.vit:load_vit"),
    },
    listing="encoders",
    takes=("name", "weights"),
    facts={name: families.facts_of(name).about for name in (*families.PACKAGED, *families.encoder_names())},
)

if TYPE_CHECKING:
    from repa.encoders.contract import Features as Features
    from repa.encoders.contract import VisionEncoder as VisionEncoder
    from repa.encoders.loading import load_encoder as load_encoder
else:
    __getattr__, __dir__, __all__ = exports(__name__, local=("ENCODERS", "canonical"))
