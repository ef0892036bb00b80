"""Paths from data to noise, predictions, times, guidance, samplers. Treats the network as a black box."""

from typing import TYPE_CHECKING

from repa.base.imports import exports
from repa.base.registry import Registry

PATHS = Registry(
    "path",
    {
        "linear": "repa.diffusion.flow:linear",
        "trigonometric": "repa.diffusion.flow:trigonometric",
        "vp": "repa.diffusion.flow:VariancePreserving",
    },
    base="callable",
    listing="paths",
    takes=("t",),
)
PREDICTIONS = ("velocity", "noise", "data", "score")
TIMESTEPS = Registry(
    "time distribution",
    {
        "uniform": "repa.diffusion.flow:Uniform",
        "logit_normal": "repa.diffusion.flow:LogitNormal",
    },
    base="callable",
    listing="times",
    takes=("num",),
    takes_named=("generator", "device"),
)
SAMPLERS = Registry(
    "sampler",
    {
        "euler": "repa.diffusion.samplers:euler",
        "heun": "repa.diffusion.samplers:heun",
        "euler_maruyama": "repa.diffusion.samplers:euler_maruyama",
        "dopri5": "repa.diffusion.samplers:dopri5",
        "ddpm": "repa.diffusion.ddpm:ddpm",
        "ddim": "repa.diffusion.ddpm:ddim",
    },
    listing="samplers",
    takes=("denoiser", "noise", "num_steps"),
    takes_named=("randn_like",),
)
GUIDANCES = Registry(
    "guidance",
    {
        "cfg": "repa.diffusion.guidance:ClassifierFree",
        "internal": "repa.diffusion.guidance:Internal",
        "autoguidance": "repa.diffusion.guidance:Auto",
        "path_drop": "repa.diffusion.guidance:PathDrop",
        "representation": "repa.diffusion.guidance:Representation",
    },
    base="repa.diffusion.guidance:Guidance",
    listing="guidances",
)
DDPM_SAMPLERS = ("ddpm", "ddim")  # they visit the timesteps of a network trained with the ddpm objective

if TYPE_CHECKING:
    from repa.diffusion.chain import guided as guided
    from repa.diffusion.config import DiffusionConfig as DiffusionConfig
    from repa.diffusion.config import latent_shift as latent_shift
    from repa.diffusion.ddpm import ImprovedDDPM as ImprovedDDPM
    from repa.diffusion.denoiser import CountedCalls as CountedCalls
    from repa.diffusion.denoiser import Denoiser as Denoiser
    from repa.diffusion.denoiser import Layout as Layout
    from repa.diffusion.flow import Coefficients as Coefficients
    from repa.diffusion.flow import Interpolant as Interpolant
    from repa.diffusion.flow import interpolate as interpolate
    from repa.diffusion.flow import target as target
    from repa.diffusion.flow import time_shift as time_shift
    from repa.diffusion.guidance import Guidance as Guidance
    from repa.diffusion.predictions import convert as convert
    from repa.diffusion.processes import Process as Process
    from repa.diffusion.processes import build_process as build_process
    from repa.diffusion.samplers import Step as Step
    from repa.diffusion.samplers import ode_grid as ode_grid
    from repa.diffusion.samplers import sde_grid as sde_grid
else:
    __getattr__, __dir__, __all__ = exports(
        __name__, local=("DDPM_SAMPLERS", "GUIDANCES", "PATHS", "PREDICTIONS", "SAMPLERS", "TIMESTEPS")
    )
