"""How alike two representations of the same images are: CKNNA (Eqs. 21-24 of the paper) and CKA.

n images; features a (n, D), b (n, E); kernels K = a a^T and L = b b^T. No n x n matrix is kept: CKNNA needs the kernels
only between neighbours, n * k values, and CKA only D x E products.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from repa.base.errors import UserError

BLOCK = 1024  # rows of a kernel held at a time: 80 MB in float64 for 10 000 images


def cknna(a: Tensor, b: Tensor, k: int = 10, variant: Literal["paper", "platonic"] = "paper") -> float:
    """Kernel alignment over the pairs that are among each other's nearest neighbours in both representations.

    The paper (k = 10, 10 000 images, hidden states averaged over tokens, null label) prints

        Align(K, L) = sum_ij alpha_ij (K_ij - mean_l K_il) (L_ij - mean_l L_il)
        CKNNA = Align(K, L) / sqrt(Align(K, K) Align(L, L))

    with alpha_ij = 1 where j != i is among the k nearest neighbours of i in both. What most people call CKNNA is the
    code of the Platonic Representation Hypothesis (Huh et al. 2024), which computes another number: never mix the two.

    "paper" is the formula as printed: features are taken as they are, neighbours are by Euclidean distance, each row of
    a kernel is centred. Scale the rows to unit length first where lengths should not matter.

    "platonic" clamps features to the 95th percentile of their magnitude and scales rows to unit length; neighbours are
    by inner product; kernels are not centred before all other pairs are set to zero; HSIC is the unbiased estimator of
    Song et al. (2012), whose first term sees only pairs that are neighbours both ways. The result can be slightly
    negative, and changes a little when a and b are swapped.

    Args:
        a: (n, D), one row per image.
        b: (n, E), the same images in the same order.
        k: number of neighbours, below n; at least 2 for "platonic", which also needs n >= 4.
        variant: which of the two.

    Returns:
        1 for a representation with itself; NaN when nothing can be told, as when all features are equal.

    Raises:
        UserError: a and b are not of the same n images, k does not fit n, or the variant is unknown.
    """
    a, b = _pair(a, b)
    if variant not in ("paper", "platonic"):
        raise UserError(f"CKNNA has the variants 'paper' and 'platonic', but was given {variant!r}.")
    least = 1 if variant == "paper" else 2
    if not least <= k < len(a) or (variant == "platonic" and len(a) < 4):
        raise UserError(f"CKNNA ({variant}) needs {least} <= k < number of images, but got k={k} and {len(a)} images.")
    return _paper(a, b, k) if variant == "paper" else _platonic(a, b, k)


def cka(a: Tensor, b: Tensor, unbiased: bool = False) -> float:
    """Centred kernel alignment HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with linear kernels (Kornblith et al. 2019).

    Kernels are centred over rows and columns, which is what makes it blind to a common offset; the paper prints HSIC
    with the centring of rows only. Invariant to rotation and scale of either side.

    Args:
        a: (n, D), one row per image.
        b: (n, E), the same images in the same order.
        unbiased: HSIC by the estimator of Song et al. (2012), which does not grow with D / n and can fall below 0.

    Returns:
        1 for a representation with itself; NaN when one of them is constant.

    Raises:
        UserError: a and b are not of the same n images, or n is below 2 (4 when unbiased).
    """
    a, b = _pair(a, b)
    if len(a) < (4 if unbiased else 2):
        raise UserError(f"CKA needs at least {4 if unbiased else 2} images, but got {len(a)}.")
    a, b = a - a.mean(0), b - b.mean(0)
    hsic = _hsic_unbiased if unbiased else _hsic
    return (hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()).item()


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise UserError(
            f"Representations to compare are (n, D) and (n, E) of the same n images, but got {tuple(a.shape)} "
            f"and {tuple(b.shape)}."
        )
    return a.detach().cpu().double(), b.detach().cpu().double()


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    """sum_ij K_ij L_ij of centred features, without K and L."""
    return (a.T @ b).square().sum()


def _hsic_unbiased(a: Tensor, b: Tensor) -> Tensor:
    """Song et al. (2012), Eq. 5, times n (n - 3), with K and L without their diagonals."""
    n = len(a)
    own_a, own_b = a.square().sum(1), b.square().sum(1)  # (n,), the diagonals
    rows_a, rows_b = a @ a.sum(0) - own_a, b @ b.sum(0) - own_b  # (n,), sums of rows
    product = (a.T @ b).square().sum() - own_a @ own_b
    return product + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_a @ rows_b)


def _neighbours(x: Tensor, k: int, closeness: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Indices of the k closest other rows of x, (n, D) -> (n, k)."""
    found = []
    for start in range(0, len(x), BLOCK):
        close = closeness(x[start : start + BLOCK], x)  # (rows, n)
        own = torch.arange(len(close))
        close[own, own + start] = -torch.inf
        found.append(close.topk(k, dim=1).indices)
    return torch.cat(found)


