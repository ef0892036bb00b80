"""Work that is done one batch behind, so that on CUDA the next batch is sampled while the last is decoded and written."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch


class OneBehind:
    """A thread that does one piece of work at a time; a second piece waits for the first, so memory holds two batches at most.

    On CUDA the thread has a stream of its own, which begins after what the caller had queued. Elsewhere the work is done at
    once, as it would take the cores from the sampler.

    Args:
        device: of the sampler.
        threaded: None: on CUDA alone.
    """

    def __init__(self, device: torch.device, *, threaded: bool | None = None):
        on_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        self._pool = ThreadPoolExecutor(1) if (on_cuda if threaded is None else threaded) else None
        self._last: Future[None] | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        """Do `work`; what an earlier piece raised is raised here."""
        if self._pool is None:
            work()
            return
        ready = torch.cuda.current_stream().record_event() if self._stream else None
        self.wait()
        self._last = self._pool.submit(self._run, work, ready)

    def wait(self) -> None:
        """Until all work is done."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def _run(self, work: Callable[[], None], ready: "torch.cuda.Event | None") -> None:
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            work()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()  # of an interrupted command too: the batch that is being written is kept
