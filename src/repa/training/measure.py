"""What a training step costs on this machine, against what its matrix products alone would: `repa bench`, benchmarks/.

The step is the loop's own: `EncoderFeatures.iterate`, `loop.backward`, `update.update`.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repa.alignment import Alignment
from repa.alignment.targets import Need
from repa.base.device import peak_memory, timed
from repa.base.precision import DTYPES
from repa.base.registry import parse_spec
from repa.data import Batch
from repa.data.manifest import FeatureField
from repa.encoders.contract import Features
from repa.models import Condition, TwoTimes, build
from repa.models.routing import placeholder
from repa.training.config import TrainConfig
from repa.training.inputs import wanted_by
from repa.training.loop import backward
from repa.training.objective import Draws, Objective
from repa.training.parallel import running
from repa.training.state import build_state
from repa.training.update import update

PARTS = ("teacher", "student", "optimizer", "averages", "data")
ATTENTION_HEADS = 12  # of an encoder whose attention is made up: those of a ViT-B
STEPS_TIMED = {"cpu": 1, "cuda": 10}  # steps between two looks at the clock, which waits for the device

Feed = Iterator[tuple[Batch, dict[str, Features]]]  # what `EncoderFeatures.iterate` gives


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
    encoder_floor: float = 0.0
    """Seconds of the matrix products of encoders that run in the step, at the measured rate."""
    first_seconds: float = 0.0
    """Of the first step, which compiles and fills caches."""
    reserved_memory: int | None = None
    """Bytes that PyTorch took of a CUDA device, of which `peak_memory` were in use at once."""

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds

    @property
    def utilisation(self) -> float:
        """Share of the machine's measured matrix-product rate that goes into network and projectors."""
        return self.floor / self.seconds

    @property
    def utilisation_with_encoder(self) -> float:
        """The same with the encoders that run in the step: what the device does, not what the network gains."""
        return (self.floor + self.encoder_floor) / self.seconds

    def share(self, part: str) -> float:
        return self.parts[part] / sum(self.parts.values())

    def row(self) -> dict[str, Any]:
        names = ("images_per_second", "utilisation", "utilisation_with_encoder")
        return {**vars(self), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Synthetic:
    """Stands where prepared data would, for `EncoderFeatures`: random latents and images in memory, and tokens of these widths."""

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
            need.encoder: random_features(num, self.grid**2, self.widths[need.encoder], need, stream, device)
            for need in wanted_by(config)
            if need.encoder in self.widths
        }
        return Batch(labels.to(device), images.to(device), moments.to(device), tokens)


