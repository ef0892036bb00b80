"""Stored forms of tokens, one number at a time in float64."""

import numpy as np


def int8_token(token: np.ndarray) -> tuple[list[int], float]:
    """(D,) -> codes and their scale."""
    scale = max(abs(float(x)) for x in token) / 127
    return [round(float(x) / scale) if scale else 0 for x in token], scale


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def int8_cosine_bound(token: np.ndarray) -> float:
    """A lower bound of the cosine after rounding to int8: every entry changes by at most half a scale."""
    token = token.astype(np.float64)
    ratio = np.abs(token).max() / (254 * np.sqrt(np.mean(token**2)))
    return float(np.sqrt(1 - ratio**2))


def principal_directions(tokens: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """(M, D) -> mean and the first `num` right singular vectors of the centred tokens, by a float64 SVD."""
    tokens = tokens.astype(np.float64)
    mean = tokens.mean(0)
    return mean, np.linalg.svd(tokens - mean, full_matrices=False)[2][:num]
