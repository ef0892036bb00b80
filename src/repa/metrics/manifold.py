"""Improved precision and recall (Kynkaanniemi et al. 2019): which share of one set lies on the other's manifold."""

from typing import NamedTuple

import torch
from torch import Tensor

from repa.base.errors import UserError

BLOCK = 1024  # rows of the distance matrix held at a time: 200 MB in float32 against 50 000 features


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(reference: Tensor, samples: Tensor, k: int = 3) -> PrecisionRecall:
    """Precision: share of samples (M, D) within reach of a reference feature; recall: share of reference (N, D) within
    reach of a sample.

    A feature's reach is the distance to its k-th nearest neighbour in its own set, itself not counted. The ADM
    evaluator compares 10 000 reference images with all samples, in float16: its third digit can differ from float32's.

    Raises:
        UserError: widths differ, or a set has no more than k features.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise UserError(
            "Precision and recall compare features (N, D) and (M, D), but got "
            f"{tuple(reference.shape)} and {tuple(samples.shape)}."
        )
    if not 1 <= k < min(len(reference), len(samples)):
        raise UserError(
            f"Precision and recall with k={k} need k >= 1 and more than k features in each set, but got "
            f"{len(reference)} reference and {len(samples)} samples."
        )
    centre = reference.float().mean(0)  # distances do not change, and |u|^2 - 2uv + |v|^2 cancels less
    reference, samples = reference.float() - centre, samples.to(reference.device).float() - centre
    return PrecisionRecall(
        precision=_share_within(samples, reference, _reach(reference, k)),
        recall=_share_within(reference, samples, _reach(samples, k)),
    )


def _reach(features: Tensor, k: int) -> Tensor:
    """Squared distance of each feature to its k-th neighbour: (N, D) -> (N,)."""
    reach = []
    for start in range(0, len(features), BLOCK):
        distances = _squared_distances(features[start : start + BLOCK], features)  # (n, N)
        own = torch.arange(start, start + len(distances), device=features.device)
        distances[own - start, own] = torch.inf  # rounding could put a duplicate before the feature itself
        reach.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(reach)


def _share_within(queries: Tensor, centres: Tensor, reach: Tensor) -> float:
    """Share of queries (M, D) that lie in the ball of at least one centre (N, D) with squared radius (N,)."""
    inside = [(_squared_distances(block, centres) <= reach).any(1) for block in queries.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)  # (n, N)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)
