"""Power-function averages by definition: sums and integrals in float64."""

import numpy as np


def profile_of_steps(t: int, gamma: float) -> np.ndarray:
    """Weights (t,) of the networks of steps 1 ... t: the integral of the profile over (tau - 1, tau]."""
    edges = np.arange(t + 1, dtype=np.float64) ** (gamma + 1) / float(t) ** (gamma + 1)
    return np.diff(edges)


def density(tau: np.ndarray, t: float, gamma: float) -> np.ndarray:
    return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)


def integral(values: np.ndarray, tau: np.ndarray) -> float:
    return float(np.sum((values[1:] + values[:-1]) / 2 * np.diff(tau)))
