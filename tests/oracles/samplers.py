"""The reference samplers as literal loops: numpy, float64, one scalar expression per line.

Only the grids come from torch: its linspace rounds differently from numpy's, and guidance intervals are closed.
"""

import math

import numpy as np
import torch


def path(name, t):
    """alpha, sigma, alpha', sigma'."""
    if name == "linear":
        return 1 - t, t, -1.0, 1.0
    h = math.pi / 2
    return math.cos(h * t), math.sin(h * t), -h * math.sin(h * t), h * math.cos(h * t)


def guide(velocity, x, t, scale, low, high):
    """Guide velocity(x, t, conditional: bool) within a closed interval in t, on all channels."""
    if scale > 1 and low <= t <= high:
        v_null = velocity(x, t, False)
        return v_null + scale * (velocity(x, t, True) - v_null)
    return velocity(x, t, True)


def euler(velocity, x, num_steps, scale=1.0, low=0.0, high=1.0):
    grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).numpy()
    for i in range(num_steps):
        x = x + (grid[i + 1] - grid[i]) * guide(velocity, x, grid[i], scale, low, high)
    return x


def heun(velocity, x, num_steps, scale=1.0, low=0.0, high=1.0, decide_by_own_time=True):
    """decide_by_own_time=False is the reference: the corrector's guidance is decided by t_cur."""
    grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).numpy()
    for i in range(num_steps):
        t, t_next = grid[i], grid[i + 1]
        d = guide(velocity, x, t, scale, low, high)
        x_next = x + (t_next - t) * d
        if i < num_steps - 1:
            if decide_by_own_time:
                d_prime = guide(velocity, x_next, t_next, scale, low, high)
            else:
                on = low <= t <= high
                d_prime = guide(velocity, x_next, t_next, scale if on else 1.0, 0.0, 1.0)
            x_next = x + (t_next - t) * (0.5 * d + 0.5 * d_prime)
        x = x_next
    return x


def euler_maruyama(velocity, x, num_steps, noises, name="linear", w_of_t=lambda t: 2 * t, scale=1.0, low=0.0, high=1.0):
    """Guidance mixes the drifts d, as the reference does; noises[i] is the draw of step i."""
    grid = np.append(torch.linspace(1, 0.04, num_steps, dtype=torch.float64).numpy(), 0.0)
    for i in range(num_steps):
        t, dt = grid[i], grid[i + 1] - grid[i]
        w = w_of_t(t)

        def drift(x, t, conditional, w=w):
            v = velocity(x, t, conditional)
            alpha, sigma, d_alpha, d_sigma = path(name, t)
            r = alpha / d_alpha
            s = (r * v - x) / (sigma**2 - r * d_sigma * sigma)
            return v - 0.5 * w * s

        x = x + guide(drift, x, t, scale, low, high) * dt
        if i < num_steps - 1:
            x = x + math.sqrt(w) * math.sqrt(abs(dt)) * noises[i]
    return x


def reg(velocities, state, num_steps, noises, name, scales, low, high):
    """REG: latents and vector share the times, each with its own noise and guidance scale; scale 0 leaves a part conditional."""
    grid = np.append(torch.linspace(1, 0.04, num_steps, dtype=torch.float64).numpy(), 0.0)
    for i in range(num_steps):
        t, dt = grid[i], grid[i + 1] - grid[i]
        w = 2 * t
        alpha, sigma, d_alpha, d_sigma = path(name, t)
        r = alpha / d_alpha

        def drifts(conditional, state=state, t=t, w=w, r=r, sigma=sigma, d_sigma=d_sigma):
            both = zip(velocities(*state, t, conditional), state, strict=True)
            return [v - 0.5 * w * (r * v - x) / (sigma**2 - r * d_sigma * sigma) for v, x in both]

        found = drifts(True)
        if low <= t <= high:
            nulls = drifts(False)
            found = [n + s * (d - n) if s > 0 else d for d, n, s in zip(found, nulls, scales, strict=True)]
        state = [x + d * dt for x, d in zip(state, found, strict=True)]
        if i < num_steps - 1:
            state = [x + math.sqrt(w) * math.sqrt(abs(dt)) * e for x, e in zip(state, noises[i], strict=True)]
    return state


def jit(data, z, num_steps, scale, low, high):
    """JiT: from data time 0 (noise) to 1, Heun except in the last step; guidance within an open interval of data times."""
    grid = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64).numpy()

    def velocity(z, t):
        found, null = ((data(z, t, conditional) - z) / max(1 - t, 0.05) for conditional in (True, False))
        return null + (scale if low < t < high else 1.0) * (found - null)

    for i in range(num_steps - 1):
        t, t_next = grid[i], grid[i + 1]
        v = velocity(z, t)
        z = z + (t_next - t) * 0.5 * (v + velocity(z + (t_next - t) * v, t_next))
    return z + (grid[-1] - grid[-2]) * velocity(z, grid[-2])
