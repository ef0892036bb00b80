"""Diffusion transformers: networks that are functions of their arguments."""

from typing import TYPE_CHECKING

from repa.base.imports import exports
from repa.base.registry import Registry

# f(config: ModelConfig, **settings) -> Backbone
BACKBONES = Registry(
    "backbone",
    {
        "dit": "repa.models.dit:dit",
        "ddt": "repa.models.ddt:DDTOptions",
        "hooked": "repa.models.hooked:hooked",
        "jit": "repa.models.jit:jit",
        "mmdit": "repa.models.mmdit:mmdit",
    },
    listing="backbones",
    takes=("config",),
    facts={
        "dit": "DiT and SiT (arXiv 2212.09748, 2401.08740)",
        "ddt": "DDT, an encoder and a head that both read the latents (arXiv 2504.05741); DiT^DH of RAE",
        "hooked": "Your own network, with blocks selected by name",
        "jit": "JiT, on pixels (arXiv 2511.13720)",
        "mmdit": "Text and image as two streams (arXiv 2403.03206)",
    },
)

if TYPE_CHECKING:
    from repa.models.config import ModelConfig as ModelConfig
    from repa.models.config import model_names as model_names
    from repa.models.contract import Backbone as Backbone
    from repa.models.contract import Condition as Condition
    from repa.models.contract import Output as Output
    from repa.models.contract import State as State
    from repa.models.contract import Tap as Tap
    from repa.models.contract import TwoTimes as TwoTimes
    from repa.models.ddt import DDT as DDT
    from repa.models.ddt import DDTOptions as DDTOptions
    from repa.models.diffusers_export import to_diffusers as to_diffusers
    from repa.models.dit import DiT as DiT
    from repa.models.dit import build as build
    from repa.models.dit import build_model as build_model
    from repa.models.exported import load_exported as load_exported
    from repa.models.hooked import Hooked as Hooked
    from repa.models.jit import JiT as JiT
    from repa.models.jit import MaskedAdapter as MaskedAdapter
    from repa.models.jit import jit_dimensions as jit_dimensions
    from repa.models.mmdit import MMDiT as MMDiT
    from repa.models.published import constructor_arguments as constructor_arguments
    from repa.models.published import load_published as load_published
    from repa.models.published import to_published as to_published
else:
    __getattr__, __dir__, __all__ = exports(__name__, local=("BACKBONES",))
