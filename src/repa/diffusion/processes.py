"""The two ways to train a denoiser: flow matching (SiT) and improved DDPM (DiT).

All other code uses t, 0 data and 1 noise; only a process knows what a network is given instead.
"""

from typing import Protocol

import torch
from torch import Generator, Tensor

from repa.diffusion.config import DiffusionConfig
from repa.diffusion.ddpm import ImprovedDDPM
from repa.diffusion.flow import Flow, Interpolant


class Process(Protocol):
    """How data becomes noise, and what a network is trained to predict.

    Attributes:
        path: the interpolant of x_t, at every t.
        prediction: what the network's first C channels mean, one of PREDICTIONS.
        shift: of the training times, and so of the grids of samplers.
        sigma_min: where sigma is held when a prediction of the data is divided by it.
        contrastive: weight of the distance to another image's velocity; 0: there is no such term.
    """

    path: Interpolant
    prediction: str
    shift: float
    sigma_min: float
    contrastive: float

    def draw_times(self, num: int, generator: Generator, device: torch.device) -> Tensor:
        """(num,) training times on `device`, drawn where the generator lives."""
        ...

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 1: x_t (N, C, H, W) at training times t (N,)."""
        ...

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given for t (N,)."""
        ...

    def losses(
        self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, other: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms (N,), to be summed, of the network's output at training times t; "denoising" is among them.

        t is (N,), or (N, 1, H, W) where the parts of an image have different times. `other` (N, C, H, W) is the velocity of
        another image, for a process that is contrastive.
        """
        ...


def build_process(config: DiffusionConfig) -> Process:
    """The process that a configuration names."""
    return ImprovedDDPM() if config.objective == "ddpm" else Flow(config)
