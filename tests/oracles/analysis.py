"""CKNNA, CKA and spatial structure by literal double loops in float64; inputs are nested lists or arrays."""

import math

import numpy as np


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def gram(x):
    return [[dot(p, q) for q in x] for p in x]


def nearest(closeness, i, k):
    others = [j for j in range(len(closeness)) if j != i]
    return set(sorted(others, key=lambda j: -closeness[i][j])[:k])


def cknna_paper(a, b, k):
    n = len(a)
    kernels = {"a": gram(a), "b": gram(b)}
    near = {}
    for name, x in (("a", a), ("b", b)):
        closeness = [[-sum((float(p) - float(q)) ** 2 for p, q in zip(u, v, strict=True)) for v in x] for u in x]
        near[name] = [nearest(closeness, i, k) for i in range(n)]

    def align(p, q):
        total = 0.0
        for i in range(n):
            mean_k, mean_l = sum(kernels[p][i]) / n, sum(kernels[q][i]) / n
            for j in range(n):
                if i != j and j in near[p][i] and j in near[q][i]:
                    total += (kernels[p][i][j] - mean_k) * (kernels[q][i][j] - mean_l)
        return total / (n - 1) ** 2

    return align("a", "b") / math.sqrt(align("a", "a") * align("b", "b"))


def hsic_unbiased(K, L):
    """Song et al.: with zero diagonals, [tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'K L1] / (n (n-3))."""
    n = len(K)
    off = range(n)
    trace = sum(K[i][j] * L[j][i] for i in off for j in off if i != j)
    sum_k = sum(K[i][j] for i in off for j in off if i != j)
    sum_l = sum(L[i][j] for i in off for j in off if i != j)
    chain = sum(K[i][m] * L[m][j] for i in off for m in off for j in off if i != m and m != j)
    return (trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 * chain / (n - 2)) / (n * (n - 3))


def cknna_platonic(a, b, k, clamp=False):
    n = len(a)
    kernels, near = [], []
    for x in (a, b):
        magnitudes = sorted(abs(float(v)) for row in x for v in row)
        bound = magnitudes[int(0.95 * len(magnitudes))] if clamp else math.inf
        clamped = [[min(max(float(v), -bound), bound) for v in row] for row in x]
        kernels.append(gram([[v / math.sqrt(dot(row, row)) for v in row] for row in clamped]))
        near.append([nearest(kernels[-1], i, k) for i in range(n)])

    def hsic(p, q):
        def masked(kernel):
            return [[kernel[i][j] if j in near[p][i] and j in near[q][i] else 0.0 for j in range(n)] for i in range(n)]

        return hsic_unbiased(masked(kernels[p]), masked(kernels[q]))

    return hsic(0, 1) / (math.sqrt(hsic(0, 0) * hsic(1, 1)) + 1e-6)


def cka(a, b, unbiased):
    K, L = gram(a), gram(b)
    n = len(K)

    def centred(kernel):
        rows = [sum(row) / n for row in kernel]
        columns = [sum(kernel[i][j] for i in range(n)) / n for j in range(n)]
        mean = sum(rows) / n
        return [[kernel[i][j] - rows[i] - columns[j] + mean for j in range(n)] for i in range(n)]

    def hsic(p, q):
        if unbiased:
            return hsic_unbiased(p, q)
        p, q = centred(p), centred(q)
        return sum(p[i][j] * q[i][j] for i in range(n) for j in range(n)) / (n - 1) ** 2

    return hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))


def cosine_at(patches, keep):
    """Mean cosine over all pairs of one image's patches (T, C) whose Manhattan distance satisfies `keep`."""
    side = math.isqrt(len(patches))
    values = []
    for i, u in enumerate(patches):
        for j, v in enumerate(patches):
            if keep(abs(i // side - j // side) + abs(i % side - j % side)):
                values.append(dot(u, v) / math.sqrt(dot(u, u) * dot(v, v)))
    return sum(values) / len(values)


def local_distance_similarity(patches, far):
    return cosine_at(patches, lambda d: d == 1) - cosine_at(patches, lambda d: d >= far)


def correlation_decay_slope(patches, max_distance):
    distances = list(range(1, max_distance + 1))
    means = [cosine_at(patches, lambda d, wanted=wanted: d == wanted) for wanted in distances]
    return -np.polyfit(distances, means, 1)[0]


def rms_spatial_contrast(patches):
    unit = [[float(v) / math.sqrt(dot(u, u)) for v in u] for u in patches]
    mean = [sum(u[c] for u in unit) / len(unit) for c in range(len(unit[0]))]
    return math.sqrt(sum((u[c] - mean[c]) ** 2 for u in unit for c in range(len(mean))) / len(unit))
