"""Kernel distance, KID on Inception features (Binkowski et al. 2018)."""

import torch
from torch import Tensor

from repa.base import rng
from repa.base.errors import UserError


def kernel_distance(
    reference: Tensor,
    samples: Tensor,
    *,
    degree: int = 3,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Unbiased squared MMD with the kernel (x . y / D + 1)^degree, averaged over random subsets; (N, D) and (M, D).

    Each subset draws `subset_size` features from each set without repetition. Unbiased: small values can be negative.

    Raises:
        UserError: widths differ, or a set has fewer features than a subset.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise UserError(
            f"The kernel distance compares features (N, D) and (M, D), but got {tuple(reference.shape)} and "
            f"{tuple(samples.shape)}."
        )
    if not 2 <= subset_size <= min(len(reference), len(samples)) or num_subsets < 1:
        raise UserError(
            f"The kernel distance needs subsets of 2 to {min(len(reference), len(samples))} features and at least one "
            f"of them, but got subset_size={subset_size} and num_subsets={num_subsets}."
        )
    generator = rng.generator(seed, "kernel_distance")
    total = 0.0
    for _ in range(num_subsets):
        x, y = (
            features[torch.randperm(len(features), generator=generator)[:subset_size].to(features.device)]
            .cpu()
            .double()
            for features in (reference, samples)
        )
        total += _squared_mmd(x, y, degree)
    return total / num_subsets


def _squared_mmd(x: Tensor, y: Tensor, degree: int) -> float:
    """Unbiased: pairs of a feature with itself are left out; (m, D), (m, D)."""
    m, dim = x.shape
    xx, yy, xy = ((a @ b.T / dim + 1) ** degree for a, b in ((x, x), (y, y), (x, y)))  # (m, m)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1))
    return (within - 2 * xy.mean()).item()
