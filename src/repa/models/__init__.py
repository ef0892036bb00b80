"""Diffusion transformers: networks that are functions of their arguments."""

from repa.base.lazy import exports
from repa.base.registry import Registry

# f(config: ModelConfig, **settings) -> Backbone
BACKBONES = Registry(
    "backbone",
    {
        "dit": "repa.models.dit:dit",
        "ddt": "repa.models.ddt:ddt",
        "hooked": "repa.models.hooked:hooked",
        "jit": "repa.models.jit:jit",
        "mmdit": "repa.models.mmdit:mmdit",
    },
)

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Backbone": "contract",
        "Condition": "contract",
        "DDT": "ddt",
        "DiT": "dit",
        "Hooked": "hooked",
        "JiT": "jit",
        "MMDiT": "mmdit",
        "MaskedAdapter": "jit",
        "ModelConfig": "config",
        "Output": "contract",
        "State": "contract",
        "Tap": "contract",
        "TwoTimes": "contract",
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
    local=("BACKBONES",),
)
