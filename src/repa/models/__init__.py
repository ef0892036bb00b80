"""Diffusion transformers: networks that are functions of their arguments."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "DiT": "dit",
        "ModelConfig": "config",
        "Output": "dit",
        "build": "dit",
        "build_model": "dit",
        "constructor_arguments": "published",
        "load_exported": "exported",
        "load_published": "published",
        "model_names": "config",
        "to_diffusers": "diffusers_export",
        "to_published": "published",
    },
)
