"""Distances of two sets of features: Fréchet (FID and sFID for Inception, FD for any encoder) and kernel (KID)."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from repa.base import rng
from repa.base.errors import UserError


def frechet_distance(
    mu1: Tensor | ArrayLike, sigma1: Tensor | ArrayLike, mu2: Tensor | ArrayLike, sigma2: Tensor | ArrayLike
) -> float:
    """|mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)), in float64; mu (D,), sigma (D, D).

    The trace of the root is computed as that of (S1^(1/2) S2 S1^(1/2))^(1/2), whose argument is symmetric. Its eigenvalues
    are real, and negative ones from rounding (with fewer samples than dimensions) are clamped. Unlike the root of the
    asymmetric product, it needs no dropping of imaginary parts and no added multiple of the identity.

    Raises:
        UserError: shapes do not fit, or a value is not finite.
    """
    # On the CPU: MPS has no float64, and the last digits should not depend on the device.
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).cpu().double() for x in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not (sigma1.shape == sigma2.shape == (*mu1.shape, *mu1.shape)):
        raise UserError(
            "The Frechet distance needs two means (D,) and two covariances (D, D) of the same features, but got "
            f"{tuple(mu1.shape)}, {tuple(sigma1.shape)} and {tuple(mu2.shape)}, {tuple(sigma2.shape)}."
        )
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise UserError("The Frechet distance needs finite statistics, but got NaN or infinity: check the features.")
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # (D, D), sigma1^(1/2)
    trace = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    return max(distance.item(), 0.0)  # rounding may make the distance of a set to itself negative


def check_features(a: Tensor, b: Tensor, what: str) -> None:
    """Raises UserError unless two sets of features are finite and (N, D) and (M, D); `what` names the metric."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"{what}: features must be (N, D) and (M, D), but got {tuple(a.shape)} and {tuple(b.shape)}.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError(
            f"{what}: features must be finite, but contain NaN or infinity: check the images and the weights."
        )


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

    KID on Inception's features (Binkowski et al. 2018).

    Each subset has `subset_size` random features of each set, without repetition. Unbiased: small values can be negative.

    Raises:
        UserError: widths differ, a set is smaller than a subset, or a feature is not finite.
    """
    check_features(reference, samples, "Kernel distance")
    if not 2 <= subset_size <= min(len(reference), len(samples)) or num_subsets < 1:
        raise UserError(
            f"The kernel distance needs subsets of 2 to {min(len(reference), len(samples))} features and at least one "
            f"subset, but got subset_size={subset_size} and num_subsets={num_subsets}."
        )
    generator = rng.generator(seed, "kernel_distance")
    total = 0.0
    for _ in range(num_subsets):
        # From a CPU generator, so that the subsets do not depend on the device of the features.
        x, y = (f[torch.randperm(len(f), generator=generator)[:subset_size].to(f.device)] for f in (reference, samples))
        total += _squared_mmd(x.cpu().double(), y.cpu().double(), degree)
    return total / num_subsets


def _squared_mmd(x: Tensor, y: Tensor, degree: int) -> float:
    """Unbiased, without pairs of a feature with itself; (m, D), (m, D)."""
    m, dim = x.shape
    xx, yy, xy = ((a @ b.T / dim + 1) ** degree for a, b in ((x, x), (y, y), (x, y)))  # (m, m)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1))
    return (within - 2 * xy.mean()).item()
