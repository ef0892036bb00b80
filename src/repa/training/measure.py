"""What a training step costs on this machine, against what its matrix products alone would: `repa bench`, benchmarks/.

The step is the loop's own: `Targets.along`, `microbatches.backward`, clipping, `TrainState.advance`.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repa.alignment import Alignment
from repa.base.precision import DTYPES
from repa.data import Batch
from repa.data.manifest import FeatureField
from repa.encoders.contract import Features
from repa.models import build
from repa.training.config import TrainConfig
from repa.training.meters import peak_memory
from repa.training.microbatches import backward
from repa.training.objective import Draws, Objective
from repa.training.parallel import running
from repa.training.state import build_state

PARTS = ("teacher", "student", "optimizer", "averages", "data")
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is timed: large enough for the full rate
STEPS_TIMED = {"cpu": 1, "cuda": 10}  # steps between two looks at the clock, which waits for the device

Feed = Iterator[tuple[Batch, dict[str, Features]]]  # what `Targets.along` gives


@dataclass(frozen=True)
class Figures:
    """One way to run the step, measured."""

    model: str
    teacher: str
    """online, cached or none: where target tokens came from."""
    batch_size: int
    precision: str
    compiled: bool
    seconds: float
    """Of one step."""
    floor: float
    """Of its matrix products alone, at the measured rate: those of network and projectors, forward and backward."""
    peak_memory: int | None
    """Bytes on a CUDA device; None elsewhere, where the process counts as a whole."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds by name of PARTS, each waited for; their sum exceeds `seconds` where they overlap."""

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds

    @property
    def utilisation(self) -> float:
        """Share of the machine's measured matrix-product rate that goes into network and projectors."""
        return self.floor / self.seconds

    def share(self, part: str) -> float:
        return self.parts[part] / sum(self.parts.values())

    def row(self) -> dict[str, Any]:
        return {**vars(self), "images_per_second": self.images_per_second, "utilisation": self.utilisation}


@dataclass(frozen=True)
class Synthetic:
    """Stands where prepared data would, for `Targets`: random latents and images in memory, and tokens of these widths."""

    widths: Mapping[str, int]
    grid: int
    has_images: bool = True
    has_moments: bool = True
    folder: str = "(random)"

    @property
    def features(self) -> dict[str, FeatureField]:
        return {
            name: FeatureField(dim=width, grid=self.grid, pooled=False, identity={})
            for name, width in self.widths.items()
        }

    def batch(self, config: TrainConfig, device: torch.device, resolution: int) -> Batch:
        num, side, channels = config.batch_size, config.model.latent_size, config.model.latent_channels
        stream = torch.Generator().manual_seed(0)
        moments = torch.randn(num, 2 * channels, side, side, generator=stream)
        images = torch.randint(256, (num, 3, resolution, resolution), generator=stream, dtype=torch.uint8)
        labels = torch.randint(max(1, config.model.num_classes), (num,), generator=stream)
        tokens = {
            name: Features(torch.randn(num, self.grid**2, width, generator=stream).to(device), None)
            for name, width in self.widths.items()
        }
        return Batch(labels.to(device), images.to(device), moments.to(device), tokens)


