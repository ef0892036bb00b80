"""Ordered `map` that works ahead of its consumer, in threads or in worker processes."""

import functools
import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from repa.base.errors import UserError
from repa.base.launch import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 3  # items of each worker process


def by_threads(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    depth: int,
    workers: int = 1,
    on_start: Callable[[], Any] | None = None,
) -> Generator[Result, None, None]:
    """Like map(function, items), in order; threads compute up to `depth` results ahead.

    An exception of `function` is raised in place of its result. Closing the iterator stops the threads.
    """
    # a pool's map would consume all items at once, and here they are endless
    items = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead", initializer=on_start)
    try:
        pending = deque(pool.submit(function, item) for item in itertools.islice(items, depth))
        while pending:
            # the next item is submitted before this result is yielded, so that the threads work while the caller does
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def most_workers() -> int:
    """The largest allowed number of worker processes on this machine."""
    # each needs 150 MB; workers that wait for a remote source need no core, so 16 per core can be right
    return max(32, 16 * (os.cpu_count() or 1))


def by_processes(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Like map(function, items), in order, in worker processes; with 0 workers, in this process on demand.

    For Python code that threads cannot run in parallel. Results are sent as NumPy arrays through pipes, because PyTorch
    sends tensors through shared memory, which has only 64 MB in many containers. A few items are consumed ahead.
    """
    if num_workers > most_workers():
        raise UserError(
            f"num_workers is {num_workers:,}, but this machine allows at most {most_workers()}: give fewer."
        )
    with warnings.catch_warnings():  # about more workers than cores, which is right for a remote source
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        results = iter(DataLoader(
            _Mapped(function), batch_size=None, sampler=items, num_workers=num_workers, collate_fn=_as_it_is,
            prefetch_factor=AHEAD if num_workers else None, worker_init_fn=functools.partial(die_with_parent, os.getpid()),
        ))  # fmt: skip
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


class _Mapped(Dataset):
    """The results of a function, "indexed" by its arguments, as a DataLoader expects."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except UserError as error:
            return error  # the loader would raise it with the worker's traceback in its text


def _as_it_is(result: Any) -> Any:
    return result
