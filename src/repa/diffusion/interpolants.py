"""Paths between data and noise, x_t = alpha_t x + sigma_t noise (Eq. 1), and the four predictions on them (Eqs. 3, 6, 7).

The convention of the whole project, stated here once: **t = 0 is data, t = 1 is noise** (the paper's; SiT's code runs
the other way, so there t' = 1 - t, v' = -v, and a guidance interval [lo, hi] becomes [1 - hi, 1 - lo]).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.base.errors import UserError
from repa.diffusion.config import check_prediction


class Coefficients(NamedTuple):
    """The four numbers that a path is at time t, each shaped like t; d_ is the derivative by t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def like(self, x: Tensor) -> "Coefficients":
        """Reshaped to multiply x (N, ...): one time for all samples, or one time per sample."""
        shape = self.alpha.shape
        if len(shape) == 0 or (len(shape) == x.ndim and shape[0] == len(x)):
            return self
        if len(shape) != 1 or shape[0] != len(x):
            raise UserError(
                f"t has shape {tuple(shape)}, but must be one time for all or one per sample, ({len(x)},), "
                f"for x of shape {tuple(x.shape)}."
            )
        return Coefficients(*(c.reshape(-1, *[1] * (x.ndim - 1)) for c in self))  # (N, 1, ..., 1)

    @property
    def determinant(self) -> Tensor:
        """alpha sigma' - sigma alpha': how fast the path turns; positive on every path, so safe to divide by."""
        return self.alpha * self.d_sigma - self.sigma * self.d_alpha


Interpolant = Callable[[Tensor], Coefficients]


def linear(t: Tensor) -> Coefficients:
    """alpha = 1 - t, sigma = t: straight lines, the paper's default."""
    t = at_least_float32(t)
    return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))


