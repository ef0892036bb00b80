"""What a sampler sees: one tensor as state, and a Denoiser, which hides network, parameterisation, dtype, labels and guidance."""

import math
from collections.abc import Callable, Mapping
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
                f"The network outputs {output.shape[1]} channels for {channels}: it must output as many, or twice as "
                "many with a learned variance."
            )
        return output[:, :channels]

    def _convert(self, prediction: Tensor, x_t: Tensor, c: Coefficients, wanted: str) -> Tensor:
        return convert(prediction, x_t, c, self.prediction, wanted, self.sigma_min).to(x_t.dtype)


class CountedCalls:
    """A network that counts a sampler's function evaluations (NFE): `f = CountedCalls(f); Denoiser(f, ...); f.calls`.

    Around what `guided` returns, a guided evaluation counts once, as papers count.
    """

    def __init__(self, predict: Callable[..., Tensor]):
        self.predict = predict
        # Handed on, so that counting does not change how times reach the network.
        self.takes_float_time = getattr(predict, "takes_float_time", False)
        self.calls = 0

    def __call__(self, *arguments: object) -> Tensor:
        self.calls += 1
        return self.predict(*arguments)


def per_sample(t: float | Tensor, x: Tensor) -> Tensor:
    """What networks take: (N,) times in float32 on x's device, from a Python float, a 0-dim or an (N,) tensor."""
    if not isinstance(t, Tensor):
        return torch.full((len(x),), t, dtype=torch.float32, device=x.device)
    if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x)):
        raise UserError(f"t has shape {tuple(t.shape)}, but must be one time for all or one per sample, ({len(x)},).")
    return t.to(x.device, torch.float32).expand(len(x))


class Layout:
    """How the parts of a state are packed into one tensor.

    Args:
        shapes: of each part without N, as `Backbone.state_shapes`: {"x": (C, H, W)}, or with vectors {"x": ..., "class": (F,)}.

    Attributes:
        shape: of the one tensor, without N: that of the part where there is one, else (C H W + F,).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        if not shapes:
            raise UserError("A layout needs at least one part.")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.shape = next(iter(self.shapes.values())) if len(sizes) == 1 else (sum(sizes),)
        self._sizes = sizes

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Parts (N, *shape) as one tensor (N, *self.shape), in the order of the shapes."""
        for name, shape in self.shapes.items():
            if name not in parts or tuple(parts[name].shape[1:]) != shape:
                found = tuple(parts[name].shape) if name in parts else "nothing"
                raise UserError(
                    f"The part {name!r} of a state has shape (N, {', '.join(map(str, shape))}), but got {found}."
                )
        # Latents alone keep their shape, so that samplers and callbacks see images and not flat vectors.
        if len(self.shapes) == 1:
            return parts[next(iter(self.shapes))]
        return torch.cat([parts[name].flatten(1) for name in self.shapes], dim=1)

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts (N, *shape) of one tensor (N, *self.shape); views where that is possible."""
        if tuple(flat.shape[1:]) != self.shape:
            raise UserError(
                f"A state of {', '.join(self.shapes)} has shape (N, {', '.join(map(str, self.shape))}), but got {tuple(flat.shape)}."
            )
        if len(self.shapes) == 1:
            return {next(iter(self.shapes)): flat}
        pieces = flat.split(self._sizes, dim=1)
        return {
            name: piece.unflatten(1, shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
