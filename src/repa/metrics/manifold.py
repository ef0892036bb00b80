"""Improved precision and recall (Kynkaanniemi et al. 2019): the share of one set that lies on the other's manifold."""

from collections.abc import Callable, Iterable
from itertools import combinations_with_replacement, islice, product
from typing import NamedTuple

import torch
from torch import Tensor

from repa.base import dist
from repa.base.device import exact_float32
from repa.base.errors import UserError
from repa.metrics.distances import check_features

BLOCK = 4096  # rows and columns per block of distances: 64 MB in float32
ADM_BLOCK = 10_000  # block size of the ADM evaluator, which falls back to float32 per block
SLACK = 1e-5  # of |u|^2 + |v|^2; exceeds the rounding error for equal features, so that their distance is 0


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    reference: Tensor, samples: Tensor, k: int = 3, *, over_processes: bool = False
) -> PrecisionRecall:
    """Precision: share of samples (M, D) within reach of a reference feature; recall: share of reference features (N, D)
    within reach of a sample.

    A feature's reach is the distance to its k-th nearest neighbour in its own set, not counting itself. The ADM
    evaluator compares 10 000 reference images with all samples, in float16, as does `precision_recall_in_half`.

    Every distance is computed once: within a set it is used for both features, between the sets for precision and recall.

    Args:
        over_processes: split the blocks over processes, which all pass the same features; all get the result.

    Raises:
        UserError: widths differ, a set has at most k features, or a feature is not finite.
    """
    check_sets(reference, samples, k)
    centre = reference.float().mean(0)  # does not change distances, and reduces cancellation in |u|^2 - 2uv + |v|^2
    reference, samples = reference.float() - centre, samples.to(reference.device).float() - centre
    rank, world = (dist.rank(), dist.world()) if over_processes else (0, 1)
    # TF32 would round away the small distances of near features, which matter here.
    with exact_float32(reference.device):
        reach_reference, reach_samples = (_reach(features, k, rank, world) for features in (reference, samples))
        pairs = islice(product(_blocks(reference, BLOCK), _blocks(samples, BLOCK)), rank, None, world)
        covered, real = _within(reference, samples, reach_reference, reach_samples, pairs, _squared_distances)
    if world > 1:  # a sum instead of "or", which gloo lacks
        covered, real = dist.sum_over(covered.int()) > 0, dist.sum_over(real.int()) > 0
    return PrecisionRecall(real.double().mean().item(), covered.double().mean().item())


def precision_recall_in_half(reference: Tensor, samples: Tensor, k: int = 3) -> PrecisionRecall:
    """Like `precision_recall`, with the rounding of ADM's evaluator (Dhariwal and Nichol 2021), as in published results.

    Squared norms, products and their sums are each rounded to float16. A feature's reach is the (k + 1)-th smallest distance
    in its set, counting itself, because rounding may make its own distance non-zero. Sums are float32 here; the order and
    precision of sums in a GPU's products are unknown, so the last digit of published results can differ.

    Raises:
        UserError: as `precision_recall`.
    """
    check_sets(reference, samples, k)
    reference, samples = reference.float(), samples.to(reference.device).float()
    with exact_float32(reference.device):
        reach_reference, reach_samples = (_reach_in_half(features, k) for features in (reference, samples))
        pairs = product(_blocks(reference, ADM_BLOCK), _blocks(samples, ADM_BLOCK))
        covered, real = _within(reference, samples, reach_reference, reach_samples, pairs, _distances_in_half)
    return PrecisionRecall(real.double().mean().item(), covered.double().mean().item())


