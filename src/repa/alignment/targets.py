"""The encoder's patches made comparable with the transformer's tokens: same grid, optionally normalised per image.

Tokens are row-major on a square grid: (N, G * G, F).
"""

import math

import torch.nn.functional as F
from torch import Tensor

from repa.base.errors import UserError


def grid_side(num_tokens: int) -> int:
    """Side of the square grid of tokens: 256 -> 16; raises UserError where they are none."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens or side == 0:
        raise UserError(
            f"{num_tokens} tokens are not a square grid: patch tokens come as 16 x 16, 32 x 32 and so on, "
            "without class or register tokens."
        )
    return side


def resize_tokens(tokens: Tensor, num_tokens: int) -> Tensor:
    """Resample a square token grid to another: (N, M, F) -> (N, num_tokens, F), the same tensor when M fits.

    A smaller grid takes the mean over the area that each new token covers, a larger one is interpolated bilinearly.
    Raises UserError when the grids differ and one is not square.
    """
    if tokens.shape[1] == num_tokens:
        return tokens
    old, new = grid_side(tokens.shape[1]), grid_side(num_tokens)
    grid = tokens.transpose(1, 2).unflatten(2, (old, old))  # (N, F, G, G)
    if new < old:
        grid = F.interpolate(grid, size=(new, new), mode="area")
    else:
        grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2)  # (N, T, F)


def identity(tokens: Tensor) -> Tensor:
    """The paper's choice: patches as the encoder gives them."""
    return tokens


def zscore(tokens: Tensor, *, alpha: float = 0.6) -> Tensor:
    """Spatial normalisation of iREPA (arXiv 2512.10794): (y - alpha * mean(y)) / (std(y) + 1e-6), same shape (N, T, F).

    Mean and unbiased standard deviation are over the tokens of an image, per channel. What all patches share says
    nothing about places; alpha is the part of it that is taken away.
    """
    if not isinstance(alpha, (int, float)):
        raise UserError(f"The token normalisation 'zscore' needs a number as 'alpha', but got {alpha!r}.")
    if tokens.shape[1] < 2:
        raise UserError(
            "The token normalisation 'zscore' needs at least 2 tokens per image, but got 1: use token_norm none."
        )
    mean, std = tokens.mean(1, keepdim=True), tokens.std(1, keepdim=True)  # (N, 1, F), unbiased
    return (tokens - alpha * mean) / (std + 1e-6)
