"""Multipliers of an alignment: of its weight by the training step, of an image's loss by its time.

Of the weight: f(step, **settings) -> float in [0, 1]; steps are optimiser steps, counted from 0. A schedule that depends on
the loss is an object that also has `watches`, `observe`, `state` and `load`: see `Plateau`.

Of a loss: f(t (N,), **settings) -> (N,), t = 0 is data, 1 noise (REED, arXiv 2507.08980). Each image's loss is multiplied by
the weight of its own time. REED's released code multiplies the mean of the losses by the mean of the weights, by a broadcast
of (N, 1, 1, 1) with (N,).
"""

import math
from collections.abc import Mapping

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor


def constant(now: int, /) -> float:
    """The paper's choice: 1 throughout."""
    return 1.0


def stop(now: int, /, *, step: PositiveInt = 250_000) -> float:
    """1 before `step`, then 0; the encoder no longer runs (HASTE, arXiv 2505.16792: 250,000 for XL)."""
    return 1.0 if now < step else 0.0


def warmup(now: int, /, *, steps: PositiveInt = 50_000) -> float:
    """Linear from 0 at step 0 to 1 at `steps` (REED, arXiv 2507.08980: of the denoising loss)."""
    return min(1.0, now / steps)


def linear(now: int, /, *, steps: PositiveInt = 400_000) -> float:
    """Linear from 1 at step 0 to 0 at `steps`."""
    return max(0.0, 1.0 - now / steps)


def cosine(now: int, /, *, steps: PositiveInt = 400_000) -> float:
    """Half a cosine from 1 at step 0 to 0 at `steps`."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, now / steps)))


def exponential(now: int, /, *, start: NonNegativeInt = 750_000, steps: PositiveInt = 5_000_000) -> float:
    """1 until `start`, then a tenth for every `steps` (SRA, arXiv 2505.02831: from epoch 149, a tenth in 1,000 epochs)."""
    return 0.1 ** (max(0, now - start) / steps)


class Plateau:
    """1 until the term's loss stops falling, then 0; HASTE (arXiv 2505.16792) chooses this step manually.

    The loss is sampled a hundred times in `span` steps. The term stops when the mean over a span is not at least `gain` below
    the mean of the previous span. The training loop passes the losses and stores the state in checkpoints.
    """

    def __init__(self, *, span: PositiveInt = 10_000, gain: NonNegativeFloat = 0.002):
        self.span, self.gain, self.every = span, gain, max(1, span // 100)
        self.total, self.count, self.before, self.stopped = 0.0, 0, math.inf, False

    def __call__(self, now: int, /) -> float:
        return 0.0 if self.stopped else 1.0

    def watches(self, step: int) -> bool:
        """Whether it needs the loss of the step that was just completed, counted from 1."""
        return not self.stopped and step % self.every == 0

    def observe(self, step: int, loss: float) -> None:
        """Record the term's mean loss over the global batch; a non-finite loss is ignored."""
        if math.isfinite(loss):
            self.total, self.count = self.total + loss, self.count + 1
        if step // self.span != (step - self.every) // self.span and self.count:
            mean = self.total / self.count
            self.stopped = self.before - mean < self.gain
            self.before, self.total, self.count = mean, 0.0, 0

    def state(self) -> dict[str, float]:
        """The state in a checkpoint; `before` is left out while it is infinite, because JSON has no infinity."""
        before = {} if math.isinf(self.before) else {"before": self.before}
        return {"total": self.total, "count": self.count, "stopped": self.stopped, **before}

    def load(self, state: Mapping[str, float]) -> None:
        self.total, self.count, self.stopped = state["total"], int(state["count"]), bool(state["stopped"])
        self.before = state.get("before", math.inf)


def constant_in_time(t: Tensor) -> Tensor:
    """1 at every time."""
    return torch.ones_like(t)


def linear_in_time(t: Tensor) -> Tensor:
    """1 - t: decreases with noise."""
    return 1 - t


def loglinear(t: Tensor) -> Tensor:
    """1 - log(1 + t): falls more slowly than linear, to 0.31."""
    return 1 - torch.log1p(t)


def cosine_in_time(t: Tensor) -> Tensor:
    """cos(pi t / 2)^2: from 1 to 0, flat at both ends."""
    return (0.5 * math.pi * t).cos().square()


def sigmoid(t: Tensor, *, slope: PositiveFloat = 10.0) -> Tensor:
    """1 / (1 + exp(slope (t - 0.5))): a smooth step down at t = 0.5."""
    return torch.sigmoid(slope * (0.5 - t))
