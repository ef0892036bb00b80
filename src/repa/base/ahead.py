"""Work ahead of whoever waits for it: `map` in order, by threads or by worker processes."""

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
    """Like map(function, items), in order, with up to `depth` results made ahead by threads.

    An exception of `function` is raised where its result would have come. Closing the iterator stops the threads.
    """
    # a pool's own map would take all items at once, and here they are endless
    items = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead", initializer=on_start)
    try:
        pending = deque(pool.submit(function, item) for item in itertools.islice(items, depth))
        while pending:
            # the next is submitted before this one is handed out, so that the threads work while the caller does
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def most_workers() -> int:
    """Worker processes that this machine takes at most."""
    # each holds 150 MB; those that wait for a remote source need no core, so 16 a core may be right
    return max(32, 16 * (os.cpu_count() or 1))


def by_processes(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Like map(function, items), in order, by worker processes; 0 of them work here, when a result is asked for.

    For Python code that threads would do one at a time. Results come as NumPy arrays through pipes, since PyTorch moves
    tensors through shared memory, which is 64 MB in many containers. Items are taken a few ahead, in this process.
    """
    if num_workers > most_workers():
        raise UserError(
            f"num_workers was given {num_workers:,}, but this machine takes at most {most_workers()}: give fewer."
        )
    with warnings.catch_warnings():  # of more workers than cores, which is right for a remote source
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
    """The results of a function, "indexed" by its arguments, as a DataLoader takes them."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except UserError as error:  # returned, as the loader would raise it with a traceback of the worker in its text
            return error


def _as_it_is(result: Any) -> Any:
    return result
