"""The two ways to train a denoiser, flow matching (SiT) and improved DDPM (DiT), and the times that training draws.

All other code uses t, 0 data and 1 noise; only this module knows what a network is given instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from repa.base.errors import UserError
from repa.diffusion import PATHS, TIMESTEPS
from repa.diffusion.config import DiffusionConfig
from repa.diffusion.ddpm import ImprovedDDPM, timestep
from repa.diffusion.interpolants import (
    SIGMA_MIN,
    Coefficients,
    Interpolant,
    at_least_float32,
    check_numbers,
    convert,
    interpolate,
    target,
    time_shift,
)


class Process(Protocol):
    """How data becomes noise, and what a network is trained to answer about it.

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

        t is (N,), or (N, 1, H, W) where the parts of an image have times of their own. `other` (N, C, H, W) is the velocity of
        another image, for a process that is contrastive.
        """
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
    steps of the smallest t would be all that is learned. `config.loss_weight` is one of WEIGHTS. An error of the data changes
    the velocity by determinant / sigma, sigma held at `sigma_min` in the prediction and in its target (JiT, RAEv2).
    """

    def __init__(self, config: DiffusionConfig):
        if config.shift == "auto":
            raise UserError(
                "diffusion.shift auto needs the shape of the latents: DiffusionConfig.for_latents((C, H, W))."
            )
        self.path: Interpolant = PATHS.build(config.path)
        self.prediction = config.prediction
        self._times: Callable[..., Tensor] = TIMESTEPS.build(config.timesteps)
        self.shift = float(config.shift)
        of_data = (config.prediction, config.loss_weight) == ("data", "velocity")
        self.sigma_min = config.sigma_min if of_data else SIGMA_MIN
        self._weight = self._of_velocity if of_data else WEIGHTS[config.loss_weight]
        self.contrastive, self._cosine = config.contrastive, config.velocity_cosine

    def draw_times(self, num: int, generator: Generator, device: torch.device) -> Tensor:
        return time_shift(self._times(num, generator=generator, device=device), self.shift)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(self.path, x, noise, t)[0]

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt of Eq. 1, what a network of velocities learns."""
        return target("velocity", self.path(t).like(x), x, noise)

    def losses(
        self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, other: Tensor | None = None
    ) -> dict[str, Tensor]:
        c, output = self.path(t).like(x), at_least_float32(output)
        if self.prediction == "score":
            error = c.sigma * output + noise  # Eq. 6: noise = -sigma score
        else:
            error = output - target(self.prediction, c, x, noise)
        squared = error.square()
        if self._weight is not None:
            squared = self._weight(c) * squared
        losses = {"denoising": squared.mean(dim=(1, 2, 3))}
        if self._cosine or other is not None:
            x_t = c.alpha * x + c.sigma * noise
            velocity = convert(output, x_t, c, self.prediction, "velocity", self.sigma_min)
        if other is not None:
            losses["contrastive"] = -self.contrastive * (velocity - other).square().mean(dim=(1, 2, 3))
        if self._cosine:
            cosine = F.cosine_similarity(velocity, target("velocity", c, x, noise), dim=1)  # (N, H, W)
            losses["velocity_cosine"] = self._cosine * (1 - cosine).mean(dim=(1, 2))
        return losses

    def _of_velocity(self, c: Coefficients) -> Tensor:
        return (c.determinant / c.sigma.clamp(min=self.sigma_min)).square()


class DDPM:
    """Eqs. 10-12: the hybrid loss of DiT; the network answers [noise; v] and is given the timestep.

    The term "vb" trains the variance alone, in bits per element; the two have equal weight.
    """

    prediction = "noise"
    shift, sigma_min, contrastive = 1.0, SIGMA_MIN, 0.0

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

    def losses(
        self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, other: Tensor | None = None
    ) -> dict[str, Tensor]:
        mse, vb = self.ddpm.losses(output, x, noise, self.network_time(t).long())
        return {"denoising": mse, "vb": vb}


def build_process(config: DiffusionConfig) -> Process:
    """The process that a configuration names."""
    return DDPM() if config.objective == "ddpm" else Flow(config)


@dataclass(frozen=True)
class Uniform:
    """t ~ U[low, high): the paper's default on all of [0, 1); SiT cuts both ends for noise and score."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_numbers("time distribution uniform", low=self.low, high=self.high)
        if not 0 <= self.low < self.high <= 1:
            raise UserError(
                f"The time distribution uniform needs 0 <= low < high <= 1, but got low={self.low} and high={self.high}."
            )

    def __call__(self, num: int, generator: Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """(num,) float32 times on `device`; drawn where the generator lives: a CPU one gives the same anywhere."""
        t = torch.rand(num, generator=generator, device=generator.device if generator else device)
        return (self.low + (self.high - self.low) * t).to(device, non_blocking=True)


@dataclass(frozen=True)
class LogitNormal:
    """The ratio r = sigma_t / alpha_t is log-normal, log r ~ N(mean, std^2), and t is where `path` reaches r.

    On the linear path t = r / (1 + r), the logit-normal law; on the trigonometric path t = 2/pi atan(r). The law of t
    therefore depends on the path, and as a time distribution does not know the run's path, the setting says which:
    `logit_normal:path=trigonometric` with the trigonometric path is the reference implementation's "lognormal". JiT's mean of
    -0.8 is of data times (t = 1 is data): `logit_normal:mean=0.8,std=0.8` here.
    """

    mean: float = 0.0
    std: float = 1.0
    path: str = "linear"

    def __post_init__(self) -> None:
        check_numbers("time distribution logit_normal", mean=self.mean, std=self.std)
        if self.std <= 0:
            raise UserError(f"The time distribution logit_normal needs std > 0, but got {self.std}.")
        if self.path not in ("linear", "trigonometric"):
            raise UserError(
                f"The time distribution logit_normal knows the paths linear and trigonometric, but got {self.path!r}."
            )

    def __call__(self, num: int, generator: Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """(num,) float32 times on `device`; drawn where the generator lives."""
        log_ratio = self.mean + self.std * torch.randn(
            num, generator=generator, device=generator.device if generator else device
        )
        t = torch.sigmoid(log_ratio) if self.path == "linear" else torch.atan(log_ratio.exp()) * (2 / math.pi)
        return t.to(device, non_blocking=True)
