"""This process among others: its rank (torchrun's variables), signals, end, memory. Torch-free."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

from repa.base.errors import UserError

JOIN = "REPA_JOIN_MINUTES"  # environment variable: minutes that processes wait for each other at the start
JOIN_MINUTES = 10.0
PR_SET_PDEATHSIG = 1  # Linux: a signal when the parent ends
# From glibc's malloc.h, and the largest threshold in bytes that glibc accepts.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20
NEVER = 2**31 - 1
SPINS = "2000"  # instead of 300,000; costs nothing on idle cores (benchmarks/waiting.py)
PAIRS = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))


class Place(NamedTuple):
    """Rank of this process among all, and among those of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def place(*, strict: bool = True) -> Place:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without torchrun there is one process.

    Args:
        strict: False ignores inconsistent variables, in order to print an error.

    Raises:
        UserError: one is set without the other, is not a number, or a rank is not below its world size.
    """
    try:
        (rank, world), (local_rank, local_world) = (_pair(*names) for names in PAIRS)
    except UserError:
        if strict:
            raise
        return Place()
    return Place(rank, world, local_rank, local_world)


def join_minutes() -> float:
    """Minutes that processes wait for each other at the start."""
    return positive_number(JOIN, JOIN_MINUTES, "give minutes above 0, such as 10")


def positive_number(variable: str, default: float, remedy: str) -> float:
    """The number that an environment variable holds; raises UserError, with the remedy, for what is not one between 0 and a million."""
    text = os.environ.get(variable, str(default))
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise UserError(f"The environment variable {variable} is {text!r}: {remedy}.")
    return number


def _pair(rank_name: str, world_name: str) -> tuple[int, int]:
    given = {name: os.environ[name] for name in (rank_name, world_name) if name in os.environ}
    if not given:
        return 0, 1
    for name, text in given.items():
        if not (text.isascii() and text.isdecimal() and len(text) <= 6):
            raise UserError(
                f"The environment variable {name} is {text!r}, not a number. {_remedy(rank_name, world_name)}"
            )
    rank = int(given.get(rank_name, 0))
    world = int(given.get(world_name, rank + 1))
    # Some launchers set one of the two local variables; with a single process one variable is enough.
    if len(given) == 1 and world != 1 and rank_name == "RANK":
        there, lacking = (rank_name, world_name) if rank_name in given else (world_name, rank_name)
        raise UserError(f"{there} is set, but {lacking} is not. {_remedy(rank_name, world_name)}")
    if rank >= world:
        raise UserError(
            f"{rank_name} is {rank}, but {world_name} is {world}: ranks are 0 to {world_name} - 1. "
            f"{_remedy(rank_name, world_name)}"
        )
    return rank, world


def _remedy(rank_name: str, world_name: str) -> str:
    return f"Start several processes by torchrun, or unset {rank_name} and {world_name} for one process."


def die_with_parent(parent: int, _: object = None) -> None:
    """End this worker when the process `parent` that started it ends for any reason; called first in each worker."""
    import multiprocessing

    # The kernel's signal covers only the direct parent, which may be a fork server. For that case, and for other
    # systems, a thread watches the pipe below.
    if sys.platform == "linux" and os.getppid() == parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        above = multiprocessing.parent_process()
        assert above is not None  # the parent has ended already
        # The pipe closes when the parent ends, also before this line.
        above.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def catch_signals() -> Iterator[list[signal.Signals]]:
    """Signals SIGINT and SIGTERM received in the block, in order, for the block to handle; a second Ctrl-C stops at once."""
    caught: list[signal.Signals] = []

    def remember(number: int, _: object) -> None:
        caught.append(signal.Signals(number))
        # The first asks to stop after this step; the second to stop immediately.
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


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to 32 MiB; returns whether the C library supports this (glibc does).

    By default glibc returns large blocks to the system and requests them again, and the system clears each page on first
    use: every activation, rounded weight and gradient of every step. `python benchmarks/train_step.py`, with and without
    `--return-memory`, measures the difference.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, NEVER))


def spin_briefly() -> None:
    """Let waiting threads of GNU OpenMP sleep early; call this before torch is imported.

    By default a waiting thread spins 300,000 times before it sleeps. If another program uses one of the cores, it takes
    the processor from the thread that it waits for. `benchmarks/waiting.py` measures both. Existing values of
    OMP_WAIT_POLICY and GOMP_SPINCOUNT are not changed.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
