"""Measures of representations: similarity of two (CKNNA, Eqs. 21-24 of the paper, and CKA), and spatial structure of one.

Similarity is of the same n images; features a (n, D), b (n, E); kernels K = a a^T and L = b b^T. No n x n matrix is kept:
CKNNA needs the kernels only between neighbours, n * k values, and CKA only D x E products. Everything is float64, on the
device of the features (MPS has no float64: there on the CPU); besides the features, 8 n (D + E) bytes, there are blocks of
BLOCK_BYTES.

Spatial structure predicts the benefit of an encoder as a target (iREPA, arXiv 2512.10794). Patches (N, T, C) are row-major
on a square grid; every function returns one number per image, (N,). Over 27 encoders that paper reports correlations with
the FID of -0.85 (LDS, CDS) and -0.89 (RMSC); linear probing has -0.26. LDS and CDS raise UserError if the tokens do not
form a square grid or the grid does not contain the distance.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from repa.base.errors import UserError, require_type

BLOCK_BYTES = 2**23  # size of a block of a kernel, or of some images' neighbours
FAR = 6  # LDS: smallest Manhattan distance of distant patches
MAX_DISTANCE = 8  # CDS: largest distance of the slope

Variant = Literal["paper", "platonic", "platonic-clamped"]


def cknna(a: Tensor, b: Tensor, k: int = 10, variant: Variant = "paper") -> float:
    """Kernel alignment over pairs of images that are nearest neighbours in both representations.

    The paper (k = 10, 10 000 images, hidden states averaged over tokens, null label) prints

        Align(K, L) = sum_ij alpha_ij (K_ij - mean_l K_il) (L_ij - mean_l L_il)
        CKNNA = Align(K, L) / sqrt(Align(K, K) Align(L, L))

    with alpha_ij = 1 if j != i is among the k nearest neighbours of i in both. Most publications use the code of the Platonic
    Representation Hypothesis (Huh et al. 2024), which computes another number: never compare the two.

    "paper" is the printed formula: features are not normalised, neighbours are by Euclidean distance, and each row of a
    kernel is centred. Scale the features to unit length first if their lengths should not matter.

    "platonic" is the function `cknna` of that code on features of unit length: neighbours are by inner product; kernels are
    not centred before all other pairs are set to zero; HSIC is the unbiased estimator of Song et al. (2012), whose first
    term includes only mutual neighbours. The result can be slightly negative, and changes a little if a and b are swapped.

    "platonic-clamped" first clamps features to the 95th percentile of their magnitude, as the script of that code does
    before it calls the function. For networks with a few very large channels, the two variants can differ widely.

    Args:
        a: (n, D), one row per image.
        b: (n, E), the same images in the same order.
        k: number of neighbours, below n; at least 2 for the platonic ones, which also need n >= 4.
        variant: which of the three.

    Returns:
        1 for a representation with itself, about k / n for unrelated ones; NaN if undefined, for example if all features are equal.

    Raises:
        UserError: a and b have different numbers of images, k does not fit n, or the variant is unknown.
    """
    _check_pair(a, b)
    return cknna_of(neighbourhoods(a, k, variant), neighbourhoods(b, k, variant))


class Neighbourhoods(NamedTuple):
    """One side of a CKNNA, computed once for many comparisons."""

    features: Tensor  # (n, D) float64, normalised for the variant
    centre: Tensor  # (D,); the kernel is <x_i, x_j - centre>
    near: Tensor  # (n, k) indices of the nearest others
    variant: str
    own: float  # alignment with itself


def neighbourhoods(x: Tensor, k: int = 10, variant: Variant = "paper") -> Neighbourhoods:
    """The input of `cknna_of` for features (n, D); raises UserError if k does not fit n, or the variant is unknown."""
    if x.ndim != 2:
        raise UserError(f"A representation must be (n, D), but got {tuple(x.shape)}.")
    if variant not in get_args(Variant):
        raise UserError(f"CKNNA has the variants {', '.join(get_args(Variant))}, but got {variant!r}.")
    least = 1 if variant == "paper" else 2
    if not least <= k < len(x) or (variant != "paper" and len(x) < 4):
        raise UserError(f"CKNNA ({variant}) needs {least} <= k < number of images, but got k={k} and {len(x)} images.")
    x = _double(x)
    if variant == "paper":
        side = Neighbourhoods(x, x.mean(0), _neighbours(x, k, euclidean=True), variant, 0.0)
    else:
        x = torch.nn.functional.normalize(_clamped(x) if variant == "platonic-clamped" else x, dim=1)
        side = Neighbourhoods(x, x.new_zeros(x.shape[1]), _neighbours(x, k, euclidean=False), variant, 0.0)
    return side._replace(own=_align(side, side))


def cknna_of(a: Neighbourhoods, b: Neighbourhoods) -> float:
    """CKNNA (Eqs. 21-24) of two sides made with the same k and variant; see `cknna`."""
    assert (a.variant, a.near.shape) == (b.variant, b.near.shape), "sides of different images, k or variants"
    own = a.own * b.own  # unbiased estimates may be negative, and then have no root
    # The released code adds 1e-6 to the norm; the paper's formula has nothing there.
    norm = (own**0.5 if own >= 0 else float("nan")) + (0.0 if a.variant == "paper" else 1e-6)
    return _align(a, b) / norm if norm else float("nan")


def cka(a: Tensor, b: Tensor, unbiased: bool = False) -> float:
    """Centred kernel alignment HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with linear kernels (Kornblith et al. 2019).

    Kernels are centred over rows and columns, which makes CKA invariant to a common offset; the paper prints HSIC with
    centred rows only. Invariant to rotation and scale of either side.

    Args:
        a: (n, D), one row per image.
        b: (n, E), the same images in the same order.
        unbiased: HSIC by the estimator of Song et al. (2012), which does not grow with D / n and can fall below 0.

    Returns:
        1 for a representation with itself; NaN if one of them is constant.

    Raises:
        UserError: a and b have different numbers of images, or n is below 2 (4 if unbiased).
    """
    _check_pair(a, b)
    if len(a) < (4 if unbiased else 2):
        raise UserError(f"CKA needs at least {4 if unbiased else 2} images, but got {len(a)}.")
    a, b = _double(a), _double(b)
    a, b = a - a.mean(0), b - b.mean(0)
    hsic = _hsic_unbiased if unbiased else _hsic
    return (hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()).item()


def _check_pair(a: Tensor, b: Tensor) -> None:
    for x in (a, b):
        require_type(x, Tensor, "Representations to compare are tensors (n, D)")
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise UserError(
            f"Representations to compare are (n, D) and (n, E) of the same n images, but got {tuple(a.shape)} "
            f"and {tuple(b.shape)}."
        )


def _double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).detach().double()


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


def _blocks(n: int, row_bytes: int) -> list[slice]:
    """n rows in blocks of at most BLOCK_BYTES, with row_bytes per row."""
    rows = max(1, BLOCK_BYTES // row_bytes)
    return [slice(start, start + rows) for start in range(0, n, rows)]


def _neighbours(x: Tensor, k: int, *, euclidean: bool) -> Tensor:
    """Indices of the k closest other rows of x, (n, D) -> (n, k): by Euclidean distance, or by inner product."""
    lengths = x.square().sum(1)
    near = torch.empty(len(x), k, dtype=torch.int64, device=x.device)  # at once: parts would fragment memory
    for block in _blocks(len(x), 8 * len(x)):
        if euclidean:  # 2uv - |v|^2 falls with the distance along each row
            close = torch.addmm(-lengths, x[block], x.T, alpha=2)  # (rows, n)
        else:
            close = x[block] @ x.T
        own = torch.arange(len(close), device=x.device)
        close[own, own + block.start] = -torch.inf  # an image is not its own neighbour
        near[block] = close.topk(k, dim=1).indices
    return near


def _kernel(side: Neighbourhoods, near: Tensor) -> Tensor:
    """<x_i, x_j - centre> for j in near[i]: (n, k)."""
    x, k = side.features, near.shape[1]
    values = x.new_empty(near.shape)
    for block in _blocks(len(x), 8 * k * x.shape[1]):  # whose neighbours' features are (rows, k, D)
        values[block] = torch.einsum("nd,nkd->nk", x[block], x[near[block]].sub_(side.centre))
    return values


def _align(a: Neighbourhoods, b: Neighbourhoods) -> float:
    """Align(K, L) of the paper (Eqs. 21-24), up to its constant factor; for the other variants the unbiased HSIC of the masked kernels."""
    near = a.near
    shared = (near[:, :, None] == b.near[:, None, :]).any(2)  # (n, k), neighbours of both
    # The mask keeps pairs that are neighbours in both, so searching a's neighbours is enough.
    k_values = shared * _kernel(a, near)  # (n, k)
    l_values = shared * _kernel(b, near)
    if a.variant == "paper":
        return (k_values * l_values).sum().item()
    n = len(near)
    rows = torch.arange(n, device=near.device)[:, None, None]
    returned = ((near[near] == rows) & shared[near]).any(2)  # (n, k), whether entry (j, i) is kept too
    columns = k_values.new_zeros(n).index_add_(0, near.flatten(), k_values.flatten())  # (n,), sums of K's
    product = (k_values * l_values * returned).sum()
    sums = k_values.sum() * l_values.sum() / ((n - 1) * (n - 2))
    return ((product + sums - 2 / (n - 2) * (columns @ l_values.sum(1))) / (n * (n - 3))).item()


def _clamped(x: Tensor) -> Tensor:
    """Clamp to the 95th percentile of all magnitudes."""
    magnitudes, rank = x.abs().flatten().cpu().numpy(), int(0.95 * x.numel())
    magnitudes.partition(rank)  # in place: kthvalue needs two more copies
    bound = float(magnitudes[rank])
    return x.clamp(-bound, bound)


def local_distance_similarity(patches: Tensor, *, far: int = FAR) -> Tensor:
    """LDS: mean cosine of adjacent patches minus that of patches at Manhattan distance `far` or more."""
    by_distance, num_pairs = _cosine_by_distance(patches, need=far)
    pairs = num_pairs[far:]  # a mean over pairs, not over distances: few pairs are in opposite corners
    return by_distance[:, 1] - (by_distance[:, far:] * pairs).sum(1) / pairs.sum()


def correlation_decay_slope(patches: Tensor, *, max_distance: int = MAX_DISTANCE) -> Tensor:
    """CDS: minus the least-squares slope of the mean cosine against Manhattan distance 1 ... max_distance."""
    if max_distance < 2:
        raise UserError(f"A slope needs at least 2 distances, but got max_distance={max_distance}.")
    by_distance, _ = _cosine_by_distance(patches, need=max_distance)
    distances = torch.arange(1.0, max_distance + 1, device=patches.device)
    # Least squares in closed form: sum (d - mean d) y / sum (d - mean d)^2.
    centred = distances - distances.mean()
    return -(by_distance[:, 1 : max_distance + 1] * centred).sum(1) / centred.square().sum()


def rms_spatial_contrast(patches: Tensor) -> Tensor:
    """RMSC: root mean square distance of unit-length patches from their mean; 0 if all are equal."""
    unit = F.normalize(patches.float(), dim=-1)
    return (unit - unit.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt()


def _cosine_by_distance(patches: Tensor, need: int) -> tuple[Tensor, Tensor]:
    """Mean cosine of all pairs at each Manhattan distance (N, 2G - 1) and the number of those pairs (2G - 1,)."""
    side = math.isqrt(patches.shape[1])
    if patches.ndim != 3 or side * side != patches.shape[1]:
        raise UserError(f"Patches must be (N, G * G, C) on a square grid, but got {tuple(patches.shape)}.")
    if not 1 <= need <= 2 * side - 2:
        raise UserError(
            f"A grid of {side} x {side} patches has distances 1 to {2 * side - 2}, but {need} is needed: use a larger grid."
        )
    place = torch.arange(side * side, device=patches.device)
    row, column = place // side, place % side
    distance = (row[:, None] - row).abs() + (column[:, None] - column).abs()  # (T, T)
    num_pairs = distance.flatten().bincount().float()  # (2G - 1,)
    unit = F.normalize(patches.float(), dim=-1)
    cosine = (unit @ unit.transpose(1, 2)).flatten(1)  # (N, T * T)
    sums = cosine.new_zeros(len(patches), 2 * side - 1).index_add_(1, distance.flatten(), cosine)
    return sums / num_pairs, num_pairs
