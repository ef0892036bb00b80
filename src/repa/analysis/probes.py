"""Linear probes: accuracy of linear classifiers on the features of a run's blocks or of a frozen encoder."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa.analysis.collection import Load, Rows, Stages, each, share
from repa.analysis.config import HeadsConfig, ProbeConfig
from repa.analysis.features import features_in, features_of_encoder, field, hidden_of_run
from repa.analysis.hidden import check_run, device_of, spaced_rows
from repa.base import rng
from repa.base.errors import UserError, require_type
from repa.base.reporting import Progress, silent
from repa.data import DataSet
from repa.encoders import VisionEncoder
from repa.runs import LoadedRun

TRAIN_SHARE = 0.8  # share of training images for a probe without validation data; the rest are test images
PAPER_BATCH = 16_384
PAPER_STEPS = 78  # in an epoch of ImageNet's 1,281,167 images
LEAST_BATCH = 256  # the statistics of smaller batches are too noisy for the normalisation


@dataclass(frozen=True)
class ProbeImages:
    """One data set split in two, or a training set and a test set."""

    sets: tuple[tuple[DataSet, np.ndarray], ...]
    labels: tuple[Tensor, ...]
    split: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, data: DataSet, val: DataSet | None, num: int, seed: int, least_classes: int = 2) -> Self:
        """`num` images of each (0: all); refuses data that a probe cannot learn from, and two sets that do not match."""
        if data.num_classes < least_classes:
            raise UserError(f"{data.folder} has one class, but a linear probe needs several: give other data.")
        if val is not None and (val.class_names, val.resolution) != (data.class_names, data.resolution):
            raise UserError(
                f"{val.folder} cannot test a probe trained on {data.folder}: {val.num_classes} classes at "
                f"{val.resolution} pixels do not match {data.num_classes} at {data.resolution}. Give data with the same class names and "
                "the same resolution."
            )
        sets = tuple((d, spaced_rows(d, num)) for d in (data, val) if d is not None)
        labels = tuple(torch.from_numpy(d.gather("labels", indices)) for d, indices in sets)
        split = None
        if val is None:
            # One random fifth is the test set of every block and noise level.
            order = torch.randperm(len(labels[0]), generator=rng.generator(seed, "probe split"))
            num_train = round(TRAIN_SHARE * len(order))
            split = order.split([num_train, len(order) - num_train])
        images = cls(sets, labels, split)
        if data.num_classes > 1:
            images._check_classes(data.class_names)
        return images

    def _check_classes(self, names: Sequence[str]) -> None:
        """Refuse a split whose test images have classes without training images: their accuracy would be 0."""
        (_, trained), (_, tested) = self.pairs([labels[:, None] for labels in self.labels])
        absent = sorted(set(tested.tolist()) - set(trained.tolist()))
        if absent:
            raise UserError(
                f"{len(absent)} of {len(names)} classes occur in the {len(tested):,} test images but not in the {len(trained):,} "
                f"training images, for example {names[absent[0]]!r}: give --num-images 0 or more images of each class."
            )

    @property
    def sizes(self) -> list[int]:
        return [len(indices) for _, indices in self.sets]

    def collect(self, load: Callable[[DataSet, np.ndarray, Progress], Load], stages: Stages) -> list[Load]:
        return [load(data, indices, stages.next()) for data, indices in self.sets]

    def pairs(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(features, labels) for training, and for the test."""
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

    `progress` receives the number of images with features, `heads_progress` the epochs of this process's heads.
    """
    images = ProbeImages.of(data, val, config.num_images, config.seed)
    depths = check_run(run, data, config.depths)
    if val is not None:
        check_run(run, val, depths)
    stages = Stages(progress, images.sizes * len(config.times))
    heads = Stages(heads_progress, [config.epochs] * share(len(depths)) * len(config.times))
    rows: Rows = []
    for t in config.times:
        loads = images.collect(functools.partial(hidden_of_run, run, depths, t, config), stages)

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
    config: ProbeConfig,
    val: DataSet | None = None,
    progress: Progress = silent,
    heads_progress: Progress = silent,
) -> Rows:
    """Rows {features, lr, top1, top5} of a frozen encoder: of its averaged patches, and of its pooled features if it has any.

    Progress is reported as in `probe_of_run`.
    """
    images = ProbeImages.of(data, val, config.num_images, config.seed)
    stages = Stages(progress, images.sizes)
    grid = encoder.grid_for(data.resolution)
    names = features_in(encoder, data, grid)
    loads = images.collect(functools.partial(features_of_encoder, encoder, spec, grid, names, config), stages)
    device = next(encoder.parameters()).device
    epochs = Stages(heads_progress, [config.epochs] * share(len(names)))

    def probed(name: str) -> Rows:
        found = probe_rows(images, [load(name) for load in loads], config, config.seed, device, epochs.next())
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
    """Rows {lr, top1, top5} for the given features."""
    train, test = images.pairs(features)
    heads = linear_probes(
        *train, *test, learning_rates=config.learning_rates, epochs=config.epochs,
        batch_size=config.probe_batch or suitable_batch(len(train[0])), seed=seed, device=device, progress=progress,
    )  # fmt: skip
    return [{"lr": rate, **head._asdict()} for rate, head in zip(config.learning_rates, heads, strict=True)]


class Accuracy(NamedTuple):
    """Shares in [0, 1] of the test images."""

    top1: float
    top5: float | None  # None for five classes or fewer, where it has no meaning


def suitable_batch(num_images: int) -> int:
    """The paper's batch size for ImageNet; proportionally smaller for fewer images, so that an epoch has as many steps."""
    return max(LEAST_BATCH, min(PAPER_BATCH, num_images // PAPER_STEPS))


def linear_probes(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    learning_rates: Sequence[float] = (1e-3,),
    epochs: int = 90,
    batch_size: int = PAPER_BATCH,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> list[Accuracy]:
    """Accuracies of one linear layer per learning rate, after parameter-free batch normalisation.

    The defaults are the paper's protocol (that of l-DAE, arXiv 2401.14404): Adam, cosine learning rate to 0. All heads
    are trained in one pass: each batch is read and normalised once. They start at zero, so the seed affects only the order of
    the images, and each head has the same result as alone. Features are pooled hidden states, (N, D) and (M, D), of any
    floating type; labels (N,) and (M,) integers. `progress` receives the number of completed epochs.

    Raises:
        UserError: shapes do not fit, a label is negative, a feature is not finite, or fewer than 2 training images.
    """
    _check_sets(train_features, train_labels, test_features, test_labels)
    num_train, dim = train_features.shape
    features, labels = train_features.to(device), train_labels.to(device).long()
    # A class without training images is always wrong, and counts.
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    # momentum None: the features are fixed, so the statistic is the plain mean over all batches
    norm = nn.BatchNorm1d(dim, affine=False, momentum=None).to(device)
    heads = [_zero_linear(dim, num_classes).to(device) for _ in learning_rates]
    optimizer = torch.optim.Adam(
        [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, learning_rates, strict=True)]
    )
    num_batches = min(-(-num_train // batch_size), num_train // 2)  # equal batches: no remainder too small to normalise
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * num_batches)
    for epoch in range(epochs):
        order = torch.randperm(num_train, generator=rng.generator(seed, "linear_probe", epoch))
        for rows in order.to(device).tensor_split(num_batches):
            optimizer.zero_grad()
            # The heads share no parameters, so one backward of the summed loss gives each its own gradient.
            batch, target = norm(features[rows].float()), labels[rows]
            torch.stack([F.cross_entropy(head(batch), target) for head in heads]).sum().backward()
            optimizer.step()
            schedule.step()
        progress(epoch + 1, epochs)
    return [
        _accuracy(nn.Sequential(norm, head).eval(), head.out_features, test_features, test_labels, device)
        for head in heads
    ]


def _zero_linear(dim: int, num_classes: int) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, dim, num_classes)  # no initialisation: it would advance the random stream
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def _accuracy(
    probe: nn.Module, num_classes: int, features: Tensor, labels: Tensor, device: torch.device | str
) -> Accuracy:
    ranks = []  # rank of the true class by score, 0 for the highest
    for rows, target in zip(features.split(PAPER_BATCH), labels.split(PAPER_BATCH), strict=True):
        best = probe(rows.to(device).float()).topk(min(5, num_classes)).indices.cpu()  # (n, 5)
        hit = best == target.cpu()[:, None]
        ranks.append(torch.where(hit.any(1), hit.int().argmax(1), 5))
    rank = torch.cat(ranks)
    return Accuracy((rank == 0).double().mean().item(), (rank < 5).double().mean().item() if num_classes > 5 else None)


def _check_sets(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        require_type(features, Tensor, f"A linear probe needs a tensor of {name} features (N, D)")
        require_type(labels, Tensor, f"A linear probe needs a tensor of {name} labels (N,)")
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
            raise UserError(
                f"A linear probe needs {name} features (N, D) and labels (N,), but got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if labels.min() < 0:
            raise UserError(f"A linear probe needs labels from 0 on, but a {name} label is {int(labels.min())}.")
        if not torch.isfinite(features).all():
            raise UserError(
                f"A linear probe needs finite features, but the {name} features contain NaN or infinity: check the images and the weights."
            )
    if train_features.shape[1] != test_features.shape[1]:
        raise UserError(
            f"Training and test features must come from one model, but have {train_features.shape[1]} and "
            f"{test_features.shape[1]} channels."
        )
    if len(train_features) < 2:
        raise UserError("A linear probe needs at least 2 training images, but got 1.")
