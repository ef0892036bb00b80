"""Times: the distributions that training draws from, the time shift, and the grids that samplers walk down."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from repa.base.errors import UserError
from repa.diffusion.config import check_shift
from repa.diffusion.interpolants import check_numbers


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


def time_shift(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): s = 1 changes nothing, s > 1 pushes times towards noise; 0 and 1 stay where they are.

    With t = 1 at the data, as LightningDiT and DDT write it, the same map is t / (t + (1 - t) s), and "timestep shift" there is
    often 1/s: LightningDiT's 0.3 is s = 3.33 here.
    """
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def ode_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """(num_steps + 1,) float64 times from 1 down to 0, evenly spaced before the shift. On the CPU: see `Denoiser`."""
    check_steps(num_steps)
    check_shift(shift)
    return time_shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu"), shift)


def sde_grid(num_steps: int, last: float = 0.04, shift: float = 1.0) -> Tensor:
    """(num_steps + 1,) float64 times: num_steps evenly spaced from 1 to `last` before the shift, then 0. On the CPU: see `Denoiser`."""
    check_steps(num_steps)
    check_shift(shift)
    check_numbers("sampler", last=last)
    if not 0 < last < 1:
        raise UserError(f"The last noisy time of the sampler must lie between 0 and 1, but got last={last}.")
    grid = time_shift(torch.linspace(1, last, num_steps, dtype=torch.float64, device="cpu"), shift)
    return torch.cat([grid, torch.zeros(1, dtype=torch.float64, device="cpu")])


def per_sample(t: float | Tensor, x: Tensor) -> Tensor:
    """What networks take: (N,) times in float32 on x's device, from a Python float, a 0-dim or an (N,) tensor."""
    if not isinstance(t, Tensor):
        return torch.full((len(x),), t, dtype=torch.float32, device=x.device)
    if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x)):
        raise UserError(f"t has shape {tuple(t.shape)}, but must be one time for all or one per sample, ({len(x)},).")
    return t.to(x.device, torch.float32).expand(len(x))


def check_steps(num_steps: int) -> None:
    """UserError unless it is a whole number of at least 1."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise UserError(f"The number of sampling steps must be a whole number of at least 1, but got {num_steps!r}.")
