"""Writes a run's checkpoints: by one process or by all of them, at once or by threads while the training goes on."""

import contextlib
import functools
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch

from repa.base import dist, files
from repa.runs import layout
from repa.runs.checkpoint import Checkpoint, remove_older, save_checkpoint, write_files, write_state


class Writer:
    """Takes checkpoints in order. Use as a context manager: the last one is on disk when the block ends.

    Each of several processes writes its share into a hidden folder. When all have, the main process adds state.json, with the
    checksums of all files, and gives the folder its name. So all must call `begin`, `write` and `wait` alike.

    In the background a checkpoint must own its tensors, and one is written at a time: a second waits for the first, so
    host memory holds two at most. What goes wrong in the thread is raised by `wait`, by the next `begin` or `write`, or at the
    end.

    Args:
        run: run folder.
        keep: see `save_checkpoint`.
        keep_every: see `save_checkpoint`.
        background: by a thread.
    """

    def __init__(self, run: Path, keep: int = 0, keep_every: int = 0, *, background: bool = False):
        self.run, self.keep, self.keep_every = run, keep, keep_every
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self.pending: tuple[Checkpoint, Future] | None = None
        self.folder: Path | None = None  # of several processes, under its hidden name
        self.opened = contextlib.ExitStack()  # that folder, in the main process

    def begin(self, step: int) -> list[int]:
        """The ranks of the processes that write the checkpoint of `step`: those that see the run folder; none where it is written."""
        self.wait()
        if not dist.active():
            return [0]
        hidden = dist.on_main(lambda: self._open(step))
        if hidden is None:
            return []
        self.folder = layout.checkpoint_folder(self.run, step).with_name(hidden)
        return [rank for rank, sees in enumerate(dist.gather_objects(self.folder.is_dir())) if sees]

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, or this process's share of the one that was begun."""
        self.wait()
        if self.folder is None:
            job: Callable[[], object] = functools.partial(
                save_checkpoint, self.run, checkpoint, self.keep, self.keep_every
            )
        else:
            job = functools.partial(write_files, self.folder, checkpoint)
        self.pending = checkpoint, self.pool.submit(job) if self.pool else _done(job)
        if self.pool is None:
            self.wait()

    @property
    def failed(self) -> bool:
        return self.pending is not None and self.pending[1].done() and self.pending[1].exception() is not None

    @property
    def busy(self) -> bool:
        """Whether this process is still writing."""
        return self.pending is not None and not self.pending[1].done()

    def settle(self, device: torch.device) -> None:
        """Close the checkpoint once all processes have written it, and raise the error of one that failed; all must call."""
        failed, busy = dist.any_process([self.failed, self.busy], device)
        if failed or not busy:
            self.wait()

    def wait(self) -> None:
        """Until what was taken is on disk; raises the error of its writing, in all processes."""
        if self.pending is None:
            return
        (checkpoint, future), self.pending = self.pending, None
        if self.folder is None:
            future.result()
            return
        try:
            with dist.together():
                checksums = future.result()
            of_all = {name: digest for part in dist.gather_objects(checksums) for name, digest in part.items()}
            dist.on_main(lambda: self._close(checkpoint, of_all))
        except BaseException:
            self._abandon()
            raise
        self.folder = None

    def _open(self, step: int) -> str | None:
        folder = layout.checkpoint_folder(self.run, step)
        if folder.exists():
            return None
        files.remove_leftovers(folder.parent)  # of processes that were killed while they wrote or removed
        return self.opened.enter_context(files.atomic_folder(folder)).name

    def _close(self, checkpoint: Checkpoint, checksums: dict[str, str]) -> None:
        assert self.folder is not None
        write_state(self.folder, checkpoint, checksums)
        # Only with state.json in it does the folder get its name: until then no reader takes it for a checkpoint.
        self.opened.close()
        remove_older(self.run, self.keep, self.keep_every)

    def _abandon(self) -> None:
        self.folder = None
        # Told of the error, the folder's context removes it; what goes wrong in that must not hide the error under way.
        with contextlib.suppress(Exception):
            self.opened.__exit__(*sys.exc_info())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()  # waits
        if kind is None:
            self.wait()
        else:  # the error that ends the block is the one to see
            self._abandon()


def _done(job: Callable[[], Any]) -> Future:
    future: Future = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return future
