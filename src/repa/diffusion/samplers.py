"""Samplers from noise (t = 1) to data (t = 0): sampler(denoiser, noise, num_steps, randn_like, callback, *, settings) -> latents.

Each calls one Denoiser. The state is float64 (float32 on MPS, which has no float64); the result has noise's dtype; times
are Python floats; the network calls per sample (NFE) are exact in each docstring, and `CountedCalls` counts them.
`noise` is (N, C, H, W), or (N, F) for a state of several parts; `randn_like` samples the noise of a step, in the state's
dtype; `callback`, if given, is called at every step. Grids have the time shift of the training (the denoiser's shift),
unless the setting `shift` overrides it. Invalid settings (no steps, a shift below 1, ...) raise UserError before the
first call.
"""

from collections.abc import Callable
from itertools import count, pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from repa.base import imports
from repa.base.errors import UserError
from repa.diffusion.config import check_shift
from repa.diffusion.denoiser import Denoiser
from repa.diffusion.flow import time_shift
from repa.diffusion.predictions import velocity_to_data

RandnLike = Callable[[Tensor], Tensor]


class Step(NamedTuple):
    """A sampler's report before a step."""

    index: int  # type: ignore[assignment]  # from 0; shadows tuple.index, which a step does not need
    done: float  # share of the sampling that is completed after this step, up to 1
    t: float
    x: Tensor  # the state (N, ...)
    data: Tensor  # the network's estimate of the clean state, E[x | x_t], guided


Callback = Callable[[Step], None]


@torch.no_grad()
def euler(
    denoiser: Denoiser,
    noise: Tensor,
    num_steps: int,
    randn_like: RandnLike = torch.randn_like,
    callback: Callback | None = None,
    *,
    shift: float | None = None,
) -> Tensor:
    """Probability flow dx = v dt by Euler steps on `ode_grid`. NFE = num_steps; deterministic."""
    x = to_state(noise)
    for index, (t, t_next) in enumerate(pairwise(ode_grid(num_steps, _shift(shift, denoiser)).tolist())):
        velocity = denoiser.velocity(x, t)
        _tell(callback, denoiser, (index, num_steps), t, x, velocity)
        x = x + (t_next - t) * velocity
    return x.to(noise.dtype)


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    noise: Tensor,
    num_steps: int,
    randn_like: RandnLike = torch.randn_like,
    callback: Callback | None = None,
    *,
    shift: float | None = None,
) -> Tensor:
    """Probability flow by Heun's second-order steps, the last (to t = 0) by Euler. NFE = 2 num_steps - 1; no noise.

    The corrector is evaluated and guided at its own time t_next. The reference implementation uses t to decide on its
    guidance, which differs in the one step that crosses an end of the guidance interval.
    """
    x = to_state(noise)
    for index, (t, t_next) in enumerate(pairwise(ode_grid(num_steps, _shift(shift, denoiser)).tolist())):
        velocity = denoiser.velocity(x, t)
        _tell(callback, denoiser, (index, num_steps), t, x, velocity)
        # The network is not evaluated at t = 0: the last step stays first order.
        if t_next > 0:
            velocity = 0.5 * (velocity + denoiser.velocity(x + (t_next - t) * velocity, t_next))
        x = x + (t_next - t) * velocity
    return x.to(noise.dtype)


DIFFUSIONS: dict[str, Callable[[float, float], float]] = {
    "2sigma": lambda t, sigma: 2 * sigma,
    "sigma": lambda t, sigma: sigma,
    "2t": lambda t, sigma: 2 * t,
}


