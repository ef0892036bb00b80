"""The interface of samplers: one state tensor, and a Denoiser that hides network, parameterisation, dtype, labels and guidance."""

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
        predict: (x_t (N, C, H, W), t (N,)) -> network output (N, C, H, W); a second half of the channels (a
            learned variance) is allowed and only `output` returns it. If `predict` has a true attribute `takes_float_time`,
            like the function that `guided` returns, a Python float t is passed as it is: `predict` can then choose what to
            compute without a device synchronisation. For this reason samplers keep times as Python floats.
        path: the interpolant the network was trained on.
        prediction: meaning of the output, one of PREDICTIONS.
        dtype: dtype of the network's x_t. The state may be float64: outputs are converted to the state's dtype, in which
            coefficients are computed.
        sigma_min: lower bound of sigma where a data prediction is divided by it.
        shift: the time shift of the training, which samplers' grids use too.

    In every method t is a Python float, a 0-dim tensor or an (N,) tensor. Each method calls the network exactly once.
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
                f"A Denoiser's path must be an interpolant, such as PATHS.build('linear'), but got {self.path!r}."
            )

    def velocity(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """Eq. 3: dx_t/dt of the probability flow, shaped and typed like x_t."""
        return self._convert(self._prediction(x_t, t), x_t, self.coefficients(x_t, t), "velocity")

    def velocity_and_score(self, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Eqs. 3 and 7: velocity and score from one network call."""
        prediction, c = self._prediction(x_t, t), self.coefficients(x_t, t)
        return self._convert(prediction, x_t, c, "velocity"), self._convert(prediction, x_t, c, "score")

    def data(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The network's estimate of the clean latents, E[x | x_t]."""
        return self._convert(self._prediction(x_t, t), x_t, self.coefficients(x_t, t), "data")

    def output(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The network's raw output, all channels, in x_t's dtype."""
        # Reading a time on the CPU needs no synchronisation; a time on a GPU is not read here.
        if isinstance(t, Tensor) and t.ndim == 0 and t.device.type == "cpu":
            t = float(t)
        # The state may be float64 but networks are not; the step itself is computed in the state's precision.
        x = x_t.to(self.dtype)
        if isinstance(t, Tensor) or not getattr(self.predict, "takes_float_time", False):
            t = per_sample(t, x)  # (N,)
        return self.predict(x, t).to(x_t.dtype)

    def coefficients(self, x_t: Tensor, t: float | Tensor) -> Coefficients:
        """The path at t. A single time stays a 0-dim tensor on the CPU, which multiplies tensors on any device."""
        # At least float32: in half precision neighbouring times of a fine grid are equal.
        t = torch.as_tensor(t, dtype=torch.promote_types(x_t.dtype, torch.float32))
        return self.path(t if t.ndim == 0 else t.to(x_t.device))

    def _prediction(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        output, channels = self.output(x_t, t), x_t.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise UserError(
                f"The network outputs {output.shape[1]} channels for {channels}: it must output the same number, or twice "
                "that with a learned variance."
            )
        return output[:, :channels]

    def _convert(self, prediction: Tensor, x_t: Tensor, c: Coefficients, wanted: str) -> Tensor:
        return convert(prediction, x_t, c, self.prediction, wanted, self.sigma_min).to(x_t.dtype)


class CountedCalls:
    """A network that counts a sampler's function evaluations (NFE): `f = CountedCalls(f); Denoiser(f, ...); f.calls`.

    Around the function that `guided` returns, a guided evaluation counts once, as in papers.
    """

    def __init__(self, predict: Callable[..., Tensor]):
        self.predict = predict
        # Passed on, so that counting does not change the form of the times.
        self.takes_float_time = getattr(predict, "takes_float_time", False)
        self.calls = 0

    def __call__(self, *arguments: object) -> Tensor:
        self.calls += 1
        return self.predict(*arguments)


def per_sample(t: float | Tensor, x: Tensor) -> Tensor:
    """Times for networks: (N,) on x's device, float64 for a float64 x, otherwise float32. t: a number, or a 0-dim or (N,) tensor."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(t, Tensor):
        return torch.full((len(x),), t, dtype=dtype, device=x.device)
    if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x)):
        raise UserError(f"t has shape {tuple(t.shape)}, but must be a single time or one per sample, ({len(x)},).")
    return t.to(x.device, dtype).expand(len(x))


class Layout:
    """How the parts of a state are packed into one tensor.

    Args:
        shapes: shape of each part without N, as in `Backbone.state_shapes`: {"x": (C, H, W)}, or {"x": ..., "class": (F,)}.

    Attributes:
        shape: shape of the packed tensor, without N: that of the only part, or (C H W + F,) for several.
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
        # Latents alone keep their shape, so that samplers and callbacks receive images, not flat vectors.
        if len(self.shapes) == 1:
            return parts[next(iter(self.shapes))]
        return torch.cat([parts[name].flatten(1) for name in self.shapes], dim=1)

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts (N, *shape) of one tensor (N, *self.shape); views if possible."""
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
