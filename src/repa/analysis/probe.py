"""Linear probing: how well classes can be read off frozen features by a linear map."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa.analysis.collection import Progress
from repa.analysis.work import silent
from repa.base import rng
from repa.base.errors import UserError

PAPER_BATCH = 16_384
PAPER_STEPS = 78  # in an epoch of ImageNet's 1,281,167 images
LEAST_BATCH = 256  # fewer images are normalised by too noisy statistics


class Accuracy(NamedTuple):
    """Shares in [0, 1] of the test images."""

    top1: float
    top5: float | None  # None for five classes or fewer, where it says nothing


def suitable_batch(num_images: int) -> int:
    """The paper's batch for ImageNet; for fewer images in proportion, so that an epoch keeps its number of steps."""
    return max(LEAST_BATCH, min(PAPER_BATCH, num_images // PAPER_STEPS))


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    epochs: int = 90,
    batch_size: int = PAPER_BATCH,
    lr: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Top-1 accuracy in [0, 1] on the test features; `linear_probes` with one learning rate."""
    sets = (train_features, train_labels, test_features, test_labels)
    heads = linear_probes(*sets, learning_rates=(lr,), epochs=epochs, batch_size=batch_size, seed=seed, device=device)
    return heads[0].top1


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
    """Accuracies of one linear layer for each learning rate, after parameter-free batch normalisation.

    The defaults are the paper's protocol (that of l-DAE, arXiv 2401.14404): Adam, cosine learning rate to 0. All heads
    are trained in one pass: each batch is read and normalised once. They start at zero, so the seed decides the order of the
    images only, and each ends as it would alone. Features are pooled hidden states, (N, D) and (M, D), of any floating type;
    labels (N,) and (M,) integers. `progress` is told the epochs done.

    Raises:
        UserError: shapes do not fit, a label is negative, a feature is not finite, or fewer than 2 training images.
    """
    _check(train_features, train_labels, test_features, test_labels)
    num_train, dim = train_features.shape
    features, labels = train_features.to(device), train_labels.to(device).long()
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    # momentum None: the features are fixed, so the plain mean over all batches is their statistic
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
            batch, target = norm(features[rows].float()), labels[rows]
            torch.stack([F.cross_entropy(head(batch), target) for head in heads]).sum().backward()
            optimizer.step()
            schedule.step()
        progress(epoch + 1, epochs)
    return [_accuracy(nn.Sequential(norm, head).eval(), test_features, test_labels, device) for head in heads]


def _zero_linear(dim: int, num_classes: int) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, dim, num_classes)  # the usual initialisation would move the caller's stream
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def _accuracy(probe: nn.Module, features: Tensor, labels: Tensor, device: torch.device | str) -> Accuracy:
    num_classes = probe[1].out_features
    ranks = []  # of the true class among the scores, 0 for the highest
    for rows, target in zip(features.split(PAPER_BATCH), labels.split(PAPER_BATCH), strict=True):
        best = probe(rows.to(device).float()).topk(min(5, num_classes)).indices.cpu()  # (n, 5)
        hit = best == target.cpu()[:, None]
        ranks.append(torch.where(hit.any(1), hit.int().argmax(1), 5))
    rank = torch.cat(ranks)
    return Accuracy((rank == 0).double().mean().item(), (rank < 5).double().mean().item() if num_classes > 5 else None)


def _check(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
            raise UserError(
                f"A linear probe needs {name} features (N, D) and labels (N,), but got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if labels.min() < 0:
            raise UserError(f"A linear probe needs labels from 0 on, but a {name} label is {int(labels.min())}.")
        if not torch.isfinite(features).all():
            raise UserError(f"A linear probe needs finite features, but the {name} features hold NaN or infinity.")
    if train_features.shape[1] != test_features.shape[1]:
        raise UserError(
            f"Train and test features must be of one model, but have {train_features.shape[1]} and "
            f"{test_features.shape[1]} channels."
        )
    if len(train_features) < 2:
        raise UserError("A linear probe needs at least 2 training images, but got 1.")
