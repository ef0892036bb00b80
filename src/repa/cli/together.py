"""Run commands of this program side by side, each in a process with its share of the cores."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess

from repa.base import launch
from repa.cli import console

SECONDS = 0.2  # between polls


def run_together(commands: Sequence[Sequence[str]]) -> int:
    """Run command lines of `repa` at once; the first exit code that is not 0, or 128 + the signal that stopped them.

    A signal to this process reaches all of them. If one fails, the others are stopped, and `repa train` then writes a
    checkpoint. All of them end with this process, however it ends.
    """
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    # spawn: a forked process would inherit locks of torch's threads, which do not exist in it.
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(os.getpid(), threads, list(words))) for words in commands]
    passed_on = failed = 0  # requests to stop that were sent to the processes
    with launch.catch_signals() as caught:
        try:
            for process in processes:
                process.start()
            while running := [process for process in processes if process.exitcode is None]:
                connection.wait([process.sentinel for process in running], timeout=SECONDS)
                # Read before the others are stopped, whose exit codes would hide the first.
                failed = failed or _failure(processes)
                wanted = len(caught) + bool(failed)
                if wanted > passed_on:
                    _stop(processes)
                    passed_on = wanted
        finally:
            _stop(processes)
            for process in processes:
                if process.pid is not None:
                    process.join()
    if caught:
        return 128 + caught[0]
    return failed or _failure(processes)


def _failure(processes: Sequence[BaseProcess]) -> int:
    return next((process.exitcode for process in processes if process.exitcode), 0)


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.exitcode is None:
            # On SIGTERM `repa train` writes a checkpoint after its step.
            process.terminate()


def _run(parent: int, threads: int, words: list[str]) -> None:
    launch.die_with_parent(parent)
    # Set before torch is imported below, because torch reads it once.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Two bars on one terminal would overwrite each other.
    console.draw_no_bars()
    sys.argv[1:] = words
    from repa.cli.main import main

    main()