def _nearness(block: Tensor, x: Tensor) -> Tensor:
    """Falls with the Euclidean distance along each row: 2uv - |v|^2."""
    return torch.addmm(-x.square().sum(1), block, x.T, alpha=2)


def _inner(block: Tensor, x: Tensor) -> Tensor:
    return block @ x.T


def _shared(near: Tensor, other: Tensor) -> Tensor:
    """Which neighbours (n, k) are neighbours in the other representation too."""
    return (near[:, :, None] == other[:, None, :]).any(2)  # (n, k)


def _kernel(x: Tensor, y: Tensor, near: Tensor) -> Tensor:
    """Inner products of row i of x with the rows near[i] of y: (n, k)."""
    blocks = (torch.einsum("nd,nkd->nk", x[i : i + BLOCK], y[near[i : i + BLOCK]]) for i in range(0, len(x), BLOCK))
    return torch.cat(list(blocks))


def _paper(a: Tensor, b: Tensor, k: int) -> float:
    near_a, near_b = _neighbours(a, k, _nearness), _neighbours(b, k, _nearness)  # (n, k)

    def align(x: Tensor, y: Tensor, near: Tensor, alpha: Tensor) -> Tensor:
        # K_ij - mean_l K_il = <x_i, x_j - mean x>
        return (alpha * _kernel(x, x - x.mean(0), near) * _kernel(y, y - y.mean(0), near)).sum()

    everywhere = torch.ones_like(near_a, dtype=torch.bool)
    both = align(a, b, near_a, _shared(near_a, near_b))
    return (both / (align(a, a, near_a, everywhere) * align(b, b, near_b, everywhere)).sqrt()).item()


def _platonic(a: Tensor, b: Tensor, k: int) -> float:
    a, b = _prepare(a), _prepare(b)
    near_a, near_b = _neighbours(a, k, _inner), _neighbours(b, k, _inner)  # (n, k)
    everywhere = torch.ones_like(near_a, dtype=torch.bool)
    both = _masked_hsic(a, b, near_a, _shared(near_a, near_b))
    own = _masked_hsic(a, a, near_a, everywhere) * _masked_hsic(b, b, near_b, everywhere)
    return (both / (own.sqrt() + 1e-6)).item()


def _prepare(x: Tensor) -> Tensor:
    """Clamp outliers, then unit length."""
    bound = x.abs().flatten().kthvalue(int(0.95 * x.numel()) + 1).values
    return torch.nn.functional.normalize(x.clamp(-bound, bound), dim=1)


def _masked_hsic(a: Tensor, b: Tensor, near: Tensor, mask: Tensor) -> Tensor:
    """Unbiased HSIC of the kernels, all entries zero but (i, near[i, p]) where mask[i, p]; near and mask (n, k)."""
    n = len(a)
    k_values, l_values = mask * _kernel(a, a, near), mask * _kernel(b, b, near)  # (n, k)
    rows = torch.arange(n)[:, None, None]
    returned = ((near[near] == rows) & mask[near]).any(2)  # (n, k), whether entry (j, i) is kept too
    columns = torch.zeros(n, dtype=a.dtype).index_add_(0, near.flatten(), k_values.flatten())  # (n,), sums of K's
    product = (k_values * l_values * returned).sum()
    sums = k_values.sum() * l_values.sum() / ((n - 1) * (n - 2))
    return (product + sums - 2 / (n - 2) * (columns @ l_values.sum(1))) / (n * (n - 3))
