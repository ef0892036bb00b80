"""Multiplier of an alignment's weight at a training step: f(step, **settings) -> float in [0, 1]. Plain Python, no torch.

Steps are optimiser steps, counted from 0; settings that are no whole number of at least 1 raise UserError.
"""

import math

from repa.base.errors import UserError


def constant(now: int, /) -> float:
    """The paper's choice: 1 throughout."""
    return 1.0


def stop(now: int, /, *, step: int = 250_000) -> float:
    """1 before `step`, 0 from it on, which spares running the encoder (HASTE, arXiv 2505.16792: 250 000 for XL)."""
    return 1.0 if now < _positive("stop", "step", step) else 0.0


def linear(now: int, /, *, steps: int = 400_000) -> float:
    """From 1 at step 0 down a straight line to 0 at `steps`."""
    return max(0.0, 1.0 - now / _positive("linear", "steps", steps))


def cosine(now: int, /, *, steps: int = 400_000) -> float:
    """From 1 at step 0 down half a cosine to 0 at `steps`."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, now / _positive("cosine", "steps", steps))))


def _positive(schedule: str, name: str, value: int) -> int:
    if type(value) is not int or value < 1:
        raise UserError(
            f"The weight schedule {schedule!r} needs a whole number of steps >= 1 as {name!r}, but got {value!r}."
        )
    return value
