"""Bicubic resampling in float64 loops; pixels are areas (align_corners False), as in torch and PIL."""

import math

import numpy as np


def cubic(x: float, a: float) -> float:
    """Keys' kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def plain_matrix(size_in: int, size_out: int) -> np.ndarray:
    """(out, in) weights without antialias: four taps, a = -0.75, repeated borders."""
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        centre = (i + 0.5) * size_in / size_out - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(tap, 0), size_in - 1)] += cubic(centre - tap, -0.75)
    return matrix


def antialias_matrix(size_in: int, size_out: int) -> np.ndarray:
    """(out, in) weights with antialias: the kernel (a = -0.5) stretched by the shrinking factor; weights sum to 1."""
    scale = size_in / size_out
    widen = max(scale, 1.0)
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        centre = (i + 0.5) * scale
        for j in range(size_in):
            matrix[i, j] = cubic((j + 0.5 - centre) / widen, -0.5)
        matrix[i] /= matrix[i].sum()
    return matrix


def resize(image: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    """(..., S, S) -> (..., size, size), separable."""
    matrix = (antialias_matrix if antialias else plain_matrix)(image.shape[-1], size)
    return np.einsum("ih,...hw,jw->...ij", matrix, image.astype(np.float64), matrix)
