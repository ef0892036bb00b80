"""A network called with plain tensors, as most tests have them."""

from types import SimpleNamespace

from torch import Tensor

from repa.models import Backbone, Condition, Tap


def call(model: Backbone, x_t: Tensor, t: Tensor, labels: Tensor, taps: tuple[int, ...] = ()) -> SimpleNamespace:
    """`prediction` of x and `hidden` states by depth, of a network that noises nothing but latents."""
    output = model({"x": x_t}, t, Condition(labels), tuple(map(Tap, taps)))
    return SimpleNamespace(
        prediction=output.prediction["x"], hidden={tap.depth: value for tap, value in output.taps.items()}
    )
