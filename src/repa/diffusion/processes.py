"""The two ways to train a denoiser, behind one contract: flow matching (SiT) and improved DDPM (DiT).

Everybody else speaks our t, 0 data and 1 noise; what a network is told instead is known in here alone.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Generator, Tensor

from repa.diffusion import PATHS, TIMESTEPS
from repa.diffusion.config import DiffusionConfig
from repa.diffusion.ddpm import ImprovedDDPM, timestep
from repa.diffusion.interpolants import Coefficients, Interpolant, interpolate
from repa.diffusion.predictions import target


class Process(Protocol):
    """How data becomes noise, and what a network is trained to answer about it.

    Attributes:
        path: the interpolant of x_t, at every t.
        prediction: what the network's first C channels mean, one of PREDICTIONS.
    """

    path: Interpolant
    prediction: str

    def draw_times(self, num: int, generator: Generator, device: torch.device) -> Tensor:
        """(num,) training times on `device`, drawn where the generator lives."""
        ...

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 1: x_t (N, C, H, W) at training times t (N,)."""
        ...

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given for t (N,)."""
        ...

    def losses(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Terms (N,), to be summed, of the network's output at training times t; "denoising" is among them."""
        ...


# of the squared error of the noise, over t (SiT): an error of the noise changes the velocity by determinant / alpha, and the
# bound of the likelihood counts it with half the rate of the process, sigma determinant / alpha, over sigma^2
WEIGHTS: dict[str, Callable[[Coefficients], Tensor] | None] = {
    "none": None,
    "velocity": lambda c: (c.determinant / c.alpha).square(),
    "likelihood": lambda c: c.determinant / (c.alpha * c.sigma),
}


class Flow:
    """Eqs. 1 and 4: squared error of velocity, noise, data or score on a path; the network is given t itself.

    A score is compared times sigma, as the noise that it implies: its own error grows like 1/sigma, and without this the
    steps of the smallest t would be all that is learned. `weight` is one of WEIGHTS.
    """

    def __init__(self, path: str, prediction: str, timesteps: str, weight: str = "none"):
        self.path: Interpolant = PATHS.build(path)
        self.prediction = prediction
        self._times: Callable[..., Tensor] = TIMESTEPS.build(timesteps)
        self._weight = WEIGHTS[weight]

    def draw_times(self, num: int, generator: Generator, device: torch.device) -> Tensor:
        return self._times(num, generator=generator, device=device)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(self.path, x, noise, t)[0]

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def losses(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        c = self.path(t).like(x)
        if self.prediction == "score":
            error = c.sigma * output.float() + noise  # Eq. 6: noise = -sigma score
        else:
            error = output.float() - target(self.prediction, c, x, noise)
        squared = error.square()
        if self._weight is not None:
            squared = self._weight(c) * squared
        return {"denoising": squared.mean(dim=(1, 2, 3))}


class DDPM:
    """Eqs. 10-12: the hybrid loss of DiT; the network answers [noise; v] and is given the timestep.

    The term "vb" trains the variance alone, in bits per element; the two have equal weight.
    """

    prediction = "noise"

    def __init__(self) -> None:
        self.ddpm = ImprovedDDPM()
        self.path: Interpolant = self.ddpm.path

    def draw_times(self, num: int, generator: Generator, device: torch.device) -> Tensor:
        k = torch.randint(self.ddpm.num_timesteps, (num,), generator=generator, device=generator.device)
        return ((k + 1) / self.ddpm.num_timesteps).to(device, non_blocking=True)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.ddpm.q_sample(x, noise, self.network_time(t).long())

    def network_time(self, t: Tensor) -> Tensor:
        return timestep(t, self.ddpm.num_timesteps)

    def losses(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        mse, vb = self.ddpm.losses(output, x, noise, self.network_time(t).long())
        return {"denoising": mse, "vb": vb}


def build_process(config: DiffusionConfig) -> Process:
    """The process that a configuration names."""
    return (
        DDPM()
        if config.objective == "ddpm"
        else Flow(config.path, config.prediction, config.timesteps, config.loss_weight)
    )
