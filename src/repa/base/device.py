"""Measurements of a device: seconds of work, rate of matrix products, peak memory."""

import functools
import sys
import time
from collections.abc import Callable

import torch

from repa.base.precision import DTYPES

PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # side of the timed matrices: large enough for the full rate


def synchronise(device: torch.device) -> None:
    """Wait for the queued work of a GPU; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has finished the work of `run`."""
    # Earlier work of the device must not count.
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begin


def product_rate(precision: str, device: torch.device, *, side: int = 0, repeats: int = 8) -> float:
    """FLOP/s of a square matrix product, the best of several; "fp32" as the run computes it (with TF32 if enabled)."""
    side = side or PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, device) for _ in range(repeats))


@functools.cache
def quick_product_rate(precision: str, device: torch.device) -> float:
    """`product_rate` with matrices of half the side, which takes a fraction of a second."""
    return product_rate(precision, device, side=PRODUCT_SIDE[device.type] // 2, repeats=4)


def sustained_product_rate(precision: str, device: torch.device, seconds: float = 3.0) -> float:
    """FLOP/s of a large square product over this time: short bursts run at higher clocks than minutes of training."""
    rate, side = product_rate(precision, device), PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    repeats = max(1, round(seconds * rate / (2 * side**3)))
    return repeats * 2 * side**3 / timed(lambda: [a @ b for _ in range(repeats)], device)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: device memory on CUDA, host memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Missing on Windows, where the rest of the package can be imported.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB on Linux
