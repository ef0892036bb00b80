"""The two ways to train a denoiser: flow matching (SiT) and improved DDPM (DiT).

All other code uses t, 0 data and 1 noise; only a process knows the network's own time input.
"""

from typing import Protocol

import torch
from torch import Generator, Tensor

from repa.diffusion.config import DiffusionConfig
from repa.diffusion.ddpm import ImprovedDDPM
from repa.diffusion.flow import Flow, Interpolant


class Process(Protocol):
    """The noising process and the training target of a network.

    Attributes:
        path: the interpolant of x_t, at every t.
        prediction: meaning of the network's first C channels, one of PREDICTIONS.
        shift: time shift of the training times and of samplers' grids.
        sigma_min: lower bound of sigma where a data prediction is divided by it.
        contrastive: weight of the distance to another image's velocity; 0: no such term.
    """

    path: Interpolant
    prediction: str
    shift: float
    sigma_min: float
    contrastive: float

    def draw_times(self, num: int, generator: Generator, device: torch.device) -> Tensor:
        """(num,) training times on `device`, sampled on the generator's device."""
        ...

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 1: x_t (N, C, H, W) at training times t (N,)."""
        ...

    def network_time(self, t: Tensor) -> Tensor:
        """The network's time input for t (N,)."""
        ...

    def losses(
        self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, other: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss terms (N,), to be summed, of the network's output at training times t; one of them is "denoising".

        t is (N,), or (N, 1, H, W) if the parts of an image have different times. `other` (N, C, H, W) is the velocity of
        another image, for contrastive flow matching.
        """
        ...


def build_process(config: DiffusionConfig) -> Process:
    """The process of a configuration."""
    return ImprovedDDPM() if config.objective == "ddpm" else Flow(config)
