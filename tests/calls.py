"""Calls networks with plain tensors."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from repa.models import Backbone, Condition, Tap


def call(model: Backbone, x_t: Tensor, t: Tensor, labels: Tensor, taps: tuple[int, ...] = ()) -> SimpleNamespace:
    """`prediction` of x and `hidden` states by depth, for a network whose state is only latents."""
    output = model({"x": x_t}, t, model.completed(Condition(labels)), tuple(map(Tap, taps)))
    return SimpleNamespace(
        prediction=output.prediction["x"], hidden={tap.depth: value for tap, value in output.taps.items()}
    )


def passes(network: Callable[..., Tensor], labels: Tensor, null_label: int) -> Callable[..., dict[str, Tensor]]:
    """Wrap a network (x_t, t, labels) without heads as (x_t, t, names) -> predictions, both passes in one batch."""

    def evaluate(x_t: Tensor, t: Tensor, names: frozenset[str]) -> dict[str, Tensor]:
        asked = sorted(names)  # conditional, null
        rows = {"conditional": labels, "null": torch.full_like(labels, null_label)}
        output = network(
            torch.cat([x_t] * len(asked)), torch.cat([t] * len(asked)), torch.cat([rows[name] for name in asked])
        )
        return dict(zip(asked, output.chunk(len(asked)), strict=True))

    return evaluate
