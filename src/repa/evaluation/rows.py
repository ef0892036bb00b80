"""Rows of features from every process, in the order of their images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from repa.base import dist


def gather_rows(parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """(n, D) and (n,) for each batch that this process saw, none also -> (N, D) of all processes, by index; on the CPU."""
    rows = torch.cat(list(parts)) if parts else torch.empty(0, 0)
    index = torch.cat(list(indices)) if indices else torch.empty(0, dtype=torch.int64)
    if dist.active():
        shapes = dist.gather_objects(tuple(rows.shape))
        num, dim = (max(sizes) for sizes in zip(*shapes, strict=True))
        padded, places = torch.zeros(num, dim), torch.full((num,), -1)
        padded[: len(rows), : rows.shape[1]], places[: len(rows)] = rows, index
        rows, index = dist.gather(padded), dist.gather(places)  # (world * num, D)
        rows, index = rows[index >= 0], index[index >= 0]
    in_order = bool((index[1:] > index[:-1]).all())
    return rows if in_order else rows[index.argsort()]  # a copy of all rows, which one process need not make