class Step:
    """A training step, whole and in parts. `feed` gives each its batch and tokens, `condition` what a batch is conditioned on."""

    def __init__(
        self, config: TrainConfig, dims: Mapping[str, int], feed: Feed, device: torch.device,
        condition: Callable[[Batch], Condition] = lambda batch: Condition(batch.labels),
    ):  # fmt: skip
        self.config, self.dims, self.feed, self.device = config, dict(dims), feed, device
        self.condition, self.state = condition, build_state(config, self.dims, device)
        self.module = running(self.state.objective, config, device)
        self.groups = self.state.objective.trained_groups()

    def __call__(self) -> None:
        self.student(*next(self.feed))
        self.advance()

    def student(self, batch: Batch, features: Mapping[str, Features]) -> None:
        clean = self.state.objective.clean(latents(batch, self.config.model.latent_channels), features)
        condition = self.state.model.completed(self.condition(batch))
        backward(self.state, self.module, clean, condition, features)

    def advance(self) -> None:
        update(self.state, self.groups)

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
    encoder_flops: float = 0.0,
) -> Figures:
    """Time a step, whole and in parts, after one that is not counted (it compiles, and fills caches).

    Args:
        rates: FLOP/s of matrix products by precision, from `product_rate`.
        rounds: the figure is the median of so many.
        data, teacher: make a batch, and its tokens.
        where: online, cached or none, for the table.
        encoder_flops: of the encoders that run in the step, for one image.
    """
    config, device = step.config, step.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = timed(step, device)
    steps = STEPS_TIMED[device.type]
    seconds = statistics.median(timed(lambda: [step() for _ in range(steps)], device) / steps for _ in range(rounds))
    memory = peak_memory(device) if device.type == "cuda" else None
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    parts = [step.parts(data, teacher) for _ in range(max(1, rounds // 2))]
    of_one = config.batch_size / rates[config.precision]
    medians = {name: statistics.median(p[name] for p in parts) for name in PARTS}
    return Figures(
        config.model.name, where, config.batch_size, config.precision, config.compile, seconds,
        of_one * flops_per_image(config, step.dims), memory, medians, of_one * encoder_flops, first, reserved,
    )  # fmt: skip


def latents(batch: Batch, channels: int) -> Tensor:
    """Something to train on: the means of the moments, or the pixels. Their scale costs nothing."""
    if batch.moments is not None:
        return batch.moments[:, :channels].float()
    return batch.images.float() / 127.5 - 1


def random_features(
    num: int,
    tokens: int,
    width: int,
    need: Need,
    stream: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Features:
    """What an encoder would give for `num` images."""
    patches = torch.randn(num, tokens, width, generator=stream)
    pooled = torch.randn(num, width, generator=stream) if need.pooled else None
    attention = {
        layer: torch.randn(num, ATTENTION_HEADS, tokens, tokens, generator=stream) for layer in need.attention
    } or None
    features = Features(patches, pooled, attention)
    return features if device is None else features.map(lambda x: x.to(device))


def made_up_condition(config: TrainConfig, labels: Tensor) -> Condition:
    """These labels, and where a term has the target text one token for each image."""
    targets = (parse_spec(term.target) for term in config.alignments)
    width = next((settings.get("width", 0) for name, settings in targets if name == "text"), 0)
    return Condition(labels, torch.zeros(len(labels), 1, width, device=labels.device) if width else None)


def endless(batch: Batch, features: Mapping[str, Features]) -> Feed:
    return itertools.repeat((batch, dict(features)))


def flops_per_image(config: TrainConfig, dims: Mapping[str, int]) -> int:
    """FLOPs of the matrix products of network and projectors for one image, forward and backward, counted by torch.

    A multiply and an add are two. What activation checkpointing computes again is not counted.
    """
    num, size, channels = 2, config.model.latent_size, config.model.latent_channels  # nt_xent has no loss for one image
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):  # whose two products the counter knows on every device
        model = build(config.model)
        tokens = model.grid[0] * model.grid[1]
        alignments = [Alignment.of(a, model, dims) for a in config.alignments]
        objective = Objective(model, alignments, config.diffusion, label_dropout=0.0, seed=0, streams=config.streams)
        features = {n.encoder: random_features(num, tokens, dims[n.encoder], n) for n in wanted_by(config)}
        clean = objective.clean(torch.zeros(num, channels, size, size), features)
        zeros = torch.zeros(num)
        keep = placeholder(model.route, num, model.grid)
        two = TwoTimes(torch.zeros(num, 2), torch.zeros(num, tokens, dtype=torch.bool))
        t = two if config.diffusion.token_times else zeros
        cleanest = any(target.cleanest for target in objective.averaging)
        draws, weights = Draws(t, clean, zeros.bool(), zeros if cleanest else t, keep), torch.zeros(1 + len(alignments))
        condition = model.completed(made_up_condition(config, zeros.long()))
        with FlopCounterMode(display=False) as counter:
            averaged = objective.averaged(model, clean, condition, draws) if objective.averages(0) else None
            objective(clean, condition, features, draws, weights, averaged).total.sum().backward()
    return counter.get_total_flops() // num


def product_shapes(config: TrainConfig) -> dict[str, tuple[int, int, int]]:
    """(M, K, N) of the products of a block, (M, K) @ (K, N), for one micro-batch: forward, gradient of the input, of the weight."""
    dims = config.model.dims()
    width, tokens = dims.hidden_dim, (config.model.latent_size // dims.patch_size) ** 2
    rows, found = config.batch_size // config.accumulate * tokens, {}
    for name, (into, out) in {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}.items():
        into, out = into * width, out * width
        found[f"{name} forward"] = (rows, into, out)
        found[f"{name} input"] = (rows, out, into)
        found[f"{name} weight"] = (out, rows, into)
    return found


def shape_rates(config: TrainConfig, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """FLOP/s of each of `product_shapes`, laid out as autograd lays them out: the best of several."""
    dtype, rates = DTYPES[config.precision], {}
    for name, (m, k, n) in product_shapes(config).items():
        left, right = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        if name.endswith("forward"):  # x @ weight.T
            right = right.t().contiguous().t()
        elif name.endswith("weight"):  # gradient.T @ x
            left = left.t().contiguous().t()
        rates[name] = 2 * m * k * n / min(timed(lambda: left @ right, device) for _ in range(repeats))  # noqa: B023
    return rates
