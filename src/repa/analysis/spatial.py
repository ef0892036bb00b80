"""Spatial structure of patch features, which predicts the benefit of an encoder as a target (iREPA, arXiv 2512.10794).

Patches (N, T, C) are row-major on a square grid; every function returns one number per image, (N,). Over 27 encoders
that paper reports correlations with the FID of -0.85 (LDS, CDS) and -0.89 (RMSC); linear probing has -0.26.
LDS and CDS raise UserError if the tokens do not form a square grid or the grid does not contain the distance.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from repa.base.errors import UserError

FAR = 6  # LDS: smallest Manhattan distance of distant patches
MAX_DISTANCE = 8  # CDS: largest distance of the slope


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
