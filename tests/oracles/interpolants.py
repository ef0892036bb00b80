"""The paths typed out number by number (paper, section 3.1; VP of the SiT paper), with math only."""

import math


def alpha_sigma(name: str, t: float) -> tuple[float, float]:
    if name == "linear":
        return 1 - t, t
    if name == "trigonometric":
        return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    assert name == "vp"
    log_alpha = -0.25 * (20.0 - 0.1) * t * t - 0.5 * 0.1 * t
    return math.exp(log_alpha), math.sqrt(1 - math.exp(2 * log_alpha))


def score_of_paper(velocity: float, x_t: float, alpha: float, sigma: float, d_alpha: float, d_sigma: float) -> float:
    """Eq. 20."""
    return (1 / sigma) * (alpha * velocity - d_alpha * x_t) / (d_alpha * sigma - alpha * d_sigma)
