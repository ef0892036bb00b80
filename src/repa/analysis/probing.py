"""Linear probes of a run's blocks and of frozen encoders, trained on prepared data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from repa.analysis.collection import Load, Progress
from repa.analysis.config import HeadsConfig, ImagesConfig, ProbeConfig
from repa.analysis.images import check_run, device_of, spread
from repa.analysis.pooled import features_in, features_of_encoder, field, hidden_of_run
from repa.analysis.probe import linear_probes, suitable_batch
from repa.analysis.work import Rows, Stages, each, share, silent
from repa.base.errors import UserError
from repa.base.rng import generator
from repa.data import DataSet
from repa.encoders import VisionEncoder
from repa.runs import LoadedRun

TRAIN_SHARE = 0.8  # of the images, for a probe without validation data; the others test it


@dataclass(frozen=True)
class ProbeImages:
    """One set of images and its split in two, or a set to train on and a set to test on."""

    sets: tuple[tuple[DataSet, np.ndarray], ...]
    labels: tuple[Tensor, ...]
    split: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, data: DataSet, val: DataSet | None, num: int, seed: int, least_classes: int = 2) -> Self:
        """`num` images of each (0: all); refuses data that a probe can learn nothing from, and two sets that do not match."""
        if data.num_classes < least_classes:
            raise UserError(f"{data.folder} has one class: a linear probe needs at least two.")
        if val is not None and (val.class_names, val.resolution) != (data.class_names, data.resolution):
            raise UserError(
                f"{val.folder} cannot test a probe trained on {data.folder}: it has {val.num_classes} classes at "
                f"{val.resolution} pixels, that has {data.num_classes} at {data.resolution}, and their names must agree."
            )
        sets = tuple((d, spread(d, num)) for d in (data, val) if d is not None)
        labels = tuple(torch.from_numpy(d.gather("labels", indices)) for d, indices in sets)
        split = None
        if val is None:
            order = torch.randperm(len(labels[0]), generator=generator(seed, "probe split"))
            num_train = round(TRAIN_SHARE * len(order))
            split = order.split([num_train, len(order) - num_train])
        images = cls(sets, labels, split)
        if data.num_classes > 1:
            images._check_classes(data.class_names)
        return images

    def _check_classes(self, names: Sequence[str]) -> None:
        """Refuse a split with classes that are tested and never trained: no probe finds them, and the accuracy would be 0."""
        (_, trained), (_, tested) = self.pairs([labels[:, None] for labels in self.labels])
        absent = sorted(set(tested.tolist()) - set(trained.tolist()))
        if absent:
            raise UserError(
                f"{len(absent)} of {len(names)} classes are among the {len(tested):,} test images and not among the {len(trained):,} "
                f"training images, for example {names[absent[0]]!r}: give --num-images 0 or more images of each class."
            )

    @property
    def sizes(self) -> list[int]:
        return [len(indices) for _, indices in self.sets]

    def collect(self, load: Callable[[DataSet, np.ndarray, Progress], Load], stages: Stages) -> list[Load]:
        return [load(data, indices, stages.next()) for data, indices in self.sets]

    def pairs(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(features, labels) to train on, and to test on."""
        if self.split is None:
            return list(zip(features, self.labels, strict=True))
        return [(features[0][rows], self.labels[0][rows]) for rows in self.split]


def probe_of_run(
    run: LoadedRun,
    data: DataSet,
    config: ProbeConfig,
    val: DataSet | None = None,
    progress: Progress = silent,
    heads_progress: Progress = silent,
) -> Rows:
    """Rows {t, depth, lr, top1, top5}: trained on `data` and tested on `val`, or on 80 % and 20 % of `data`.

    `progress` is told the images whose features are there, `heads_progress` the epochs of this process's heads.
    """
    images = ProbeImages.of(data, val, config.num_images, config.seed)
    depths = check_run(run, data, config.depths)
    if val is not None:
        check_run(run, val, depths)
    stages = Stages(progress, images.sizes * len(config.times))
    heads = Stages(heads_progress, [config.epochs] * share(len(depths)) * len(config.times))
    rows: Rows = []
    for t in config.times:
        loads = images.collect(lambda d, i, p, t=t: hidden_of_run(run, d, i, depths, t, config, config.seed, p), stages)

        def probed(depth: int, t: float = t, loads: list[Load] = loads) -> Rows:
            features = [load(field(depth)) for load in loads]
            found = probe_rows(images, features, config, config.seed, device_of(run), heads.next())
            return [{"t": t, "depth": depth, **row} for row in found]

        rows += each(depths, probed)
    return rows


def probe_of_encoder(
    encoder: VisionEncoder,
    spec: str,
    data: DataSet,
    config: ImagesConfig,
    heads: HeadsConfig,
    *,
    seed: int = 0,
    grid: int = 0,
    val: DataSet | None = None,
    progress: Progress = silent,
    heads_progress: Progress = silent,
) -> Rows:
    """Rows {features, lr, top1, top5} of a frozen encoder: of its averaged patches, and of its own pooled features if it has any.

    `grid` 0 takes the encoder's own for this resolution. Progress is told as by `probe_of_run`.
    """
    images = ProbeImages.of(data, val, config.num_images, seed)
    stages = Stages(progress, images.sizes)
    grid = grid or encoder.grid_for(data.resolution)
    names = features_in(encoder, data, grid)
    loads = images.collect(lambda d, i, p: features_of_encoder(encoder, spec, grid, d, i, config, p, names), stages)
    device = next(encoder.parameters()).device
    epochs = Stages(heads_progress, [heads.epochs] * share(len(names)))

    def probed(name: str) -> Rows:
        found = probe_rows(images, [load(name) for load in loads], heads, seed, device, epochs.next())
        return [{"features": name, **row} for row in found]

    return each(names, probed)


def probe_rows(
    images: ProbeImages,
    features: Sequence[Tensor],
    config: HeadsConfig,
    seed: int,
    device: torch.device | str,
    progress: Progress = silent,
) -> Rows:
    """Rows {lr, top1, top5} of the features of each set of images."""
    train, test = images.pairs(features)
    heads = linear_probes(
        *train, *test, learning_rates=config.learning_rates, epochs=config.epochs,
        batch_size=config.probe_batch or suitable_batch(len(train[0])), seed=seed, device=device, progress=progress,
    )  # fmt: skip
    return [{"lr": rate, **head._asdict()} for rate, head in zip(config.learning_rates, heads, strict=True)]
