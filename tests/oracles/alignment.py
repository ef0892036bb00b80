"""Eq. 8 by loops over images, tokens and channels, in float64."""

import math


def cosine(projected, target):
    """The negative mean cosine over tokens; (N, T, F) arrays -> list of N."""
    return [
        -sum(_cos(h, y) for h, y in zip(hs, ys, strict=True)) / len(hs)
        for hs, ys in zip(projected, target, strict=True)
    ]


def nt_xent(projected, target, temperature):
    """-log softmax of the correct image among all images, at each token position; (N, T, F) -> list of N."""
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


def area(grid, rows, columns):
    """Mean over the cells that each new cell covers (rows and columns divide the old ones)."""
    down, across = len(grid) // rows, len(grid[0]) // columns
    return [
        [
            sum(float(grid[r * down + i][c * across + j]) for i in range(down) for j in range(across)) / (down * across)
            for c in range(columns)
        ]
        for r in range(rows)
    ]


def bilinear(grid, rows, columns):
    """Cell centres at (i + 1/2) / rows and (j + 1/2) / columns, edges repeated."""

    def corners(i, old, new):
        position = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        low = int(position)
        return low, min(low + 1, old - 1), position - low

    result = [[0.0] * columns for _ in range(rows)]
    for r in range(rows):
        top, bottom, v = corners(r, len(grid), rows)
        for c in range(columns):
            left, right, h = corners(c, len(grid[0]), columns)
            upper = (1 - h) * float(grid[top][left]) + h * float(grid[top][right])
            lower = (1 - h) * float(grid[bottom][left]) + h * float(grid[bottom][right])
            result[r][c] = (1 - v) * upper + v * lower
    return result
