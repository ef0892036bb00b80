"""How a long analysis is shared by processes, and counted for a progress bar."""

from collections.abc import Callable, Sequence
from typing import Any

from repa.analysis.collection import Progress
from repa.base import dist

Rows = list[dict[str, Any]]


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def each(items: Sequence, rows_of: Callable[[Any], Rows]) -> Rows:
    """The rows of all items in their order on every process, the work shared."""
    mine = [(i, rows_of(item)) for i, item in enumerate(items) if i % dist.world() == dist.rank()]
    done = sorted((pair for part in dist.gather_objects(mine) for pair in part), key=lambda pair: pair[0])
    return [row for _, rows in done for row in rows]


def share(num: int) -> int:
    """How many of `num` items `each` gives to this process."""
    return len(range(dist.rank(), num, dist.world()))


class Stages:
    """One count over several stages of known sizes."""

    def __init__(self, progress: Progress, sizes: Sequence[int]):
        self.progress, self.sizes, self.started = progress, sizes, 0

    def next(self) -> Progress:
        """Progress of the next stage."""
        before = sum(self.sizes[: self.started])
        self.started += 1
        return lambda done, _: self.progress(before + done, sum(self.sizes))
