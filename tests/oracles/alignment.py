"""Eq. 8 by loops over images, tokens and channels, in float64."""

import math


def cosine(projected, target):
    """-mean over tokens of the cosine of each pair; (N, T, F) arrays -> list of N."""
    return [
        -sum(_cos(h, y) for h, y in zip(hs, ys, strict=True)) / len(hs)
        for hs, ys in zip(projected, target, strict=True)
    ]


def nt_xent(projected, target, temperature):
    """-log softmax of the right image among all images, at each token position; (N, T, F) -> list of N."""
    losses = []
    for n in range(len(projected)):
        total = 0.0
        for p in range(len(projected[n])):
            scores = [math.exp(_cos(projected[n][p], target[m][p]) / temperature) for m in range(len(target))]
            total -= math.log(scores[n] / sum(scores))
        losses.append(total / len(projected[n]))
    return losses


def _cos(a, b):
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(y) ** 2 for y in b))


def area(grid, size):
    """Mean over the cells that each new cell covers (size divides the old one); (G, G) -> (size, size)."""
    step = len(grid) // size
    return [
        [
            sum(float(grid[r * step + i][c * step + j]) for i in range(step) for j in range(step)) / step**2
            for c in range(size)
        ]
        for r in range(size)
    ]


def bilinear(grid, size):
    """Cell centres at (i + 1/2) / size, edges repeated; (G, G) -> (size, size)."""
    old = len(grid)

    def corners(i):
        position = min(max((i + 0.5) * old / size - 0.5, 0.0), old - 1.0)
        low = int(position)
        return low, min(low + 1, old - 1), position - low

    result = [[0.0] * size for _ in range(size)]
    for r in range(size):
        top, bottom, v = corners(r)
        for c in range(size):
            left, right, h = corners(c)
            upper = (1 - h) * float(grid[top][left]) + h * float(grid[top][right])
            lower = (1 - h) * float(grid[bottom][left]) + h * float(grid[bottom][right])
            result[r][c] = (1 - v) * upper + v * lower
    return result
