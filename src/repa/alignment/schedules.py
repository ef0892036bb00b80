"""Multiplier of an alignment's weight at a training step: f(step, **settings) -> float in [0, 1]. Plain Python, no torch.

A schedule that depends on how training goes is an object with `watches`, `observe`, `state` and `load` besides: see `Plateau`.

Steps are optimiser steps, counted from 0.
"""

import math
from collections.abc import Mapping

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt


def constant(now: int, /) -> float:
    """The paper's choice: 1 throughout."""
    return 1.0


def stop(now: int, /, *, step: PositiveInt = 250_000) -> float:
    """1 before `step`, 0 from it on, where the encoder no longer runs (HASTE, arXiv 2505.16792: 250,000 for XL)."""
    return 1.0 if now < step else 0.0


def warmup(now: int, /, *, steps: PositiveInt = 50_000) -> float:
    """From 0 at step 0 up a straight line to 1 at `steps` (REED, arXiv 2507.08980: of the denoising loss)."""
    return min(1.0, now / steps)


def linear(now: int, /, *, steps: PositiveInt = 400_000) -> float:
    """From 1 at step 0 down a straight line to 0 at `steps`."""
    return max(0.0, 1.0 - now / steps)


def cosine(now: int, /, *, steps: PositiveInt = 400_000) -> float:
    """From 1 at step 0 down half a cosine to 0 at `steps`."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, now / steps)))


def exponential(now: int, /, *, start: NonNegativeInt = 750_000, steps: PositiveInt = 5_000_000) -> float:
    """1 until `start`, then a tenth for every `steps` (SRA, arXiv 2505.02831: from epoch 149, a tenth in 1,000 epochs)."""
    return 0.1 ** (max(0, now - start) / steps)


class Plateau:
    """1 until the term's loss stops falling, 0 from then on; HASTE (arXiv 2505.16792) sets this step by hand.

    The loss is looked at a hundred times in `span` steps. When its mean over a span is not at least `gain` below that of
    the span before, the term has stopped. The training loop tells it the losses and keeps its state in checkpoints.
    """

    def __init__(self, *, span: PositiveInt = 10_000, gain: NonNegativeFloat = 0.002):
        self.span, self.gain, self.every = span, gain, max(1, span // 100)
        self.total, self.count, self.before, self.stopped = 0.0, 0, math.inf, False

    def __call__(self, now: int, /) -> float:
        return 0.0 if self.stopped else 1.0

    def watches(self, step: int) -> bool:
        """Whether it wants the loss of the step that was just done, counted from 1."""
        return not self.stopped and step % self.every == 0

    def observe(self, step: int, loss: float) -> None:
        """The term's mean loss over the global batch; one that is not finite is passed over."""
        if math.isfinite(loss):
            self.total, self.count = self.total + loss, self.count + 1
        if step // self.span != (step - self.every) // self.span and self.count:
            mean = self.total / self.count
            self.stopped = self.before - mean < self.gain
            self.before, self.total, self.count = mean, 0.0, 0

    def state(self) -> dict[str, float]:
        """What a checkpoint holds; `before` is left out until there is one, as a file of plain numbers holds no infinity."""
        before = {} if math.isinf(self.before) else {"before": self.before}
        return {"total": self.total, "count": self.count, "stopped": self.stopped, **before}

    def load(self, state: Mapping[str, float]) -> None:
        self.total, self.count, self.stopped = state["total"], int(state["count"]), bool(state["stopped"])
        self.before = state.get("before", math.inf)
