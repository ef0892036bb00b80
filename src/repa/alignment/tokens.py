"""Tokens made comparable: the same grid, optionally normalised per image. Tokens are row-major: (N, rows * columns, F)."""

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


def resize_tokens(tokens: Tensor, num_tokens: int, grid: tuple[int, int] | None = None) -> Tensor:
    """Resample a row-major token grid to another: (N, M, F) -> (N, num_tokens, F), the same tensor when M fits.

    A smaller grid takes the mean over the area that each new token covers, a larger one is interpolated bilinearly.

    Args:
        grid: (rows, columns) to resample to; None: a square of `num_tokens`. The tokens' own grid is a square, or has
            the same ratio of sides.

    Raises:
        UserError: the grids differ and one has no shape.
    """
    if tokens.shape[1] == num_tokens:
        return tokens
    new = grid or (grid_side(num_tokens),) * 2
    old = grid_like(tokens.shape[1], new)
    image = tokens.transpose(1, 2).unflatten(2, old)  # (N, F, rows, columns)
    if new < old:
        image = F.interpolate(image, size=new, mode="area")
    else:
        image = F.interpolate(image, size=new, mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2)  # (N, T, F)


def grid_like(num_tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of `num_tokens` tokens on a grid with the ratio of sides of `grid`; raises UserError where there is none."""
    rows = math.isqrt(num_tokens * grid[0] // grid[1])
    if rows and rows * (num_tokens // rows) == num_tokens and rows * grid[1] == (num_tokens // rows) * grid[0]:
        return rows, num_tokens // rows
    side = grid_side(num_tokens)
    return side, side


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


def layernorm(tokens: Tensor) -> Tensor:
    """Each token to mean 0 and variance 1 over its channels, (N, T, F): for losses that feel the size of a target, as `mse`."""
    return F.layer_norm(tokens, tokens.shape[-1:])
