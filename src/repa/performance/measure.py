"""Timing of a training step on this machine, compared with the time of its matrix products, with advice on what to change.

The step uses the code of the loop: `EncoderFeatures.iterate`, `loop.backward`, `update.update`.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from repa.base.device import peak_memory, timed
from repa.base.files import size
from repa.data import Batch
from repa.encoders.contract import Features
from repa.performance.batches import BatchSource, latents
from repa.performance.counts import flops_per_image
from repa.training import loop
from repa.training.config import TrainConfig
from repa.training.parallel import wrapped
from repa.training.state import build_state
from repa.training.update import update

PARTS = ("encoder", "network", "optimizer", "averages", "data")
STEPS_TIMED = {"cpu": 1, "cuda": 10}  # steps per measurement; each measurement synchronises with the device
HEAD = ("model", "features", "batch", "precision", "step", "s/step", "images/s", "MFU", "memory", *PARTS)
WORTH = 1.03  # smallest speed-up of a suggested change: less is within the noise


@dataclass(frozen=True)
class Measurement:
    """One way to run the step, measured."""

    model: str
    features: str
    """Source of the encoders' features: online, cached or none."""
    batch_size: int
    precision: str
    compiled: bool
    seconds: float
    """Of one step."""
    floor: float
    """Seconds of the matrix products alone, at the measured rate: network and projectors, forward and backward."""
    peak_memory: int | None
    """Bytes on a CUDA device; None elsewhere."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds per element of PARTS, each synchronised; their sum exceeds `seconds` if they overlap."""
    encoder_floor: float = 0.0
    """Seconds of the matrix products of encoders that run in the step, at the measured rate."""
    first_seconds: float = 0.0
    """Seconds of the first step, which compiles and fills caches."""
    reserved_memory: int | None = None
    """Bytes that PyTorch reserved on a CUDA device, of which at most `peak_memory` were in use."""

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds

    @property
    def utilisation(self) -> float:
        """Share of the machine's measured matrix-product rate that network and projectors reach."""
        return self.floor / self.seconds

    @property
    def utilisation_with_encoder(self) -> float:
        """The same including the encoders that run in the step: the load of the device, not the gain of the network."""
        return (self.floor + self.encoder_floor) / self.seconds

    def share(self, part: str) -> float:
        return self.parts[part] / sum(self.parts.values())

    def row(self) -> dict[str, Any]:
        names = ("images_per_second", "utilisation", "utilisation_with_encoder")
        return {**vars(self), **{name: getattr(self, name) for name in names}}


class MeasuredStep:
    """A training step on batches of a source, complete and in parts."""

    def __init__(self, config: TrainConfig, source: BatchSource, device: torch.device):
        self.config, self.source, self.device = config, source, device
        self.state = build_state(config, dict(source.dims), device)
        self.module = wrapped(self.state.objective, config, device)
        self.groups = self.state.objective.clipping_groups()

    def __call__(self) -> None:
        self.backward(*next(self.source.feed))
        self.advance()

    def backward(self, batch: Batch, features: Mapping[str, Features]) -> None:
        clean = self.state.objective.clean(latents(batch, self.config.model.latent_channels), features)
        condition = self.state.model.completed(self.source.condition(batch))
        loop.backward(self.state, self.module, clean, condition, features)

    def advance(self) -> None:
        update(self.state, self.groups)

    def average(self) -> None:
        """Only the averages' part of `advance`."""
        never = torch.zeros((), device=self.device)  # skip: no update was refused
        for average in self.state.averages.values():
            average.update(self.state.step, never)

    def parts(self) -> dict[str, float]:
        """Seconds of each of PARTS, run one after the other: nothing is read or computed ahead."""
        made: dict[str, Any] = {}
        seconds = {
            "data": timed(lambda: made.update(batch=self.source.data()), self.device),
            "encoder": timed(lambda: made.update(features=self.source.encode(made["batch"])), self.device),
            "network": timed(lambda: self.backward(made["batch"], made["features"]), self.device),
            "optimizer": timed(self.advance, self.device),
            "averages": timed(self.average, self.device),
        }
        # `advance` includes the averages; timing noise may make the difference negative.
        seconds["optimizer"] = max(0.0, seconds["optimizer"] - seconds["averages"])
        return {part: seconds[part] for part in PARTS}


