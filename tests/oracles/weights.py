"""SiT's training loss of noise and score in its own time s (s = 1 is data), one number at a time, with math only."""

import math


def path_of_sit(name, s):
    """alpha, sigma and their derivatives by s."""
    if name == "linear":
        return s, 1 - s, 1.0, -1.0
    if name == "trigonometric":
        angle, rate = math.pi * s / 2, math.pi / 2
        return math.sin(angle), math.cos(angle), rate * math.cos(angle), -rate * math.sin(angle)
    low, high = 0.1, 20.0
    log_alpha = -0.25 * (1 - s) ** 2 * (high - low) - 0.5 * (1 - s) * low
    d_log_alpha = 0.5 * (1 - s) * (high - low) + 0.5 * low
    alpha, sigma = math.exp(log_alpha), math.sqrt(1 - math.exp(2 * log_alpha))
    return alpha, sigma, alpha * d_log_alpha, -math.exp(2 * log_alpha) * d_log_alpha / sigma


def weight(kind, name, s):
    """The weight of each of the three weightings."""
    alpha, sigma, d_alpha, d_sigma = path_of_sit(name, s)
    rate = d_alpha / alpha * sigma**2 - sigma * d_sigma
    return {"none": 1.0, "velocity": (rate / sigma) ** 2, "likelihood": rate / sigma**2}[kind]


def loss(kind, name, prediction, outputs, noises, t):
    """Mean over the elements of one sample, at our time t = 1 - s."""
    s = 1 - t
    sigma, total = path_of_sit(name, s)[1], 0.0
    for output, noise in zip(outputs, noises, strict=True):
        error = output - noise if prediction == "noise" else output * sigma + noise
        total += weight(kind, name, s) * error**2
    return total / len(outputs)
