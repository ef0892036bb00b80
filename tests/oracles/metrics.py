"""Distances between feature sets, slow and literal, in float64 numpy."""

import math

import numpy as np


def frechet(mu1, sigma1, mu2, sigma2):
    """The trace of the root from the eigenvalues of the product of covariances."""
    eigenvalues = np.linalg.eigvals(sigma1 @ sigma2)
    return (
        ((mu1 - mu2) ** 2).sum()
        + np.trace(sigma1)
        + np.trace(sigma2)
        - 2 * np.sqrt(eigenvalues.astype(complex)).real.sum()
    )


def inception_score(probabilities, splits):
    size = len(probabilities) // splits
    scores = []
    for s in range(splits):
        part = probabilities[s * size : (s + 1) * size]
        marginal = [sum(p[c] for p in part) / size for c in range(len(part[0]))]
        kl = [sum(p[c] * math.log(p[c] / marginal[c]) for c in range(len(p))) for p in part]
        scores.append(math.exp(sum(kl) / size))
    return sum(scores) / splits


def share_within(queries, centres, k):
    """Share of queries in the ball of some centre, which reaches to the centre's k-th neighbour among the others."""
    inside = 0
    for q in queries:
        for i, c in enumerate(centres):
            others = sorted(((c - o) ** 2).sum() for j, o in enumerate(centres) if j != i)
            if ((q - c) ** 2).sum() <= others[k - 1]:
                inside += 1
                break
    return inside / len(queries)


def kernel_distance(x, y, degree):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** degree

    m, n = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(kernel(x[i], y[j]) for i in range(m) for j in range(n)) / (m * n)
    return xx + yy - 2 * xy
