"""Values computed by the released code of other methods in float64 on patterned inputs.

An input is a formula {"shape", "a", "b", "c", "o"}: o + c sin(a i + b) with the flat index i in C order. An output is a
number or statistics of a tensor. `source` in each file names the code and its commit; none of that code is included
here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def load(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def tensor(formula: dict[str, Any]) -> Tensor:
    """The patterned input in float64."""
    shape = formula["shape"]
    index = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64)
    return (formula["o"] + formula["c"] * torch.sin(formula["a"] * index + formula["b"])).reshape(shape)


def fill(parameters: list[Tensor], scale: float = 0.3) -> None:
    """Set parameter number k to scale * sin(0.37 i + 0.5 k + 0.1)."""
    for k, p in enumerate(parameters):
        index = torch.arange(p.numel(), dtype=torch.float64)
        with torch.no_grad():
            p.copy_((scale * torch.sin(0.37 * index + 0.5 * k + 0.1)).reshape(p.shape))


def check(found: Tensor, wanted: dict[str, Any], tolerance: float = 1e-9) -> None:
    """Compare a tensor with its statistics."""
    flat = found.detach().double().flatten()
    assert list(found.shape) == wanted["shape"]
    weights = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    assert float(flat.sum()) == pytest.approx(wanted["sum"], rel=tolerance, abs=tolerance * len(flat))
    assert float(flat.abs().sum()) == pytest.approx(wanted["abs_sum"], rel=tolerance)
    assert float(flat @ weights) == pytest.approx(wanted["dot_index"], rel=tolerance, abs=tolerance * len(flat))
    assert flat[:4].tolist() == pytest.approx(wanted["first"], rel=tolerance, abs=tolerance)
    assert flat[-2:].tolist() == pytest.approx(wanted["last"], rel=tolerance, abs=tolerance)
