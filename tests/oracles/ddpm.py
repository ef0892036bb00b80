"""Improved DDPM (Nichol & Dhariwal) as literal loops over samples and elements, float64."""

import math

import numpy as np

BETAS = [1e-4 + (2e-2 - 1e-4) * k / 999 for k in range(1000)]


def alpha_bars(betas):
    bars, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        bars.append(product)
    return bars


def posterior_variance(betas, k):
    bars = alpha_bars(betas)
    before = bars[k - 1] if k > 0 else 1.0
    return betas[k] * (1 - before) / (1 - bars[k])


def posterior_mean(betas, x0, x_k, k):
    bars = alpha_bars(betas)
    before = bars[k - 1] if k > 0 else 1.0
    a = betas[k] * math.sqrt(before) / (1 - bars[k])
    b = (1 - before) * math.sqrt(1 - betas[k]) / (1 - bars[k])
    return a * x0 + b * x_k


def cdf(z):
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def losses(output, x, noise, t):
    """(mse, vb) of each sample; output (N, 2C, H, W) as numpy float64, t a list of steps."""
    all_mse, all_vb = [], []
    bars = alpha_bars(BETAS)
    for n, k in enumerate(t):
        eps_hat, v = np.split(output[n], 2)
        squares, bounds = [], []
        log_beta, log_tilde = math.log(BETAS[k]), math.log(posterior_variance(BETAS, max(k, 1)))
        for x0, eps, e, vi in zip(x[n].flat, noise[n].flat, eps_hat.flat, v.flat, strict=True):
            squares.append((eps - e) ** 2)
            x_k = math.sqrt(bars[k]) * x0 + math.sqrt(1 - bars[k]) * eps
            guess = math.sqrt(1 / bars[k]) * x_k - math.sqrt(1 / bars[k] - 1) * e
            mean, f = posterior_mean(BETAS, guess, x_k, k), (vi + 1) / 2
            log_var = f * log_beta + (1 - f) * log_tilde
            if k == 0:
                std = math.exp(0.5 * log_var)
                upper, lower = cdf((x0 - mean + 1 / 255) / std), cdf((x0 - mean - 1 / 255) / std)
                mass = upper if x0 < -0.999 else 1 - lower if x0 > 0.999 else upper - lower
                bounds.append(-math.log(max(mass, 1e-12)))
            else:
                true_mean = posterior_mean(BETAS, x0, x_k, k)
                kl = -1 + log_var - log_tilde + math.exp(log_tilde - log_var)
                bounds.append(0.5 * (kl + (true_mean - mean) ** 2 * math.exp(-log_var)))
        all_mse.append(sum(squares) / len(squares))
        all_vb.append(sum(bounds) / len(bounds) / math.log(2))
    return np.array(all_mse), np.array(all_vb)
