"""Work done ahead of its use."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    depth: int,
    workers: int = 1,
    on_start: Callable[[], Any] | None = None,
) -> Iterator[Result]:
    """Like map(function, items), in order, with up to `depth` results made ahead by threads.

    An exception of `function` is raised where its result would have come. Closing the iterator stops the threads.
    """
    items = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead", initializer=on_start)
    try:
        pending = deque(pool.submit(function, item) for item in itertools.islice(items, depth))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