def measure(step: MeasuredStep, rates: Mapping[str, float], rounds: int) -> Measurement:
    """Time a step, complete and in parts, after one warm-up step (which compiles and fills caches).

    Args:
        rates: FLOP/s of matrix products by precision, from `product_rate`.
        rounds: number of measurements, of which the median is reported.
    """
    config, device, source = step.config, step.device, step.source
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # The first step compiles and fills caches: it is reported separately and is not part of the median.
    first = timed(step, device)
    steps = STEPS_TIMED[device.type]

    def run() -> None:
        for _ in range(steps):
            step()

    seconds = statistics.median(timed(run, device) / steps for _ in range(rounds))
    memory = peak_memory(device) if device.type == "cuda" else None
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    # After the complete step, which has warmed up their kernels.
    parts = [step.parts() for _ in range(max(1, rounds // 2))]
    of_one = config.batch_size / rates[config.precision]
    medians = {name: statistics.median(p[name] for p in parts) for name in PARTS}
    return Measurement(
        config.model.name, source.where, config.batch_size, config.precision, config.compile, seconds,
        of_one * flops_per_image(config, source.dims), memory, medians, of_one * source.encoder_flops, first, reserved,
    )  # fmt: skip


class Advice(NamedTuple):
    """A change and its speed-up: measured, or an upper bound if a part disappears."""

    gain: float
    sentence: str


def table(figures: Sequence[Measurement]) -> str:
    """A Markdown table, one row per measurement; the parts are shares of their sum."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for f in figures:
        memory = "" if f.peak_memory is None else size(f.peak_memory)
        cells = (
            f.model, f.features, str(f.batch_size), f.precision, "compiled" if f.compiled else "eager", f"{f.seconds:.3f}",
            f"{f.images_per_second:.1f}", f"{f.utilisation:.0%}", memory, *(f"{f.share(part):.0%}" for part in PARTS),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def advise(now: Measurement, others: Sequence[Measurement]) -> list[Advice]:
    """Changes that make the step `now` faster, the largest first; empty if no measured change does."""
    found = [_advise_settings(now, other) for other in others if other.images_per_second > now.images_per_second]
    found += [
        part
        for part in (_advise_stored_features(now), _advise_faster_disk(now), _advise_larger_batch(now))
        if part is not None
    ]
    return sorted((advice for advice in found if advice.gain >= WORTH), reverse=True)


def _advise_settings(now: Measurement, other: Measurement) -> Advice:
    changes = []
    if other.precision != now.precision:
        changes.append(f"--precision {other.precision}")
    if other.compiled != now.compiled:
        changes.append(f"--compile {str(other.compiled).lower()}")
    if other.batch_size != now.batch_size:
        changes.append(f"--batch-size {other.batch_size} (which changes the training too)")
    gain = other.images_per_second / now.images_per_second
    return Advice(
        gain,
        f"{' '.join(changes)}: {gain:.2f} times as many images per second, {other.images_per_second:.1f} instead of "
        f"{now.images_per_second:.1f}.",
    )


def _advise_stored_features(now: Measurement) -> Advice | None:
    share = now.share("encoder")
    if now.features != "online":
        return None
    return Advice(
        1 / (1 - share),
        f"Store the target tokens, `repa prepare ... --features`: the encoder takes {share:.0%} of the step.",
    )


def _advise_faster_disk(now: Measurement) -> Advice | None:
    computing = sum(now.parts.values()) - now.parts["data"]
    # If reading keeps up, it overlaps with the computation, and a faster disk gains nothing.
    if now.parts["data"] <= computing:
        return None
    return Advice(
        now.parts["data"] / computing,
        f"Move the data to a faster or local disk: reading a batch takes {now.parts['data']:.3f} s, computing its step "
        f"{computing:.3f} s.",
    )


def _advise_larger_batch(now: Measurement) -> Advice | None:
    share = now.share("optimizer") + now.share("averages")
    return Advice(
        # A batch of twice the size needs half as many updates for the same images, which saves half of their share.
        1 / (1 - share / 2),
        f"Double the --batch-size (which changes the training too): optimizer and averages take {share:.0%} of a step of "
        f"{now.batch_size} images, and no longer with more images.",
    )
