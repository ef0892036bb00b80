"""SIGINT and SIGTERM are noted and obeyed after the step; a second Ctrl-C stops at once."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def noted() -> Iterator[list[signal.Signals]]:
    """The signals that came since the block began, in order."""
    caught: list[signal.Signals] = []

    def remember(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (a notebook, a test): signals are not ours to handle
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
