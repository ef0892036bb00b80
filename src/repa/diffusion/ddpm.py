"""Improved DDPM: the discrete process, hybrid loss and samplers of DiT (Eqs. 10-12).

Its network outputs 2C channels, [noise; v]: the noise and, per element, the position of the reverse step's log-variance
between its two bounds. Its input is the integer timestep k = 0 .. T - 1, as a float. Everywhere else in this project
time is our t: timestep k is t = (k + 1) / T, and `ImprovedDDPM.path` is the path that has this process's alpha_bar at
each of them, so that a DiT can be sampled by every other sampler too; `network_time` turns t into k for the network.
Without respacing it is the `Process` of the objective ddpm.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from repa.base.errors import UserError
from repa.diffusion.denoiser import Denoiser
from repa.diffusion.flow import DiscreteVariancePreserving, Interpolant
from repa.diffusion.predictions import SIGMA_MIN
from repa.diffusion.samplers import Callback, RandnLike, Step, to_state

NUM_TIMESTEPS = 1000


class ImprovedDDPM:
    """q(x_k | x) = N(sqrt(alpha_bar_k) x, 1 - alpha_bar_k); all constants are float64.

    The betas are evenly spaced, from 1e-4 to 2e-2 for 1000 timesteps, scaled so that any other number of them
    reaches about the same noise.

    Args:
        num_timesteps: T, the number that the network was trained with.
        timesteps: the K <= T timesteps to visit, ascending, with alpha_bar kept and betas recomputed; None: all.

    Attributes:
        timesteps, betas, alpha_bar: (K,) each.
        path: the interpolant on which `q_sample` at step k is Eq. 1 at t = (k + 1) / T, for a process that was not respaced.

    Raises:
        UserError: 20 timesteps or fewer, because the last beta would reach 1.
    """

    def __init__(self, num_timesteps: int = NUM_TIMESTEPS, timesteps: Sequence[int] | None = None):
        if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int) or num_timesteps <= 20:
            raise UserError(f"DDPM needs more than 20 timesteps to keep its betas below 1, but got {num_timesteps!r}.")
        betas = np.linspace(1e-4, 2e-2, num_timesteps) * (NUM_TIMESTEPS / num_timesteps)
        bar = np.cumprod(1 - betas)
        if timesteps is not None:
            bar = bar[list(timesteps)]
            # Betas follow from the kept alpha_bar, so that each visited step keeps its noise level.
            betas = 1 - bar / np.append(1, bar[:-1])
        prev = np.append(1, bar[:-1])
        # beta~ at step 0 is 0 and has no logarithm, so the value of step 1 is used.
        posterior = betas * (1 - prev) / (1 - bar)
        self.num_timesteps = num_timesteps
        self.timesteps = np.arange(num_timesteps) if timesteps is None else np.asarray(timesteps)
        self.betas, self.alpha_bar, self.alpha_bar_prev = betas, bar, prev
        constants = {
            "signal": np.sqrt(bar),
            "noise": np.sqrt(1 - bar),
            "log_beta": np.log(betas),
            "log_posterior": np.log(np.append(posterior[1], posterior[1:])),
            "mean_of_data": betas * np.sqrt(prev) / (1 - bar),
            "mean_of_x_k": (1 - prev) * np.sqrt(1 - betas) / (1 - bar),
        }
        self._constants = {name: torch.from_numpy(values) for name, values in constants.items()}
        self.path: Interpolant = DiscreteVariancePreserving(bar)
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def respaced(self, num_steps: int, integer_stride: bool = False) -> "ImprovedDDPM":
        """The process that visits only num_steps of these timesteps, with the same alpha_bar at each.

        Evenly spaced from the first to the last, rounded; with `integer_stride` 0, s, 2s, ... (what DDIM uses).
        """
        total = len(self.betas)
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 2 <= num_steps <= total:
            raise UserError(f"DDPM sampling needs 2 to {total} steps, but got {num_steps!r}.")
        if integer_stride:
            strides = (range(0, total, stride) for stride in range(1, total))
            kept: Sequence[int] | None = next((k for k in strides if len(k) == num_steps), None)
            if kept is None:
                raise UserError(
                    f"No stride visits exactly {num_steps} of {total} timesteps: choose a divisor of {total}."
                )
        else:
            kept = [round(i * (total - 1) / (num_steps - 1)) for i in range(num_steps)]
        return ImprovedDDPM(self.num_timesteps, self.timesteps[list(kept)].tolist())

    def time(self, k: int) -> float:
        """The time t of step k."""
        return (int(self.timesteps[k]) + 1) / self.num_timesteps

    def q_sample(self, x: Tensor, noise: Tensor, k: int | Tensor) -> Tensor:
        """x_k of clean latents x (N, ...) at a step, or at one int64 step per sample (N,)."""
        return self._at("signal", k, x) * x + self._at("noise", k, x) * noise

    def hybrid_losses(self, output: Tensor, x: Tensor, noise: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the hybrid loss (Eq. 10), to be added with weight 1.

        Args:
            output: (N, 2C, H, W), the network's output [noise; v] for (q_sample(x, noise, k), k).
            x: (N, C, H, W), clean latents.
            noise: shaped like x.
            k: (N,) int64 steps.

        Returns:
            mse (N,): squared error of the noise, mean over C, H, W.
            vb (N,): variational bound in bits per element, which trains v only: KL(q(x_{k-1} | x_k, x) || p), Eq. 11,
            and at step 0 the likelihood of x under a discretised Gaussian.
        """
        output, x_k = output.to(x.dtype), self.q_sample(x, noise, k)
        predicted, v = _halves(output, x)
        mse = ((noise - predicted) ** 2).flatten(1).mean(1)  # (N,)
        # The bound trains only the variance: a gradient through the mean would change the weight of the squared error.
        mean, log_variance = self.p_mean_log_variance(torch.cat([predicted.detach(), v], 1), x_k, k)
        kl = _normal_kl(self._posterior_mean(x, x_k, k), self._at("log_posterior", k, x), mean, log_variance)
        first = (k == 0).reshape(-1, *[1] * (x.ndim - 1))  # (N, 1, 1, 1)
        nats = torch.where(first, _discretised_nll(x, mean, log_variance), kl)  # (N, C, H, W)
        return mse, nats.flatten(1).mean(1) / math.log(2)

    def p_mean_log_variance(self, output: Tensor, x_k: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (Eq. 12) of p(x_{k-1} | x_k) for a network output [noise; v]; data is not clipped."""
        noise, v = _halves(output, x_k)
        fraction = (v + 1) / 2  # v = 1 is beta, v = -1 is beta~
        log_beta, log_posterior = self._at("log_beta", k, x_k), self._at("log_posterior", k, x_k)
        mean = self._posterior_mean(self.data(noise, x_k, k), x_k, k)
        return mean, fraction * log_beta + (1 - fraction) * log_posterior

    def data(self, noise: Tensor, x_k: Tensor, k: int | Tensor) -> Tensor:
        """The clean latents that a noise prediction implies."""
        return (x_k - self._at("noise", k, x_k) * noise) / self._at("signal", k, x_k)

    def _posterior_mean(self, x: Tensor, x_k: Tensor, k: int | Tensor) -> Tensor:
        """Mean of q(x_{k-1} | x_k, x)."""
        return self._at("mean_of_data", k, x) * x + self._at("mean_of_x_k", k, x) * x_k

    def _at(self, name: str, k: int | Tensor, x: Tensor) -> float | Tensor:
        """A constant at step k, shaped to multiply x. Tables stay on the device: a copy would synchronise."""
        if not isinstance(k, Tensor):
            return float(self._constants[name][k])
        key = (name, x.device, x.dtype)
        if key not in self._tables:
            self._tables[key] = self._constants[name].to(x.dtype).to(x.device)
        return self._tables[key][k].reshape(-1, *[1] * (x.ndim - 1))  # (N, 1, 1, 1)

    # The interface `Process`, in t.

    prediction = "noise"
    shift, sigma_min, contrastive = 1.0, SIGMA_MIN, 0.0

    def draw_times(self, num: int, generator: Generator, device: torch.device) -> Tensor:
        k = torch.randint(self.num_timesteps, (num,), generator=generator, device=generator.device)
        return ((k + 1) / self.num_timesteps).to(device, non_blocking=True)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 1 on the process's own path."""
        return self.q_sample(x, noise, self.network_time(t).long())

    def network_time(self, t: Tensor) -> Tensor:
        """The timestep k = t T - 1 of t (N,), a float of at least 0: no network was trained below the first one."""
        k = (t * self.num_timesteps - 1).clamp(min=0)
        # (k + 1) / T in float32 comes back with k; between timesteps, where an ODE solver goes, k stays fractional
        return torch.where((k - k.round()).abs() < 1e-3, k.round(), k)

    def losses(
        self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, other: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Eq. 10."""
        mse, vb = self.hybrid_losses(output, x, noise, self.network_time(t).long())
        return {"denoising": mse, "vb": vb}


@torch.no_grad()
def ddpm(
    denoiser: Denoiser,
    noise: Tensor,
    num_steps: int,
    randn_like: RandnLike = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling of the respaced process with the learned variance; no noise in the last step. NFE = num_steps.

    The denoiser predicts noise with a learned variance (2C channels) through `network_time`; its path is not used.
    DiT's code guides the first 3 channels only: the other channels and the variance keep the conditional values.
    """
    _check_noise(denoiser)
    process = ImprovedDDPM().respaced(num_steps)
    x = to_state(noise)
    for k in reversed(range(num_steps)):
        output = denoiser.output(x, process.time(k))
        mean, log_variance = process.p_mean_log_variance(output, x, k)
        if callback:
            data = process.data(output[:, : x.shape[1]], x, k)
            callback(Step(num_steps - 1 - k, 1 - k / num_steps, process.time(k), x, data))
        x = mean + torch.exp(0.5 * log_variance) * randn_like(x) if k > 0 else mean
    return x.to(noise.dtype)


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    noise: Tensor,
    num_steps: int,
    randn_like: RandnLike = torch.randn_like,
    callback: Callback | None = None,
    *,
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> Tensor:
    """DDIM with integer strides; a learned variance is ignored. NFE = num_steps.

    eta = 0 is deterministic, eta = 1 has the noise of the posterior q(x_{k-1} | x_k, x).
    """
    _check_noise(denoiser)
    process = ImprovedDDPM().respaced(num_steps, integer_stride=True)
    x = to_state(noise)
    for k in reversed(range(num_steps)):
        predicted = denoiser.output(x, process.time(k))[:, : x.shape[1]]
        data = process.data(predicted, x, k)
        if callback:
            callback(Step(num_steps - 1 - k, 1 - k / num_steps, process.time(k), x, data))
        before = process.alpha_bar_prev[k]
        std = eta * math.sqrt(process.betas[k] * (1 - before) / (1 - process.alpha_bar[k]))
        x = math.sqrt(before) * data + math.sqrt(1 - before - std**2) * predicted
        if eta > 0 and k > 0:
            x = x + std * randn_like(x)
    return x.to(noise.dtype)


def _check_noise(denoiser: Denoiser) -> None:
    if denoiser.prediction != "noise":
        raise UserError(
            f"The samplers ddpm and ddim need a network that predicts noise, but this one predicts "
            f"{denoiser.prediction}: choose euler, heun or euler_maruyama."
        )


def _halves(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    if output.shape[1] != 2 * x.shape[1]:
        raise UserError(
            f"DDPM needs {2 * x.shape[1]} output channels, noise and learned variance, but the network outputs "
            f"{output.shape[1]}: build it with learn_sigma=True."
        )
    noise, variance = output.chunk(2, dim=1)
    return noise, variance


def _normal_kl(mean1: Tensor, log_variance1: float | Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) per element, in nats."""
    log_ratio = log_variance1 - log_variance2
    return 0.5 * (torch.exp(log_ratio) - 1 - log_ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def _discretised_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the Gaussian's mass on the bin of half-width 1/255 around x, in nats; the bins beyond +-0.999 are open.

    Designed for pixels in [-1, 1] and without meaning for latents, but DiT was trained with it. The normal distribution
    function is the tanh approximation for the same reason.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    precision = torch.exp(-0.5 * log_variance)
    upper, lower = cdf((x - mean + 1 / 255) * precision), cdf((x - mean - 1 / 255) * precision)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -torch.log(mass.clamp(min=1e-12))
