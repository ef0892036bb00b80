"""Batches of a measured step: from prepared data as in training, or random ones in memory."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.alignment.targets import Need
from repa.base.registry import parse_spec
from repa.data import Batch, Loader, open_data
from repa.data.records import FeatureField
from repa.encoders.contract import Features
from repa.models import Condition
from repa.performance.costs import encoder_cost
from repa.training.config import TrainConfig
from repa.training.inputs import EncoderFeatures, TextConditions, encoder_needs
from repa.training.resolve import resolve, with_streams

ATTENTION_HEADS = 12  # of an encoder whose attention is random: those of a ViT-B
UNNAMED = {"latent_size": 32, "latent_channels": 4, "num_classes": 1000}  # without data: ImageNet at 256 pixels

Feed = Iterator[tuple[Batch, dict[str, Features]]]  # what `EncoderFeatures.iterate` gives


@dataclass(frozen=True)
class BatchSource:
    """Source of a measured step's batches."""

    dims: Mapping[str, int]
    """Widths of tokens by encoder."""
    feed: Feed
    data: Callable[[], Batch]
    """Creates one batch, without features."""
    encode: Callable[[Batch], Mapping[str, Features]]
    """Creates the features of one batch."""
    where: str
    """online, cached or none."""
    encoder_flops: float = 0.0
    """FLOPs per image of the encoders that run in the step."""
    condition: Callable[[Batch], Condition] = lambda batch: Condition(batch.labels)
    """The condition of a batch; for a network that reads text, without captions, the empty text."""


@contextlib.contextmanager
def prepared(config: TrainConfig, folder: Path, device: torch.device) -> Iterator[tuple[TrainConfig, BatchSource]]:
    """Batches of a prepared folder, read and encoded as training does."""
    data = open_data(folder)
    config = resolve(config, data, device)
    encoders = EncoderFeatures(config, data, device)
    texts = TextConditions(config, data, device)
    config, needs = texts.completed(with_streams(config, encoders.dims)), encoders.wanted
    # The same loader as in training: another one would hide the cost of reading.
    loader = Loader(
        data, batch_size=config.batch_size, seed=config.seed, features=encoders.stored(needs),
        images=encoders.reads_images(needs), pooled=encoders.pooled, text=texts.reads, device=device,
    )  # fmt: skip
    where = "online" if encoders.encoders else "cached" if needs else "none"
    steps = itertools.count()
    with contextlib.closing(loader.iterate()) as batches:
        feed = encoders.iterate(batches, 0, lambda step: needs)
        running = tuple(need for need in needs if need.encoder in encoders.encoders)
        yield config, BatchSource(
            encoders.dims, feed, lambda: loader.batch(next(steps)), lambda b: encoders(b, needs), where,
            flops_of_encoders(running, encoders.grid, config), texts,
        )  # fmt: skip


@contextlib.contextmanager
def random_batch(config: TrainConfig, width: int, device: torch.device) -> Iterator[tuple[TrainConfig, BatchSource]]:
    """One random batch in memory, with precomputed tokens."""
    given = config.model.model_dump()
    model = config.model.override(**{k: given[k] or v for k, v in UNNAMED.items()})
    shape = (model.latent_channels, model.latent_size, model.latent_size)
    config = config.override(model=model, diffusion=config.diffusion.for_latents(shape))

    dims = dict.fromkeys((need.encoder for need in encoder_needs(config)), width)
    config = with_streams(config, dims)
    synthetic = Synthetic(dims, config.model.latent_size // config.model.dims().patch_size)
    batch = synthetic.batch(config, device, resolution=1)  # no encoder reads the images
    yield config, in_memory(dims, batch, condition=lambda batch: random_condition(config, batch.labels))


def in_memory(
    dims: Mapping[str, int], batch: Batch, features: Mapping[str, Features] | None = None, **facts: Any
) -> BatchSource:
    """The same batch in every step, with precomputed features: its own, unless others are given."""
    found = dict(batch.features if features is None else features)
    where = "cached" if dims else "none"
    return BatchSource(dims, itertools.repeat((batch, found)), lambda: batch, lambda batch: found, where, **facts)


@dataclass(frozen=True)
class Synthetic:
    """Substitute for prepared data in `EncoderFeatures`: random latents and images in memory, and tokens of these widths."""

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
        stream = torch.Generator().manual_seed(0)  # of the CPU: the same batch on every device
        moments = torch.randn(num, 2 * channels, side, side, generator=stream)
        images = torch.randint(256, (num, 3, resolution, resolution), generator=stream, dtype=torch.uint8)
        labels = torch.randint(max(1, config.model.num_classes), (num,), generator=stream)
        tokens = {
            need.encoder: random_features(num, self.grid**2, self.widths[need.encoder], need, stream, device)
            for need in encoder_needs(config)
            if need.encoder in self.widths
        }
        return Batch(labels.to(device), images.to(device), moments.to(device), tokens)


def latents(batch: Batch, channels: int) -> Tensor:
    """Training input: the means of the moments, or the pixels. Their scale does not affect the cost."""
    if batch.moments is not None:
        return batch.moments[:, :channels].float()
    assert batch.images is not None  # a batch without moments has images
    return batch.images.float() / 127.5 - 1


def random_features(
    num: int,
    tokens: int,
    width: int,
    need: Need,
    stream: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Features:
    """Random features in the form of an encoder's output for `num` images."""
    patches = torch.randn(num, tokens, width, generator=stream)
    pooled = torch.randn(num, width, generator=stream) if need.pooled else None
    attention = {
        layer: torch.randn(num, ATTENTION_HEADS, tokens, tokens, generator=stream) for layer in need.attention
    } or None
    features = Features(patches, pooled, attention)
    return features if device is None else features.map(lambda x: x.to(device))  # sampled on the CPU


def random_condition(config: TrainConfig, labels: Tensor) -> Condition:
    """These labels, and one token per image if a term has the target text."""
    targets = (parse_spec(term.target) for term in config.alignments)
    width = next((settings.get("width", 0) for name, settings in targets if name == "text"), 0)
    return Condition(labels, torch.zeros(len(labels), 1, width, device=labels.device) if width else None)


def flops_of_encoders(needs: tuple[Need, ...], grid: int, config: TrainConfig) -> float:
    """For one image."""
    costs = (encoder_cost(need.encoder, grid, config.feature_weights.get(need.encoder)) for need in needs)
    return float(sum(found.cost.forward for found in costs))
