"""Guidances: combinations of predictions of the same x_t. Torch-free, so that a configuration is checked without torch.

Four extrapolate from a worse prediction through the better one, other + scale (conditional - other), and differ in the
worse prediction; the last follows a gradient. `chain.py` evaluates their predictions and applies them in order.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from repa.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CONDITIONAL, NULL = "conditional", "null"


@runtime_checkable
class Guidance(Protocol):
    """A combination of named predictions: "conditional", "null", "head@8" (of block 8), "weak" (another network), "routed",
    and "gradient", of an alignment towards a reference image."""

    def needs(self, t: float) -> frozenset[str]:
        """The predictions that `mix` reads at time t (0 data, 1 noise); {"conditional"} if it is off."""
        ...

    def mix(self, predictions: "dict[str, Tensor]", t: float) -> "Tensor":
        """The guided prediction: latents (N, C, H, W), and each stream (N, F) in a separate call."""
        ...


class Extrapolation:
    """other + scale (conditional - other) while low <= t <= high; elsewhere the conditional prediction.

    Every subclass repeats its settings: the registry reads them from its source, to check a spec without an import.
    """

    scale: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(
                f"A guidance needs 0 <= low <= high <= 1 in t (0 data, 1 noise), but got low={self.low:g} and "
                f"high={self.high:g}."
            )

    @property
    def other(self) -> str:
        """Name of the worse prediction."""
        raise NotImplementedError

    @property
    def changes(self) -> bool:
        """False if the scale is 1, which gives the conditional prediction at every t."""
        return self.scale != 1

    def active(self, t: float) -> bool:
        return self.changes and self.low <= t <= self.high

    def needs(self, t: float) -> frozenset[str]:
        return frozenset((CONDITIONAL, self.other)) if self.active(t) else frozenset((CONDITIONAL,))

    def mix(self, predictions: "dict[str, Tensor]", t: float) -> "Tensor":
        conditional = predictions[CONDITIONAL]
        if not self.active(t):
            return conditional
        other = predictions[self.other]
        return other + self.scale * (conditional - other)


@dataclass(frozen=True)
class ClassifierFree(Extrapolation):
    """Classifier-free guidance: away from the prediction without a condition (arXiv 2207.12598); low and high as in arXiv 2404.07724.

    `channels`: number of leading channels of the latents that are guided, 3 in DiT's and SiT's code; 0: all.
    `streams`: the scale of the vectors of streams (REG's cls-cfg-scale); None: the same scale.
    """

    other = NULL
    scale: NonNegativeFloat
    low: float = 0.0
    high: float = 1.0
    channels: NonNegativeInt = 0
    streams: NonNegativeFloat | None = None

    @property
    def changes(self) -> bool:
        return self.scale != 1 or self.streams not in (None, 1)

    def mix(self, predictions: "dict[str, Tensor]", t: float) -> "Tensor":
        conditional, is_stream = predictions[CONDITIONAL], predictions[CONDITIONAL].ndim == 2
        if not self.active(t):
            return conditional
        if is_stream and self.streams is not None:
            # REG guides the vectors of streams with another scale.
            return predictions[NULL] + self.streams * (conditional - predictions[NULL])
        mixed = super().mix(predictions, t)
        if self.channels and not is_stream:
            if self.channels > mixed.shape[1]:
                raise UserError(
                    f"The guidance has channels={self.channels}, but there are only {mixed.shape[1]}: choose fewer."
                )
            mixed[:, self.channels :] = conditional[:, self.channels :]
        return mixed


@dataclass(frozen=True)
class Internal(Extrapolation):
    """Internal guidance: away from the prediction of the network's own head at block `head` (arXiv 2512.24176), in the same pass."""

    head: PositiveInt
    scale: NonNegativeFloat
    low: float = 0.0
    high: float = 1.0

    @property
    def other(self) -> str:
        return f"head@{self.head}"

    def mix(self, predictions: "dict[str, Tensor]", t: float) -> "Tensor":
        # Heads predict only the latents; the vector of a stream stays the result of the previous guidances.
        is_stream = predictions[CONDITIONAL].ndim == 2
        return predictions[CONDITIONAL] if is_stream else super().mix(predictions, t)


@dataclass(frozen=True)
class Auto(Extrapolation):
    """Autoguidance: away from the prediction of a weaker network (arXiv 2406.02507), smaller or trained for fewer steps."""

    other = "weak"
    scale: NonNegativeFloat
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class PathDrop(Extrapolation):
    """Path-drop guidance: away from the prediction without a condition that skips the blocks of the route (arXiv 2510.21986)."""

    other = "routed"
    scale: NonNegativeFloat
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Representation(Extrapolation):
    """REPA-G (arXiv 2602.03753): towards the features of one image, by the gradient of an alignment's loss, v + scale d loss / d x_t.

    `term`: name of the run's alignment; empty: the only one. A velocity points to the noise and sampling runs against it, so
    that adding the gradient lowers the loss.
    """

    other = "gradient"
    scale: NonNegativeFloat
    low: float = 0.0
    high: float = 1.0
    term: str = ""

    @property
    def changes(self) -> bool:
        return self.scale != 0

    def mix(self, predictions: "dict[str, Tensor]", t: float) -> "Tensor":
        conditional = predictions[CONDITIONAL]
        return conditional + self.scale * predictions[self.other] if self.active(t) else conditional
