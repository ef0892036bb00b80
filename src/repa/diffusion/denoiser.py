"""Denoiser: what a sampler sees. It hides the network, its parameterisation, its dtype, the labels and the guidance."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repa.base.errors import UserError
from repa.diffusion.config import check_prediction
from repa.diffusion.flow import Coefficients, Interpolant
from repa.diffusion.predictions import SIGMA_MIN, convert


@dataclass(frozen=True)
class Denoiser:
    """A network on a path.

    Args:
        predict: (x_t (N, C, H, W), t (N,) float32) -> network output (N, C, H, W); a second half of the channels (a
            learned variance) is allowed and only `output` shows it. A `predict` whose attribute `takes_float_time` is
            true, as what `guided` returns, is given t as a Python float when the sampler has it as one: it can then
            choose what to compute without waiting for the device. Samplers keep their times as Python floats for this.
        path: the interpolant the network was trained on.
        prediction: what the output means, one of PREDICTIONS.
        dtype: of the x_t that the network receives. The state may be float64: outputs return to the state's dtype, and
            coefficients are computed in it.
        sigma_min: where sigma is held when a prediction of the data is divided by it.
        shift: the time shift that the network was trained with, which grids of samplers take over.

    In every method t is a Python float, a 0-dim tensor or an (N,) tensor. Each method makes exactly one network call.
    """

    predict: Callable[..., Tensor]
    path: Interpolant
    prediction: str = "velocity"
    dtype: torch.dtype = torch.float32
    sigma_min: float = SIGMA_MIN
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        if not callable(self.path):
            raise UserError(
                f"A Denoiser's path is an interpolant, such as PATHS.build('linear'), but got {self.path!r}."
            )

    def velocity(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """Eq. 3: dx_t/dt of the probability flow, shaped and typed like x_t."""
        return self._convert(self._prediction(x_t, t), x_t, self.coefficients(x_t, t), "velocity")

    def velocity_and_score(self, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Eqs. 3 and 7: velocity and score from one network call."""
        prediction, c = self._prediction(x_t, t), self.coefficients(x_t, t)
        return self._convert(prediction, x_t, c, "velocity"), self._convert(prediction, x_t, c, "score")

    def data(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The network's guess of the clean latents, E[x | x_t]."""
        return self._convert(self._prediction(x_t, t), x_t, self.coefficients(x_t, t), "data")

    def output(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """What the network itself answers, all its channels, in x_t's dtype."""
        # A time on the CPU is read without a wait; one on a GPU is not read here.
        if isinstance(t, Tensor) and t.ndim == 0 and t.device.type == "cpu":
            t = float(t)
        if isinstance(t, Tensor) or not getattr(self.predict, "takes_float_time", False):
            t = per_sample(t, x_t)  # (N,)
        # The state may be float64, networks are not; the step is then taken in the state's precision again.
        return self.predict(x_t.to(self.dtype), t).to(x_t.dtype)

    def coefficients(self, x_t: Tensor, t: float | Tensor) -> Coefficients:
        """The path at t. A single time stays a 0-dim tensor on the CPU, which multiplies tensors on any device."""
        # At least float32: in half precision neighbouring times of a fine grid are the same number.
        t = torch.as_tensor(t, dtype=torch.promote_types(x_t.dtype, torch.float32))
        return self.path(t if t.ndim == 0 else t.to(x_t.device))

    def _prediction(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        output, channels = self.output(x_t, t), x_t.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise UserError(
                f"The network answers {output.shape[1]} channels for {channels}: it must answer as many, or twice as "
                "many with a learned variance."
            )
        return output[:, :channels]

    def _convert(self, prediction: Tensor, x_t: Tensor, c: Coefficients, wanted: str) -> Tensor:
        return convert(prediction, x_t, c, self.prediction, wanted, self.sigma_min).to(x_t.dtype)


class CountedCalls:
    """A network (or what `guided` returns) that counts its calls; see `count_calls`."""

    def __init__(self, predict: Callable[..., Tensor]):
        self.predict = predict
        # Handed on, so that counting does not change how times reach the network.
        self.takes_float_time = getattr(predict, "takes_float_time", False)
        self.calls = 0

    def __call__(self, *arguments: object) -> Tensor:
        self.calls += 1
        return self.predict(*arguments)


def count_calls(predict: Callable[..., Tensor]) -> CountedCalls:
    """`predict`, counting a sampler's function evaluations (NFE): `f = count_calls(f); Denoiser(f, ...); f.calls`.

    Around `guided`, a guided evaluation counts once, as papers count.
    """
    return CountedCalls(predict)


def per_sample(t: float | Tensor, x: Tensor) -> Tensor:
    """What networks take: (N,) times in float32 on x's device, from a Python float, a 0-dim or an (N,) tensor."""
    if not isinstance(t, Tensor):
        return torch.full((len(x),), t, dtype=torch.float32, device=x.device)
    if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x)):
        raise UserError(f"t has shape {tuple(t.shape)}, but must be one time for all or one per sample, ({len(x)},).")
    return t.to(x.device, torch.float32).expand(len(x))
