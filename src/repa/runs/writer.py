"""Writes a run's checkpoints: at once, or by a thread while the training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from repa.runs.checkpoint import Checkpoint, save_checkpoint


class Writer:
    """Takes checkpoints in order. Use as a context manager: the last one is on disk when the block ends.

    In the background a checkpoint must own its tensors, and one is written at a time: a second waits for the first, so
    host memory holds two at most. What goes wrong in the thread is raised by `check`, by the next `write`, or at the end.

    Args:
        run: run folder.
        keep: see `save_checkpoint`.
        keep_every: see `save_checkpoint`.
        background: by a thread.
    """

    def __init__(self, run: Path, keep: int = 0, keep_every: int = 0, *, background: bool = False):
        self.run, self.keep, self.keep_every = run, keep, keep_every
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self.pending: Future | None = None

    def write(self, checkpoint: Checkpoint) -> None:
        self.wait()
        arguments = (self.run, checkpoint, self.keep, self.keep_every)
        if self.pool is None:
            save_checkpoint(*arguments)
        else:
            self.pending = self.pool.submit(save_checkpoint, *arguments)

    @property
    def failed(self) -> bool:
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def check(self) -> None:
        """Raise the error of a write that failed; do not wait for one that is under way."""
        if self.failed:
            self.wait()

    def wait(self) -> None:
        """Until what was taken is on disk; raises the error of its writing."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown()  # waits
        if kind is None:  # else the error that ends the block is the one to see
            self.wait()
