"""Options that make a run fit in the memory of a device."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from repa.base.errors import UserError
from repa.models.config import FAMILIES, SIZES
from repa.performance.counts import activation_bytes
from repa.performance.estimate import Estimate, estimate


class MemoryOption(NamedTuple):
    """Options that make a run fit."""

    options: str
    needed: float
    """Bytes per device with these options."""
    price: str
    """Consequences of these options."""


def needed(estimated: Estimate, *, cached: bool = False) -> float:
    """Bytes per device, without the workspace of kernels."""
    return sum(estimated.memory(cached=cached).values())


def memory_options(estimated: Estimate, room: float, *, num_classes: int, resolution: int) -> list[MemoryOption]:
    """Changes that make the run fit in `room` bytes, first those that do not change the training; the mildest of each kind."""
    sparing = _with_settings(estimated, checkpoint_activations=True)
    dims = {name: encoder.dim for name, encoder in estimated.encoders.items()}
    sparing = replace(sparing, activations=activation_bytes(sparing.config, dims))
    ways = []
    if estimated.storable and estimated.encoders:
        names = " ".join(estimated.encoders)
        ways.append(
            MemoryOption(
                f"repa prepare ... --features {names}",
                needed(estimated, cached=True),
                "stored tokens instead of encoders in the step",
            )
        )
    if estimated.num_devices > 1 and estimated.parallel == "ddp":
        divided = _with_settings(estimated, parallel="fsdp")
        ways.append(
            MemoryOption("--parallel fsdp", needed(divided), "weights sharded over devices: more communication")
        )
    ways += _first_that_fits(_more_accumulation(estimated), room, "the same gradient, from micro-batches")
    ways.append(MemoryOption("--checkpoint-activations", needed(sparing), "a third more FLOPs"))
    # Two changes at once are offered only if no single one is enough: they cost more and hide which one helps.
    if not any(way.needed <= room for way in ways):
        both = ((f"--checkpoint-activations {options}", smaller) for options, smaller in _more_accumulation(sparing))
        ways += _first_that_fits(both, room, "both")
    ways += _first_that_fits(_smaller_batches(estimated), room, "changes the training: fewer images per step")
    ways = [way for way in ways if way.needed <= room]
    # Last: counting other networks takes seconds, and another network is the last resort.
    if not ways:
        ways += _first_that_fits(_smaller_models(estimated, num_classes, resolution), room, "another network")
    return ways


def _first_that_fits(tried: Iterator[tuple[str, Estimate]], room: float, price: str) -> list[MemoryOption]:
    ways = (MemoryOption(options, needed(smaller), price) for options, smaller in tried)
    return [way for way in ways if way.needed <= room][:1]


def _with_settings(estimated: Estimate, **changes: Any) -> Estimate:
    return replace(estimated, config=estimated.config.override(**changes))


def _more_accumulation(estimated: Estimate) -> Iterator[tuple[str, Estimate]]:
    images = estimated.config.batch_size // estimated.num_devices
    # Only divisors leave micro-batches of equal size; those above the root follow from those below.
    small = [parts for parts in range(1, math.isqrt(images) + 1) if images % parts == 0]
    for parts in sorted({*small, *(images // parts for parts in small)}):
        if parts > estimated.config.accumulate:
            try:
                smaller = _with_settings(estimated, accumulate=parts)
            except UserError:  # a loss compares the images of the whole batch
                return
            yield f"--accumulate {parts}", smaller


def _smaller_batches(estimated: Estimate) -> Iterator[tuple[str, Estimate]]:
    size = estimated.config.batch_size // 2
    while size and size % (estimated.num_devices * estimated.config.accumulate) == 0:
        yield f"--batch-size {size}", _with_settings(estimated, batch_size=size)
        size //= 2


def _smaller_models(estimated: Estimate, num_classes: int, resolution: int) -> Iterator[tuple[str, Estimate]]:
    """Smaller sizes of the same family and patch size, if the run names its network and the terms' blocks exist there."""
    model = estimated.config.model
    family, _, rest = model.name.partition("-")
    if family not in FAMILIES or model.hidden_dim or model.depth or model.num_heads:
        return
    size, _, patch = rest.partition("/")
    for smaller in reversed(list(SIZES)[: list(SIZES).index(size)]):
        name = f"{family}-{smaller}/{patch}"
        try:
            config = estimated.config.override(model=model.override(name=name))
            yield f"--model.name {name}", estimate(
                config, num_images=estimated.num_images, num_devices=estimated.num_devices, resolution=resolution,
                rate=estimated.rate, num_classes=num_classes,
            )  # fmt: skip
        except UserError:  # fewer blocks than the depth of a term
            return
