"""Layer 1: paths from data to noise, what networks predict, times, guidance, samplers. Never sees inside a network."""

from repa.base.lazy import exports
from repa.base.registry import Registry

PATHS = Registry(
    "path",
    {
        "linear": "repa.diffusion.interpolants:linear",
        "trigonometric": "repa.diffusion.interpolants:trigonometric",
        "vp": "repa.diffusion.interpolants:VariancePreserving",
    },
    base="callable",
)
PREDICTIONS = ("velocity", "noise", "data", "score")
TIMESTEPS = Registry(
    "time distribution",
    {
        "uniform": "repa.diffusion.timesteps:Uniform",
        "logit_normal": "repa.diffusion.timesteps:LogitNormal",
    },
    base="callable",
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
)
DDPM_SAMPLERS = ("ddpm", "ddim")  # those that walk the timesteps of a network trained by the ddpm objective

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Coefficients": "interpolants",
        "Interpolant": "interpolants",
        "interpolate": "interpolants",
        "convert": "predictions",
        "target": "predictions",
        "latent_shift": "config",
        "time_shift": "timesteps",
        "ode_grid": "timesteps",
        "sde_grid": "timesteps",
        "Denoiser": "denoiser",
        "count_calls": "denoiser",
        "Guidance": "guidance",
        "guided": "chain",
        "Layout": "state",
        "Step": "samplers",
        "ImprovedDDPM": "ddpm",
        "in_timesteps": "ddpm",
        "Process": "processes",
        "build_process": "processes",
        "DiffusionConfig": "config",
    },
    local=("DDPM_SAMPLERS", "GUIDANCES", "PATHS", "PREDICTIONS", "SAMPLERS", "TIMESTEPS"),
)
