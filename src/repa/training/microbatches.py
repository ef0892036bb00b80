"""The gradient of a step, computed at once or in equal parts that need less memory (gradient accumulation)."""

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from repa.base.errors import UserError
from repa.base.precision import autocast
from repa.encoders.contract import Features
from repa.models.contract import Condition, Output, State
from repa.training.objective import Draws, Losses, rows_of
from repa.training.parallel import without_reduction


def check_parts(batch_size: int, world: int, accumulate: int) -> None:
    """Raises UserError unless every process can cut its share of the batch into equal parts."""
    parts = world * accumulate
    if batch_size % parts:
        raise UserError(
            f"A batch of {batch_size} images cannot be cut into {parts} equal parts (processes: {world}, accumulate: "
            f"{accumulate}): choose a --batch-size that is a multiple of {parts}, or another --accumulate."
        )


def backward(
    objective: nn.Module, clean: State, condition: Condition, features: Mapping[str, Features], draws: Draws,
    weights: Tensor, *, accumulate: int, precision: str, scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
    averaged: Callable[[State, Condition, Draws], Output | None] = lambda *_: None,
) -> Losses:  # fmt: skip
    """Add the gradient of the mean loss of N rows to the parameters; returns the detached losses of all rows.

    The rows are taken in `accumulate` equal parts. Each adds its share of the mean, so the gradient is that of all rows.
    `scaled` gets what is differentiated (loss scaling of fp16); `averaged` runs the averaged network on a part.
    """
    num, device = len(draws.dropped), draws.dropped.device
    size = num // accumulate
    parts = []
    for start in range(0, num, size):
        rows = slice(start, start + size)
        last = start + size == num
        part = rows_of(clean, rows), condition.rows(rows), draws.rows(rows)
        with contextlib.nullcontext() if last else without_reduction(objective):
            with autocast(device, precision):
                seen = {name: f.map(lambda x, rows=rows: x[rows]) for name, f in features.items()}
                losses = objective(part[0], part[1], seen, part[2], weights, averaged(*part))
            scaled(losses.total.mean() / accumulate).backward()
        parts.append(Losses(losses.total.detach(), losses.terms))
    return Losses(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
    )
