"""Conversions of velocity, noise, data and score, equivalent given x_t = alpha x + sigma noise (Eqs. 3, 6, 7/20).

Every conversion uses the pair (data, noise), the solution of the 2x2 system of the prediction and x_t:

* velocity: determinant alpha sigma' - sigma alpha', never 0, so the pair is exact at every t, both ends included;
* noise, score: data = (x_t - sigma noise) / alpha. At alpha = 0 (linear and trigonometric, t = 1) x_t *is* the noise:
  the network's output has no information on the data. alpha is at least `ALPHA_MIN`: a network that outputs x_t gives
  data 0, the mean of centred data, and its error is multiplied by at most 1 / ALPHA_MIN instead of infinity;
* data: noise = (x_t - alpha data) / sigma. At sigma = 0 (t = 0) the output has no information on the noise; sigma is at
  least `SIGMA_MIN`. The same bound applies to score = -noise / sigma.

Outside these two small neighbourhoods each function is exact. All accept and return (N, ...) tensors; `c` is `path(t)`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from repa.diffusion.flow import Coefficients

ALPHA_MIN = 5e-3  # below the smallest alpha of the vp path, 0.0066, so that this path never reaches it
SIGMA_MIN = 1e-3  # the last time above 0 of 1000 linear steps, so that no common grid is below it


def velocity_to_data(velocity: Tensor, x_t: Tensor, c: "Coefficients") -> Tensor:
    """(sigma' x_t - sigma velocity) / determinant."""
    c = c.like(x_t)
    return (c.d_sigma * x_t - c.sigma * velocity) / c.determinant


def velocity_to_noise(velocity: Tensor, x_t: Tensor, c: "Coefficients") -> Tensor:
    """(alpha velocity - alpha' x_t) / determinant."""
    c = c.like(x_t)
    return (c.alpha * velocity - c.d_alpha * x_t) / c.determinant


def noise_to_data(noise: Tensor, x_t: Tensor, c: "Coefficients") -> Tensor:
    """Eq. 1 solved for the data: (x_t - sigma noise) / alpha."""
    c = c.like(x_t)
    return (x_t - c.sigma * noise) / c.alpha.clamp(min=ALPHA_MIN)


def noise_to_velocity(noise: Tensor, x_t: Tensor, c: "Coefficients") -> Tensor:
    """Eq. 3, the data from `noise_to_data`."""
    return c.velocity(noise_to_data(noise, x_t, c), noise)


def noise_to_score(noise: Tensor, x_t: Tensor, c: "Coefficients") -> Tensor:
    """Eq. 6: score = -E[noise | x_t] / sigma."""
    return -noise / c.like(x_t).sigma.clamp(min=SIGMA_MIN)


def data_to_noise(data: Tensor, x_t: Tensor, c: "Coefficients", sigma_min: float = SIGMA_MIN) -> Tensor:
    """Eq. 1 solved for the noise: (x_t - alpha data) / sigma."""
    c = c.like(x_t)
    return (x_t - c.alpha * data) / c.sigma.clamp(min=sigma_min)


def data_to_velocity(data: Tensor, x_t: Tensor, c: "Coefficients", sigma_min: float = SIGMA_MIN) -> Tensor:
    """Eq. 3 with the noise of Eq. 1: (sigma' x_t - determinant data) / sigma; (x_t - data) / sigma on the linear path."""
    c = c.like(x_t)
    return (c.d_sigma * x_t - c.determinant * data) / c.sigma.clamp(min=sigma_min)


def score_to_noise(score: Tensor, x_t: Tensor, c: "Coefficients") -> Tensor:
    """Eq. 6 solved for the noise: -sigma score."""
    return -c.like(x_t).sigma.clamp(min=SIGMA_MIN) * score


CONVERSIONS: dict[tuple[str, str], Callable[..., Tensor]] = {  # scores are converted through noise
    ("velocity", "data"): velocity_to_data,
    ("velocity", "noise"): velocity_to_noise,
    ("noise", "data"): noise_to_data,
    ("noise", "velocity"): noise_to_velocity,
    ("data", "noise"): data_to_noise,
    ("data", "velocity"): data_to_velocity,
}


def convert(
    output: Tensor, x_t: Tensor, c: "Coefficients", given: str, wanted: str, sigma_min: float = SIGMA_MIN
) -> Tensor:
    """Convert `output` from the prediction `given` to `wanted`; both are names of `repa.diffusion.PREDICTIONS`.

    `sigma_min`: lower bound of sigma where a data prediction is divided by it.
    """
    if given == wanted:
        return output
    if given == "score":
        return convert(score_to_noise(output, x_t, c), x_t, c, "noise", wanted)
    if wanted == "score":  # Eq. 7/20 where a velocity is given
        return noise_to_score(convert(output, x_t, c, given, "noise", sigma_min), x_t, c)
    held = {"sigma_min": sigma_min} if given == "data" else {}
    return CONVERSIONS[given, wanted](output, x_t, c, **held)
