"""Flow matching: paths x_t = alpha_t x + sigma_t noise from data to noise (Eq. 1), training times, the loss (Eq. 4).

The convention of the whole project, stated here once: **t = 0 is data, t = 1 is noise** (the paper's; SiT's code runs
the other way, so there t' = 1 - t, v' = -v, and a guidance interval [lo, hi] becomes [1 - hi, 1 - lo]).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Generator, Tensor

from repa.base.device import at_least_float32
from repa.base.errors import UserError
from repa.diffusion import PATHS, TIMESTEPS
from repa.diffusion.config import DiffusionConfig, check_prediction
from repa.diffusion.predictions import SIGMA_MIN, convert, noise_to_score


class Coefficients(NamedTuple):
    """The four coefficients of a path at time t, each shaped like t; d_ is the derivative with respect to t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def like(self, x: Tensor) -> "Coefficients":
        """Reshaped to multiply x (N, ...): a single time, or one per sample."""
        shape = self.alpha.shape
        if len(shape) == 0 or (len(shape) == x.ndim and shape[0] == len(x)):
            return self
        if len(shape) != 1 or shape[0] != len(x):
            raise UserError(
                f"t has shape {tuple(shape)}, but must be a single time or one per sample, ({len(x)},), "
                f"for x of shape {tuple(x.shape)}."
            )
        return Coefficients(*(c.reshape(-1, *[1] * (x.ndim - 1)) for c in self))  # (N, 1, ..., 1)

    def velocity(self, data: Tensor, noise: Tensor) -> Tensor:
        """Eq. 3: alpha' data + sigma' noise, for the true values or for their expectations."""
        c = self.like(data)
        return c.d_alpha * data + c.d_sigma * noise

    @property
    def determinant(self) -> Tensor:
        """alpha sigma' - sigma alpha', the determinant; positive on every path, so safe to divide by."""
        return self.alpha * self.d_sigma - self.sigma * self.d_alpha


Interpolant = Callable[[Tensor], Coefficients]


def linear(t: Tensor) -> Coefficients:
    """alpha = 1 - t, sigma = t: straight lines, the paper's default."""
    t = at_least_float32(t)  # bfloat16 cannot tell 0.996 from 1
    return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))


def trigonometric(t: Tensor) -> Coefficients:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): unit variance at every t (the paper misprints sigma)."""
    t = at_least_float32(t)
    cos, sin = torch.cos(t * (math.pi / 2)), torch.sin(t * (math.pi / 2))
    return Coefficients(cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos)


@dataclass(frozen=True)
class VariancePreserving:
    """The VP-SDE as an interpolant: alpha = exp(-B/2), sigma = sqrt(1 - exp(-B)), B(t) = integral of beta to t.

    beta rises linearly from `beta_min` to `beta_max`; the defaults are the continuous limit of DDPM's linear schedule.
    sigma' grows like 1/sqrt(t) towards t = 0, where it is infinite: below `T_MIN` it keeps its value at `T_MIN` (50
    with the defaults), so that every coefficient is finite. The conversions of predictions.py stay exact inverses.
    """

    beta_min: PositiveFloat = 0.1
    beta_max: PositiveFloat = 20.0
    T_MIN = 1e-5

    def __post_init__(self) -> None:
        if self.beta_min > self.beta_max:
            raise UserError(f"The path vp needs beta_min <= beta_max, but got {self.beta_min} and {self.beta_max}.")

    def __call__(self, t: Tensor) -> Coefficients:
        return _variance_preserving(self._integral, t, self.T_MIN)

    def _integral(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rise = self.beta_max - self.beta_min
        return self.beta_min * t + rise * t**2 / 2, self.beta_min + rise * t


class DiscreteVariancePreserving:
    """The variance-preserving path of a discrete process: at t = k / T its alpha^2 is the k-th alpha_bar, k = 1 .. T.

    Between timesteps the rate beta is interpolated linearly, so that the path is smooth and its derivatives are exact; at
    t = 0 it is data. `vp` with its defaults is its limit for many timesteps, but differs by up to 10 % for 1000.

    Args:
        alpha_bar: (T,) descending, as in `ImprovedDDPM`.
    """

    def __init__(self, alpha_bar: np.ndarray):
        integrals = -np.log(np.append(1.0, alpha_bar))
        self.num_timesteps = len(alpha_bar)
        self.integrals = torch.from_numpy(integrals)  # (T + 1,), B at every timestep
        self.rates = torch.from_numpy(np.gradient(integrals, edge_order=2))  # (T + 1,), beta / T

    def __call__(self, t: Tensor) -> Coefficients:
        return _variance_preserving(self._integral, t, VariancePreserving.T_MIN)

    def _integral(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integrals, rates = (table.to(t.dtype).to(t.device) for table in (self.integrals, self.rates))
        k = (t * self.num_timesteps).floor().clamp(0, self.num_timesteps - 1).long()
        past = t * self.num_timesteps - k  # since timestep k, in timesteps
        rise = rates[k + 1] - rates[k]
        return integrals[k] + past * (rates[k] + past * rise / 2), (rates[k] + past * rise) * self.num_timesteps


def _variance_preserving(integral: Callable[[Tensor], tuple[Tensor, Tensor]], t: Tensor, t_min: float) -> Coefficients:
    """The path of a rate beta, given t -> (B(t), beta(t)); below t_min, sigma' keeps its value at t_min."""
    t = at_least_float32(t)
    total, beta = integral(t)
    held_total, held_beta = integral(t.clamp(min=t_min))
    alpha, held_alpha = torch.exp(-total / 2), torch.exp(-held_total / 2)
    # expm1: 1 - exp(-B) would cancel near t = 0
    sigma, held_sigma = torch.sqrt(-torch.expm1(-total)), torch.sqrt(-torch.expm1(-held_total))
    return Coefficients(alpha, sigma, -beta / 2 * alpha, held_beta / 2 * held_alpha**2 / held_sigma)