@torch.no_grad()
def euler_maruyama(
    denoiser: Denoiser,
    noise: Tensor,
    num_steps: int,
    randn_like: RandnLike = torch.randn_like,
    callback: Callback | None = None,
    *,
    last: float = 0.04,
    diffusion: Literal["2sigma", "sigma", "2t"] = "2sigma",
    shift: float | None = None,
) -> Tensor:
    """Eq. 5, dx = (v - w s / 2) dt + sqrt(w) dW, by Euler-Maruyama steps on `sde_grid`. NFE = num_steps.

    The last step, from t = `last` to 0, has the drift alone. Any w has the same marginals; `diffusion` selects it:
    `2sigma` produced the published numbers (linear path), `sigma` is printed in the paper, `2t` is the reference
    implementation's on every path (equal to 2sigma on the linear one, not on the trigonometric one).
    """
    x = to_state(noise)
    grid = sde_grid(num_steps, last, _shift(shift, denoiser))
    for index, (t, t_next) in enumerate(pairwise(grid.tolist())):
        # The coefficients of a single time are on the CPU, so reading sigma needs no synchronisation.
        w = DIFFUSIONS[diffusion](t, denoiser.coefficients(x, t).sigma.item())
        velocity, score = denoiser.velocity_and_score(x, t)
        _tell(callback, denoiser, (index, num_steps), t, x, velocity)
        x = x + (t_next - t) * (velocity - 0.5 * w * score)
        if t_next > 0:
            x = x + (w * (t - t_next)) ** 0.5 * randn_like(x)
    return x.to(noise.dtype)


@torch.no_grad()
def dopri5(
    denoiser: Denoiser,
    noise: Tensor,
    num_steps: int,
    randn_like: RandnLike = torch.randn_like,
    callback: Callback | None = None,
    *,
    rtol: Annotated[float, Field(ge=1e-12)] = 1e-3,
    atol: Annotated[float, Field(ge=1e-12)] = 1e-6,
) -> Tensor:
    """Probability flow by the adaptive Dormand-Prince 5(4) method of torchdiffeq; no noise.

    The first step is 1 / num_steps, later ones follow the tolerances: the NFE is not known in advance. The error is that of
    the batch, so a sample depends on the others of its batch within the tolerances. The callback is called at every
    evaluation, six per step. Below the least tolerances the rounding of a network would keep the steps endlessly small.
    """
    check_steps(num_steps)
    odeint = imports.need("torchdiffeq", "The sampler dopri5").odeint
    x = to_state(noise)
    grid = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device)
    # without step_t the solver steps past t = 0, where no network was trained, and interpolates back
    options = {"first_step": 1 / num_steps, "step_t": grid[1:], "dtype": x.dtype}

    evaluations = count()

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        velocity, index = denoiser.velocity(x, float(t)), next(evaluations)
        if callback:
            callback(Step(index, 1 - float(t), float(t), x, _data(denoiser, velocity, x, float(t))))
        return velocity

    return odeint(velocity, x, grid, rtol=rtol, atol=atol, method="dopri5", options=options)[-1].to(noise.dtype)


def _shift(asked: float | None, denoiser: Denoiser) -> float:
    return denoiser.shift if asked is None else asked


def _tell(
    callback: Callback | None, denoiser: Denoiser, step: tuple[int, int], t: float, x: Tensor, velocity: Tensor
) -> None:
    """`step`: its index and the number of steps."""
    if callback:
        callback(Step(step[0], (step[0] + 1) / step[1], t, x, _data(denoiser, velocity, x, t)))


def _data(denoiser: Denoiser, velocity: Tensor, x: Tensor, t: float) -> Tensor:
    return velocity_to_data(velocity, x, denoiser.coefficients(x, t))


def to_state(noise: Tensor) -> Tensor:
    """The noise in the samplers' precision: float64, float32 on MPS; same shape and device."""
    return noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)


def ode_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """(num_steps + 1,) float64 times from 1 down to 0, evenly spaced before the shift. On the CPU: see `Denoiser`."""
    check_steps(num_steps)
    check_shift(shift)
    return time_shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu"), shift)


def sde_grid(num_steps: int, last: float = 0.04, shift: float = 1.0) -> Tensor:
    """(num_steps + 1,) float64 times: num_steps evenly spaced from 1 to `last` before the shift, then 0. On the CPU: see `Denoiser`."""
    check_steps(num_steps)
    check_shift(shift)
    if not 0 < last < 1:
        raise UserError(f"The sampler's last noisy time must be between 0 and 1, but got last={last}.")
    grid = time_shift(torch.linspace(1, last, num_steps, dtype=torch.float64, device="cpu"), shift)
    return torch.cat([grid, torch.zeros(1, dtype=torch.float64, device="cpu")])


def check_steps(num_steps: int) -> None:
    """Raises UserError unless it is a whole number of at least 1."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise UserError(f"The number of sampling steps must be a whole number of at least 1, but got {num_steps!r}.")