class Step:
    """A training step, whole and in parts. `feed` gives each its batch and tokens."""

    def __init__(self, config: TrainConfig, dims: Mapping[str, int], feed: Feed, device: torch.device):
        self.config, self.feed, self.device = config, feed, device
        self.state = build_state(config, dict(dims), device)
        self.objective = running(self.state.objective, config, device)
        self.groups = self.state.objective.trained_groups()

    def __call__(self) -> None:
        self.student(*next(self.feed))
        self.advance()

    def student(self, batch: Batch, features: Mapping[str, Features]) -> None:
        x, objective, step = latents(batch), self.state.objective, self.state.step
        draws, weights = objective.draw(x, step), objective.weights(step, self.device)
        backward(
            self.objective, x, batch.labels, features, draws, weights,
            accumulate=self.config.accumulate, precision=self.config.precision, scaled=self.state.guard.scaled,
        )  # fmt: skip

    def advance(self) -> None:
        self.state.guard.unscale(self.state.objective.parameters())
        limit = self.config.optimizer.max_grad_norm
        self.state.advance([nn.utils.clip_grad_norm_(group, limit) for group in self.groups])

    def average(self) -> None:
        """The averages' part of `advance` once more."""
        never = torch.zeros((), device=self.device)
        for average in (self.state.ema, *self.state.averages.values()):
            average.update(self.state.step, never)

    def parts(self, data: Callable[[], Batch], teacher: Callable[[Batch], Mapping[str, Features]]) -> dict[str, float]:
        """Seconds of each of PARTS, which here run one after the other: nothing is read or computed ahead."""
        made: dict[str, Any] = {}
        seconds = {
            "data": timed(lambda: made.update(batch=data()), self.device),
            "teacher": timed(lambda: made.update(features=teacher(made["batch"])), self.device),
            "student": timed(lambda: self.student(made["batch"], made["features"]), self.device),
            "optimizer": timed(self.advance, self.device),
            "averages": timed(self.average, self.device),
        }
        seconds["optimizer"] = max(0.0, seconds["optimizer"] - seconds["averages"])
        return {part: seconds[part] for part in PARTS}


def measure(
    step: Step,
    rates: Mapping[str, float],
    rounds: int,
    data: Callable[[], Batch],
    teacher: Callable[[Batch], Mapping[str, Features]],
    where: str,
) -> Figures:
    """Time a step, whole and in parts, after one that is not counted (it compiles, and fills caches).

    Args:
        rates: FLOP/s of matrix products by precision, from `product_rate`.
        rounds: the figure is the median of so many.
        data, teacher: make a batch, and its tokens.
        where: online, cached or none, for the table.
    """
    config, device = step.config, step.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    steps = STEPS_TIMED[device.type]
    seconds = statistics.median(timed(lambda: [step() for _ in range(steps)], device) / steps for _ in range(rounds))
    memory = peak_memory(device) if device.type == "cuda" else None
    parts = [step.parts(data, teacher) for _ in range(max(1, rounds // 2))]
    dims = {a.config.target: a.feature_dim for a in step.state.objective.alignments}
    floor = config.batch_size * flops_per_image(config, dims) / rates[config.precision]
    medians = {name: statistics.median(p[name] for p in parts) for name in PARTS}
    return Figures(
        config.model.name, where, config.batch_size, config.precision, config.compile, seconds, floor, memory, medians
    )


def latents(batch: Batch) -> Tensor:
    """Something to train on: the means of the moments, or the pixels. Their scale costs nothing."""
    if batch.moments is not None:
        return batch.moments.float().chunk(2, dim=1)[0]
    return batch.images.float() / 127.5 - 1


def endless(batch: Batch, features: Mapping[str, Features]) -> Feed:
    return itertools.repeat((batch, dict(features)))


def flops_per_image(config: TrainConfig, dims: Mapping[str, int]) -> int:
    """FLOPs of the matrix products of network and projectors for one image, forward and backward, counted by torch.

    A multiply and an add are two. What activation checkpointing computes again is not counted.
    """
    num, size, channels = 2, config.model.latent_size, config.model.latent_channels  # nt_xent has no loss for one image
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):  # whose two products the counter knows on every device
        model = build(config.model)
        alignments = [Alignment(a, model.hidden_dim, dims[a.target]) for a in config.alignments]
        objective = Objective(model, alignments, config.diffusion, label_dropout=0.0, seed=0)
        features = {name: Features(torch.zeros(num, model.grid**2, dim), None) for name, dim in dims.items()}
        x, zeros = torch.zeros(num, channels, size, size), torch.zeros(num)
        draws, weights = Draws(zeros, x, zeros.bool()), torch.zeros(len(alignments))
        with FlopCounterMode(display=False) as counter:
            objective(x, zeros.long(), features, draws, weights).total.sum().backward()
    return counter.get_total_flops() // num


def product_rate(precision: str, device: torch.device, *, side: int = 0, repeats: int = 8) -> float:
    """FLOP/s of a square matrix product, the best of several; "fp32" as the run computes it (TF32 where that is on)."""
    side, dtype = side or PRODUCT_SIDE[device.type], DTYPES.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, device) for _ in range(repeats))


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until what `run` asked of the device is done."""
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