def interpolate(path: Interpolant, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1 and the target of Eq. 4: x_t = alpha x + sigma noise and its velocity alpha' x + sigma' noise.

    Args:
        path: an interpolant, e.g. `PATHS.build("linear")`.
        x: clean latents (N, ...).
        noise: standard normal, shaped like x.
        t: one time per sample (N,) or a single time, in [0, 1].

    Returns:
        x_t and velocity, shaped and typed like x.

    Raises:
        UserError: the shapes of noise and x differ, or t is neither a single time nor one per sample.
    """
    if noise.shape != x.shape:
        raise UserError(f"noise has shape {tuple(noise.shape)}, but x has {tuple(x.shape)}: they must be equal.")
    c = path(t).like(x)
    return (c.alpha * x + c.sigma * noise).to(x.dtype), c.velocity(x, noise).to(x.dtype)


def time_shift(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): s = 1 changes nothing, s > 1 pushes times towards noise; 0 and 1 stay where they are.

    With t = 1 at the data, as LightningDiT and DDT write it, the same map is t / (t + (1 - t) s), and "timestep shift" there is
    often 1/s: LightningDiT's 0.3 is s = 3.33 here.
    """
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def target(prediction: str, coefficients: Coefficients, x: Tensor, noise: Tensor) -> Tensor:
    """The training target of a prediction, for clean latents x (N, ...) and their noise.

    The score's target grows like 1/sigma, up to 1/SIGMA_MIN: its squared error is weighted by sigma^2 in `Flow`.
    Shaped and typed like x; raises UserError for a name that is not in `repa.diffusion.PREDICTIONS`.
    """
    if prediction == "data":
        return x
    if prediction == "noise":
        return noise
    if prediction == "score":
        return noise_to_score(noise, x, coefficients).to(x.dtype)
    if prediction != "velocity":
        check_prediction(prediction)
    return coefficients.velocity(x, noise).to(x.dtype)


# weights of the squared noise error over t (SiT): a noise error changes the velocity by determinant / alpha, and the
# likelihood bound weights its square by half the rate of the process, sigma determinant / alpha, over sigma^2
WEIGHTS: dict[str, Callable[[Coefficients], Tensor] | None] = {
    "none": None,
    "velocity": lambda c: (c.determinant / c.alpha).square(),
    "likelihood": lambda c: c.determinant / (c.alpha * c.sigma),
}


class Flow:
    """Eqs. 1 and 4: squared error of velocity, noise, data or score on a path; the network's time input is t.

    A score is multiplied by sigma and compared as noise: its error grows like 1/sigma, so that otherwise the smallest t would
    dominate the loss. `config.loss_weight` is one of WEIGHTS. A data error changes the velocity by determinant / sigma, with
    sigma at least `sigma_min` in the prediction and in its target (JiT, RAEv2).
    """

    def __init__(self, config: DiffusionConfig):
        if config.shift == "auto":
            raise UserError("The shift auto needs the shape of the latents: DiffusionConfig.for_latents((C, H, W)).")
        self.path: Interpolant = PATHS.build(config.path)
        self.prediction = config.prediction
        self._spec, self._times = config.timesteps, TIMESTEPS.build(config.timesteps)
        PATHS.instance(config.path, self.path(torch.tensor(0.5)), Coefficients)
        self.shift = float(config.shift)
        of_data = (config.prediction, config.loss_weight) == ("data", "velocity")
        self.sigma_min = config.sigma_min if of_data else SIGMA_MIN
        self._weight = self._of_velocity if of_data else WEIGHTS[config.loss_weight]
        self.contrastive, self._cosine = config.contrastive, config.velocity_cosine
        self._contrast_by_time = config.contrastive_times == "linear"

    def draw_times(self, num: int, generator: Generator, device: torch.device) -> Tensor:
        times = TIMESTEPS.returned(self._spec, self._times(num, generator=generator, device=device), (num,), "times")
        return time_shift(times, self.shift)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 1."""
        return interpolate(self.path, x, noise, t)[0]

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt of Eq. 1, the target of a velocity prediction."""
        return target("velocity", self.path(t).like(x), x, noise)

    def losses(
        self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, other: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Eq. 4 per sample, and the further terms of the configuration."""
        c, output = self.path(t).like(x), at_least_float32(output)
        if self.prediction == "score":
            error = c.sigma * output + noise  # Eq. 6: noise = -sigma score
        else:
            error = output - target(self.prediction, c, x, noise)
        squared = error.square()  # (N, C, H, W)
        if self._weight is not None:
            squared = self._weight(c) * squared
        losses = {"denoising": squared.mean(dim=(1, 2, 3))}  # (N,)
        if self._cosine or other is not None:
            # Eq. 1 in the loss's own precision: the network's x_t may have been rounded.
            x_t = c.alpha * x + c.sigma * noise
            velocity = convert(output, x_t, c, self.prediction, "velocity", self.sigma_min)
        if other is not None:  # pushes away from the velocity of another image
            distance = (velocity - other).square()
            if self._contrast_by_time:
                distance = t.reshape(*t.shape, *[1] * (x.ndim - t.ndim)) * distance
            losses["contrastive"] = -self.contrastive * distance.mean(dim=(1, 2, 3))
        if self._cosine:
            cosine = F.cosine_similarity(velocity, target("velocity", c, x, noise), dim=1)  # (N, H, W)
            losses["velocity_cosine"] = self._cosine * (1 - cosine).mean(dim=(1, 2))
        return losses

    def _of_velocity(self, c: Coefficients) -> Tensor:
        """The factor from a squared data error to a squared velocity error: Eq. 3 with the noise of Eq. 1."""
        return (c.determinant / c.sigma.clamp(min=self.sigma_min)).square()


@dataclass(frozen=True)
class Uniform:
    """t ~ U[low, high): by default [0, 1), as in the paper; SiT excludes both ends for noise and score."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise UserError(
                f"The time distribution uniform needs 0 <= low < high <= 1, but got {self.low} and {self.high}."
            )

    def __call__(self, num: int, generator: Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """(num,) float32 times on `device`, sampled on the generator's device: a CPU generator gives equal times."""
        t = torch.rand(num, generator=generator, device=generator.device if generator else device)
        return (self.low + (self.high - self.low) * t).to(device, non_blocking=True)


@dataclass(frozen=True)
class LogitNormal:
    """The ratio r = sigma_t / alpha_t is log-normal, log r ~ N(mean, std^2), and t is the time at which `path` reaches r.

    On the linear path t = r / (1 + r), the logit-normal distribution; on the trigonometric path t = 2/pi atan(r). The
    distribution of t depends on the path, and a time distribution does not know the run's path, so it is a setting:
    `logit_normal:path=trigonometric` with the trigonometric path is the reference implementation's "lognormal". JiT's mean of
    -0.8 is for t = 1 at the data: `logit_normal:mean=0.8,std=0.8` here.
    """

    mean: float = 0.0
    std: PositiveFloat = 1.0
    path: Literal["linear", "trigonometric"] = "linear"

    def __call__(self, num: int, generator: Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """(num,) float32 times on `device`, sampled on the generator's device."""
        log_ratio = self.mean + self.std * torch.randn(
            num, generator=generator, device=generator.device if generator else device
        )
        t = torch.sigmoid(log_ratio) if self.path == "linear" else torch.atan(log_ratio.exp()) * (2 / math.pi)
        return t.to(device, non_blocking=True)
