"""A set of uint8 images to be measured, whatever it lies in."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repa.base import dist


class Images(ABC):
    """Images of one size, in a fixed order."""

    where: str
    """What to call the set in a message."""
    num: int
    height: int
    width: int
    identity: dict[str, Any]
    """What it holds, as far as that can be known without reading it all."""
    home: Path | None = None
    """A folder that belongs to it, where what is measured of it may be kept."""

    @abstractmethod
    def rows(self, indices: np.ndarray) -> Tensor:
        """Images `indices` (n,), ascending: uint8 (n, 3, H, W)."""

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share: (indices (n,), images); batch b goes to process b modulo their number."""
        for start in range(dist.rank() * size, self.num, dist.world() * size):
            indices = np.arange(start, min(start + size, self.num))
            yield torch.from_numpy(indices), self.rows(indices)
