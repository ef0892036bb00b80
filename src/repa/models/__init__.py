"""Diffusion transformers: networks that are functions of their arguments."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Backbone": "contract",
        "Condition": "contract",
        "DiT": "dit",
        "Hooked": "hooked",
        "JiT": "jit",
        "MMDiT": "mmdit",
        "MaskedAdapter": "jit",
        "ModelConfig": "config",
        "Output": "contract",
        "State": "contract",
        "Tap": "contract",
        "build": "dit",
        "build_model": "dit",
        "constructor_arguments": "published",
        "jit_dimensions": "jit",
        "load_exported": "exported",
        "load_published": "published",
        "model_names": "config",
        "to_diffusers": "diffusers_export",
        "to_published": "published",
    },
)
