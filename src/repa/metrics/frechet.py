"""Frechet distance of two Gaussians: FID on Inception features, sFID on its spatial ones, FD on any encoder's."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from repa.base.errors import UserError


def frechet_distance(
    mu1: Tensor | ArrayLike, sigma1: Tensor | ArrayLike, mu2: Tensor | ArrayLike, sigma2: Tensor | ArrayLike
) -> float:
    """|mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)), in float64; mu (D,), sigma (D, D).

    The trace of the root is that of (S1^(1/2) S2 S1^(1/2))^(1/2), whose argument is symmetric: its eigenvalues are
    real, and what rounding leaves below zero (fewer samples than dimensions) is clamped. No root of an asymmetric
    product is taken, so nothing imaginary is ever dropped and no multiple of the identity is added.

    Raises:
        UserError: shapes do not fit, or a value is not finite.
    """
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
    return max(distance.item(), 0.0)
