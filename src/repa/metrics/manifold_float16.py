"""Precision and recall as the evaluator of ADM (Dhariwal and Nichol 2021) computes them: distances in float16."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from repa.base.precision import exact_float32
from repa.metrics.manifold import PrecisionRecall, check_sets

BLOCK = 10_000  # rows and columns of a block, the evaluator's: its fall-back to float32 is decided for each


def precision_recall_in_half(reference: Tensor, samples: Tensor, k: int = 3) -> PrecisionRecall:
    """Like `precision_recall`, rounded as the published figures are; (N, D) and (M, D).

    Squared norms, products and their sums are each rounded to float16, and a feature's reach is the (k + 1)-th smallest
    distance in its set, itself counted, which rounding may put anywhere. Sums run in float32 here; in which order and
    precision a GPU adds within a product is not known, so the last digit of published figures can still differ.

    Raises:
        UserError: as `precision_recall`.
    """
    check_sets(reference, samples, k)
    reference, samples = reference.float(), samples.to(reference.device).float()
    with exact_float32(reference.device):
        reach_reference, reach_samples = (_reach(features, k) for features in (reference, samples))
        covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
        real = torch.zeros(len(samples), dtype=torch.bool, device=reference.device)
        for rows in _blocks(reference):
            for columns in _blocks(samples):
                distances = _squared_distances(reference[rows], samples[columns])  # (n, m)
                covered[rows] |= (distances <= reach_samples[columns]).any(1)
                real[columns] |= (distances <= reach_reference[rows, None]).any(0)
    return PrecisionRecall(real.double().mean().item(), covered.double().mean().item())


def _reach(features: Tensor, k: int) -> Tensor:
    """(N, D) -> (N,)."""
    reach = []
    for rows in _blocks(features):
        few = [_smallest(_squared_distances(features[rows], features[c]), k + 1) for c in _blocks(features)]
        reach.append(_smallest(torch.cat(few, 1), k + 1)[:, -1])
    return torch.cat(reach)


def _smallest(distances: Tensor, num: int) -> Tensor:
    return distances.topk(min(num, distances.shape[1]), dim=1, largest=False).values


def _blocks(features: Tensor) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, len(features), BLOCK))


def _squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m) float32 that holds float16 values, or float32 ones where any of those overflowed."""
    rounded = _expand(_round(u), _round(v), _round)
    return rounded if rounded.isfinite().all() else _expand(u, v, lambda x: x)


def _expand(u: Tensor, v: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """|u|^2 - 2 u.v + |v|^2, clamped at 0, in the evaluator's order."""
    squares_u, squares_v = (rounding(rounding(x.square()).sum(1)) for x in (u, v))
    products = rounding(u @ v.T)  # (n, m)
    return rounding(rounding(squares_u[:, None] - rounding(2 * products)) + squares_v).clamp_(min=0)


def _round(x: Tensor) -> Tensor:
    return x.half().float()
