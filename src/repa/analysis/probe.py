"""Linear probing: how well classes can be read off frozen features by a linear map."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa.base import rng
from repa.base.errors import UserError


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    epochs: int = 90,
    batch_size: int = 16_384,
    lr: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Top-1 accuracy in [0, 1] on the test features: parameter-free batch normalisation, then one linear layer.

    The defaults are the paper's protocol (that of l-DAE, arXiv 2401.14404): Adam, cosine learning rate to 0. The linear
    layer starts at zero, so the seed decides the order of the images only. Features are pooled hidden states, (N, D)
    and (M, D); labels (N,) and (M,) integers.

    Raises:
        UserError: shapes do not fit, a label is negative, or fewer than 2 training images.
    """
    _check(train_features, train_labels, test_features, test_labels)
    num_train, dim = train_features.shape
    features, labels = train_features.to(device).float(), train_labels.to(device).long()
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    # momentum None: the features are fixed, so the plain mean over all batches is their statistic
    norm = nn.BatchNorm1d(dim, affine=False, momentum=None)
    linear = nn.utils.skip_init(nn.Linear, dim, num_classes)  # the usual initialisation would move the caller's stream
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    probe = nn.Sequential(norm, linear).to(device)

    num_batches = min(-(-num_train // batch_size), num_train // 2)  # equal batches: no remainder too small to normalise
    optimizer = torch.optim.Adam(probe.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * num_batches)
    for epoch in range(epochs):
        order = torch.randperm(num_train, generator=rng.generator(seed, "linear_probe", epoch))
        for rows in order.to(device).tensor_split(num_batches):
            optimizer.zero_grad()
            F.cross_entropy(probe(features[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return _accuracy(probe.eval(), test_features, test_labels, batch_size, device)


@torch.no_grad()
def _accuracy(probe: nn.Module, features: Tensor, labels: Tensor, batch_size: int, device: torch.device | str) -> float:
    predicted = [probe(rows.to(device).float()).argmax(1).cpu() for rows in features.split(batch_size)]
    return (torch.cat(predicted) == labels.cpu()).double().mean().item()


def _check(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
            raise UserError(
                f"A linear probe needs {name} features (N, D) and labels (N,), but got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if labels.min() < 0:
            raise UserError(f"A linear probe needs labels from 0 on, but a {name} label is {int(labels.min())}.")
    if train_features.shape[1] != test_features.shape[1]:
        raise UserError(
            f"Train and test features must be of one model, but have {train_features.shape[1]} and "
            f"{test_features.shape[1]} channels."
        )
    if len(train_features) < 2:
        raise UserError("A linear probe needs at least 2 training images, but got 1.")
