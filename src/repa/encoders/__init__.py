"""Frozen vision encoders behind one contract: what REPA aligns to, and what judges samples."""

from repa.base.lazy import exports
from repa.encoders.loading import EncoderRegistry
from repa.encoders.loading import canonical as canonical

ENCODERS = EncoderRegistry(
    "encoder",
    {
        "tiny": "repa.encoders.tiny:load_tiny",
        "tiny-judge": "repa.encoders.tiny:load_tiny",
        "dinov2-s": "repa.encoders.dinov2:load_dinov2",
        "dinov2-b": "repa.encoders.dinov2:load_dinov2",
        "dinov2-l": "repa.encoders.dinov2:load_dinov2",
        "dinov2-g": "repa.encoders.dinov2:load_dinov2",
        "dinov2-reg-s": "repa.encoders.dinov2:load_dinov2",
        "dinov2-reg-b": "repa.encoders.dinov2:load_dinov2",
        "dinov2-reg-l": "repa.encoders.dinov2:load_dinov2",
        "dinov2-reg-g": "repa.encoders.dinov2:load_dinov2",
    },
)

__getattr__, __dir__, __all__ = exports(
    __name__,
    {"Features": "contract", "VisionEncoder": "contract", "load_encoder": "loading"},
    local=("ENCODERS", "canonical"),
)
