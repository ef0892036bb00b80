"""Writing of checkpoints: by one process or all, synchronously or in a background thread."""

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
    """Writes checkpoints in order. Use as a context manager: the last checkpoint is on disk when the block ends.

    Each process writes its share into a hidden folder. Then the main process adds state.json with the checksums of all files
    and renames the folder. All processes must therefore call `begin`, `write` and `wait` in the same order.

    With `background` a checkpoint must own its tensors. Checkpoints are written one at a time: a second waits for the first,
    so host memory holds at most two. `wait`, the next `begin` or `write`, or the end of the block raises the thread's errors.

    Args:
        run: run folder.
        keep: see `save_checkpoint`.
        keep_every: see `save_checkpoint`.
        background: write in a thread.
    """

    def __init__(self, run: Path, keep: int = 0, keep_every: int = 0, *, background: bool = False):
        self.run, self.keep, self.keep_every = run, keep, keep_every
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self.pending: tuple[Checkpoint, Future] | None = None
        self.folder: Path | None = None  # the hidden folder, if several processes write
        self.opened = contextlib.ExitStack()  # holds that folder open in the main process

    def begin(self, step: int) -> list[int]:
        """Ranks of the processes that write the checkpoint of `step`, those that see the run folder; empty if it already exists."""
        self.wait()
        if not dist.active():
            return [0]
        hidden = dist.on_main(lambda: self._open(step))
        if hidden is None:
            return []
        self.folder = layout.checkpoint_folder(self.run, step).with_name(hidden)
        return [rank for rank, sees in enumerate(dist.gather_objects(self.folder.is_dir())) if sees]

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, or this process's share of it."""
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
        """Complete the checkpoint if all processes have written it, and raise the error of a failed one; all must call this."""
        failed, busy = dist.any_process([self.failed, self.busy], device)
        if failed or not busy:
            self.wait()

    def wait(self) -> None:
        """Wait until all checkpoints are on disk; raises a write error in all processes."""
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
        files.remove_leftovers(folder.parent)  # of processes that were killed during writing or removal
        return self.opened.enter_context(files.atomic_folder(folder)).name

    def _close(self, checkpoint: Checkpoint, checksums: dict[str, str]) -> None:
        assert self.folder is not None
        write_state(self.folder, checkpoint, checksums)
        # The folder is renamed only once it has state.json, so no reader sees an incomplete checkpoint.
        self.opened.close()
        remove_older(self.run, self.keep, self.keep_every)

    def _abandon(self) -> None:
        self.folder = None
        # On an error the folder's context removes the folder; a failure in that must not hide the original error.
        with contextlib.suppress(Exception):
            self.opened.__exit__(*sys.exc_info())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()  # waits
        if kind is None:
            self.wait()
        else:  # the error that ended the block is raised
            self._abandon()


def _done(job: Callable[[], Any]) -> Future:
    future: Future = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return future
