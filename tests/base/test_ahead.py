import itertools
import os

import numpy as np
import pytest

from repa.base.ahead import by_processes, by_threads, most_workers
from repa.base.errors import UserError


def test_threads_keep_order_and_run_a_few_items_ahead():
    started = []

    def square(x):
        started.append(x)
        return x * x

    stream = by_threads(square, itertools.count(), depth=3, workers=2)
    assert [next(stream) for _ in range(10)] == [x * x for x in range(10)]
    stream.close()
    assert len(started) <= 13
    assert list(by_threads(square, [], depth=3)) == []
    assert list(by_threads(square, [7], depth=3)) == [49]


def test_an_error_in_a_thread_is_raised_in_place_of_its_result():
    stream = by_threads(lambda x: 1 // (x - 2), range(4), depth=4)
    assert [next(stream), next(stream)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(stream)


def rows_and_process(num: int) -> tuple[np.ndarray, int]:
    if num == 5:
        raise UserError("five is refused")
    return np.full(3, num), os.getpid()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_keep_order_and_pass_on_user_errors(num_workers):
    stream = by_processes(rows_and_process, iter(range(9)), num_workers)
    results = list(itertools.islice(stream, 5))
    assert [rows.tolist() for rows, _ in results] == [[num] * 3 for num in range(5)]
    assert all(isinstance(rows, np.ndarray) for rows, _ in results)
    workers = {process for _, process in results}
    assert len(workers) == max(num_workers, 1)
    assert (os.getpid() in workers) == (num_workers == 0)
    with pytest.raises(UserError, match=r"^five is refused$"):
        next(stream)


def test_too_many_processes_are_refused():
    with pytest.raises(UserError, match=f"at most {most_workers()}: give fewer"):
        next(by_processes(rows_and_process, [1], most_workers() + 1))
