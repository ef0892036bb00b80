"""Distances between feature sets, slow and literal, in float64 numpy."""

import math

import numpy as np


def frechet(mu1, sigma1, mu2, sigma2):
    """The Fréchet distance, with the trace of the root from the eigenvalues of the covariances' product."""
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
    """The share of queries within the distance of some centre to its k-th neighbour."""
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


def adm_frechet(x, y):
    """The Fréchet distance of the ADM evaluator: float32 means, numpy.cov, scipy's root of the product."""
    import warnings

    from scipy import linalg

    mu1, mu2 = np.mean(x, axis=0), np.mean(y, axis=0)
    sigma1, sigma2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = linalg.sqrtm(sigma1.dot(sigma2))
    difference = mu1 - mu2
    return difference.dot(difference) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root.real)


def half_distances(u, v):
    """Squared distances |u|^2 - 2 u.v + |v|^2 with every step rounded to float16, one pair at a time."""
    h = np.float16
    with np.errstate(over="ignore", invalid="ignore"):
        out = np.zeros((len(u), len(v)), np.float32)
        for i, a in enumerate(u.astype(h)):
            for j, b in enumerate(v.astype(h)):
                norm_a = h(np.sum((a * a).astype(np.float32)))
                norm_b = h(np.sum((b * b).astype(np.float32)))
                product = h(np.dot(a.astype(np.float32), b.astype(np.float32)))
                out[i, j] = max(h(h(norm_a - h(h(2) * product)) + norm_b), h(0))
    return out


def adm_precision_recall(reference, samples, k):
    """The evaluator's precision and recall: the radius is entry k of sorted distances, itself included; ties count."""
    reach_r = np.sort(half_distances(reference, reference), 1)[:, k]
    reach_s = np.sort(half_distances(samples, samples), 1)[:, k]
    cross = half_distances(reference, samples)
    return (cross <= reach_r[:, None]).any(0).mean(), (cross <= reach_s[None]).any(1).mean()