def _within(
    reference: Tensor, samples: Tensor, reach_reference: Tensor, reach_samples: Tensor,
    pairs: Iterable[tuple[slice, slice]], distances_of: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N,) bool: reference features within reach of a sample; (M,) bool: samples within reach of a reference feature."""
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    real = torch.zeros(len(samples), dtype=torch.bool, device=reference.device)
    for rows, columns in pairs:
        distances = distances_of(reference[rows], samples[columns])  # (n, m)
        covered[rows] |= (distances <= reach_samples[columns]).any(1)
        real[columns] |= (distances <= reach_reference[rows, None]).any(0)
    return covered, real


def check_sets(reference: Tensor, samples: Tensor, k: int) -> None:
    """Raises UserError unless the sets are valid for precision and recall with k neighbours."""
    check_features(reference, samples, "Precision and recall")
    if not 1 <= k < min(len(reference), len(samples)):
        raise UserError(
            f"Precision and recall with k={k} need k >= 1 and more than k features in each set, but got "
            f"{len(reference)} reference features and {len(samples)} samples."
        )


def _reach(features: Tensor, k: int, rank: int, world: int) -> Tensor:
    """Squared distance of each feature to its k-th neighbour: (N, D) -> (N,)."""
    nearest = features.new_full((len(features), k), torch.inf)
    # Only blocks on and above the diagonal, because distances are symmetric.
    for rows, columns in islice(combinations_with_replacement(_blocks(features, BLOCK), 2), rank, None, world):
        distances = _squared_distances(features[rows], features[columns])  # (n, m)
        if rows == columns:
            distances.fill_diagonal_(torch.inf)  # excludes the feature itself
        else:
            _keep_smallest(nearest, columns, distances.T)
        _keep_smallest(nearest, rows, distances)
    if world > 1:  # each process has a part of a feature's neighbours
        nearest = dist.gather(nearest).view(world, len(features), k).transpose(0, 1).flatten(1)  # (N, world * k)
    return nearest.topk(k, dim=1, largest=False).values[:, -1]


def _keep_smallest(nearest: Tensor, rows: slice, distances: Tensor) -> None:
    k = nearest.shape[1]
    # First the k smallest of the block, so that the merge with those found so far sorts only 2 k values.
    few = distances.topk(min(k, distances.shape[1]), dim=1, largest=False, sorted=False).values
    nearest[rows] = torch.cat([nearest[rows], few], 1).topk(k, dim=1, largest=False, sorted=False).values


def _blocks(features: Tensor, size: int) -> list[slice]:
    return [slice(start, min(start + size, len(features))) for start in range(0, len(features), size)]


def _squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """|u|^2 - 2 u.v + |v|^2, reduced by SLACK: (n, D), (m, D) -> (n, m)."""
    squares_u, squares_v = ((1 - SLACK) * x.square().sum(1) for x in (u, v))
    return torch.addmm(squares_v, u, v.T, alpha=-2).add_(squares_u[:, None]).clamp_(min=0)


def _reach_in_half(features: Tensor, k: int) -> Tensor:
    """Distance to the (k + 1)-th nearest, counting itself: (N, D) -> (N,). Rounded distances are not symmetric, so all are computed."""
    reach = []
    for rows in _blocks(features, ADM_BLOCK):
        few = [_smallest(_distances_in_half(features[rows], features[c]), k + 1) for c in _blocks(features, ADM_BLOCK)]
        reach.append(_smallest(torch.cat(few, 1), k + 1)[:, -1])
    return torch.cat(reach)


def _smallest(distances: Tensor, num: int) -> Tensor:
    return distances.topk(min(num, distances.shape[1]), dim=1, largest=False).values


def _distances_in_half(u: Tensor, v: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m) float32 with values rounded to float16, or not rounded if any of them overflows."""
    rounded = _squared_distances_rounded(_to_half(u), _to_half(v), _to_half)
    # The evaluator recomputes a block in float32 if one of its distances exceeds 65,504.
    return rounded if rounded.isfinite().all() else _squared_distances_rounded(u, v, lambda x: x)


def _squared_distances_rounded(u: Tensor, v: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """|u|^2 - 2 u.v + |v|^2, clamped at 0, in the evaluator's order of operations."""
    squares_u, squares_v = (rounding(rounding(x.square()).sum(1)) for x in (u, v))
    products = rounding(u @ v.T)  # (n, m)
    return rounding(rounding(squares_u[:, None] - rounding(2 * products)) + squares_v).clamp_(min=0)


def _to_half(x: Tensor) -> Tensor:
    return x.half().float()
