"""What a step costs beside its arithmetic: time spent waiting for data, and memory."""

import sys
import time
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


class Waiting(Generic[Item]):
    """Passes an iterator's items on and adds up the seconds that its user waited for them."""

    def __init__(self, items: Generator[Item]):
        self.items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        begin = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - begin

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def close(self) -> None:
        self.items.close()


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: of the device's memory on CUDA, of the machine's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # absent on Windows, where nothing here is tested

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB on Linux