def trigonometric(t: Tensor) -> Coefficients:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): unit variance all the way (the paper misprints sigma)."""
    t = at_least_float32(t)
    cos, sin = torch.cos(t * (math.pi / 2)), torch.sin(t * (math.pi / 2))
    return Coefficients(cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos)


@dataclass(frozen=True)
class VariancePreserving:
    """The VP-SDE as an interpolant: alpha = exp(-B/2), sigma = sqrt(1 - exp(-B)), B(t) = integral of beta to t.

    beta rises linearly from `beta_min` to `beta_max`; the defaults are the continuous limit of DDPM's linear schedule.
    sigma' grows like 1/sqrt(t) towards t = 0, where it is infinite: below `T_MIN` it is held at its value there (50
    with the defaults), so that every coefficient is finite. The conversions of predictions.py stay exact inverses.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T_MIN = 1e-5

    def __post_init__(self) -> None:
        check_numbers("path vp", beta_min=self.beta_min, beta_max=self.beta_max)
        if not 0 < self.beta_min <= self.beta_max:
            raise UserError(f"The path vp needs 0 < beta_min <= beta_max, but got {self.beta_min} and {self.beta_max}.")

    def __call__(self, t: Tensor) -> Coefficients:
        return _variance_preserving(self._integral, t, self.T_MIN)

    def _integral(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rise = self.beta_max - self.beta_min
        return self.beta_min * t + rise * t**2 / 2, self.beta_min + rise * t


class DiscreteVariancePreserving:
    """The variance-preserving path of a discrete process: at t = k / T its alpha^2 is the k-th alpha_bar, k = 1 .. T.

    Between the timesteps the rate beta is interpolated linearly, so that the path is smooth and its derivatives are its
    own; at t = 0 it is data. `vp` with its defaults is its limit for many timesteps, but up to 10 % off for 1000.

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
    """The path of a rate beta, for t -> (B(t), beta(t)); sigma' is held at its value at t_min."""
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
        t: one time per sample (N,) or one for all, in [0, 1].

    Returns:
        x_t and velocity, shaped and typed like x.

    Raises:
        UserError: noise has another shape than x, or t neither one time nor one per sample.
    """
    if noise.shape != x.shape:
        raise UserError(f"noise has shape {tuple(noise.shape)}, but x has {tuple(x.shape)}: they must be equal.")
    c = path(t).like(x)
    return (c.alpha * x + c.sigma * noise).to(x.dtype), (c.d_alpha * x + c.d_sigma * noise).to(x.dtype)


def at_least_float32(t: Tensor) -> Tensor:
    """Half precision has no business in a time: bfloat16 cannot tell 0.996 from 1."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def check_numbers(what: str, **settings: float) -> None:
    """Settings come from spec strings, where `std=one` is text."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"The setting {name!r} of the {what} must be a number, but got {value!r}.")


def time_shift(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): s = 1 changes nothing, s > 1 pushes times towards noise; 0 and 1 stay where they are.

    With t = 1 at the data, as LightningDiT and DDT write it, the same map is t / (t + (1 - t) s), and "timestep shift" there is
    often 1/s: LightningDiT's 0.3 is s = 3.33 here.
    """
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


# Velocity, noise, data and score are four ways to say the same thing about x_t = alpha x + sigma noise (Eqs. 3, 6, 7/20).
#
# Every conversion goes through the pair (data, noise), which solves the 2x2 system that the prediction and x_t form:
#
# * velocity: determinant alpha sigma' - sigma alpha', never 0, so the pair is exact at every t, both ends included;
# * noise, score: data = (x_t - sigma noise) / alpha. At alpha = 0 (linear and trigonometric, t = 1) x_t *is* the noise:
#   the network's answer says nothing about the data. alpha is held at `ALPHA_MIN` there: a network that answers x_t gives
#   data 0, the mean of centred data, and its error is multiplied by at most 1 / ALPHA_MIN instead of infinity;
# * data: noise = (x_t - alpha data) / sigma. At sigma = 0 (t = 0) the answer says nothing about the noise; sigma is held
#   at `SIGMA_MIN`. The same holds for the division of score = -noise / sigma.
#
# Outside these two small neighbourhoods each function is exact. All take and return (N, ...) tensors; `c` is `path(t)`.
ALPHA_MIN = 5e-3  # just below the smallest alpha of the vp path, 0.0066, which is thereby never touched
SIGMA_MIN = 1e-3  # the last time but one of 1000 linear steps, so that no usual grid is touched


def velocity_to_data(velocity: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """(sigma' x_t - sigma velocity) / determinant."""
    c = c.like(x_t)
    return (c.d_sigma * x_t - c.sigma * velocity) / c.determinant


def velocity_to_noise(velocity: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """(alpha velocity - alpha' x_t) / determinant."""
    c = c.like(x_t)
    return (c.alpha * velocity - c.d_alpha * x_t) / c.determinant


def velocity_to_score(velocity: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """Eq. 7/20."""
    return noise_to_score(velocity_to_noise(velocity, x_t, c), x_t, c)


def noise_to_data(noise: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """Eq. 1 solved for the data: (x_t - sigma noise) / alpha."""
    c = c.like(x_t)
    return (x_t - c.sigma * noise) / c.alpha.clamp(min=ALPHA_MIN)


def noise_to_velocity(noise: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """Eq. 3, the data from `noise_to_data`."""
    return _velocity(noise_to_data(noise, x_t, c), noise, c)


def noise_to_score(noise: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """Eq. 6: score = -E[noise | x_t] / sigma."""
    return -noise / c.like(x_t).sigma.clamp(min=SIGMA_MIN)


def data_to_noise(data: Tensor, x_t: Tensor, c: Coefficients, sigma_min: float = SIGMA_MIN) -> Tensor:
    """Eq. 1 solved for the noise: (x_t - alpha data) / sigma."""
    c = c.like(x_t)
    return (x_t - c.alpha * data) / c.sigma.clamp(min=sigma_min)


def data_to_velocity(data: Tensor, x_t: Tensor, c: Coefficients, sigma_min: float = SIGMA_MIN) -> Tensor:
    """Eq. 3 with the noise of Eq. 1: (sigma' x_t - determinant data) / sigma; on the linear path (x_t - data) / sigma, as JiT."""
    c = c.like(x_t)
    return (c.d_sigma * x_t - c.determinant * data) / c.sigma.clamp(min=sigma_min)


def data_to_score(data: Tensor, x_t: Tensor, c: Coefficients, sigma_min: float = SIGMA_MIN) -> Tensor:
    """Eq. 6, the noise from `data_to_noise`."""
    return noise_to_score(data_to_noise(data, x_t, c, sigma_min), x_t, c)


def score_to_noise(score: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """Eq. 6 solved for the noise: -sigma score."""
    return -c.like(x_t).sigma.clamp(min=SIGMA_MIN) * score


def score_to_data(score: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """The data of `score_to_noise`."""
    return noise_to_data(score_to_noise(score, x_t, c), x_t, c)


def score_to_velocity(score: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """Eq. 3 from the noise of `score_to_noise`."""
    return noise_to_velocity(score_to_noise(score, x_t, c), x_t, c)


def _velocity(data: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
    """Eq. 3: the velocity is alpha' E[x | x_t] + sigma' E[noise | x_t]."""
    c = c.like(data)
    return c.d_alpha * data + c.d_sigma * noise


CONVERSIONS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("velocity", "data"): velocity_to_data,
    ("velocity", "noise"): velocity_to_noise,
    ("velocity", "score"): velocity_to_score,
    ("noise", "data"): noise_to_data,
    ("noise", "velocity"): noise_to_velocity,
    ("noise", "score"): noise_to_score,
    ("data", "noise"): data_to_noise,
    ("data", "velocity"): data_to_velocity,
    ("data", "score"): data_to_score,
    ("score", "noise"): score_to_noise,
    ("score", "data"): score_to_data,
    ("score", "velocity"): score_to_velocity,
}


def convert(
    output: Tensor, x_t: Tensor, c: Coefficients, given: str, wanted: str, sigma_min: float = SIGMA_MIN
) -> Tensor:
    """`output`, a prediction of kind `given`, as the kind `wanted`; both are names of `repa.diffusion.PREDICTIONS`.

    `sigma_min`: where sigma is held when a prediction of the data is divided by it.
    """
    if given == wanted:
        return output
    if given == "data":
        return CONVERSIONS[given, wanted](output, x_t, c, sigma_min)
    return CONVERSIONS[given, wanted](output, x_t, c)


def target(prediction: str, coefficients: Coefficients, x: Tensor, noise: Tensor) -> Tensor:
    """What a network of this prediction is trained to answer, for clean latents x (N, ...) and their noise.

    The score's target grows like 1/sigma, up to 1/SIGMA_MIN: its squared error is weighted by sigma^2 in `processes.py`.
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
    return _velocity(x, noise, coefficients).to(x.dtype)
