"""Muon's direction: the quintic Newton-Schulz iteration of five steps, in float64."""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: Tensor) -> Tensor:
    """U f(S) V', where f applies the iteration to each singular value."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    a, b, c = COEFFICIENTS
    out = []
    norm = float(sum(float(s) ** 2 for s in values) ** 0.5)
    for s in values:
        x = float(s) / norm
        for _ in range(5):
            x = a * x + b * x**3 + c * x**5
        out.append(x)
    return u @ torch.diag(torch.tensor(out, dtype=torch.float64)) @ v
