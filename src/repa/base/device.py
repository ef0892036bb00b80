"""What a device does, by trying it: seconds of work, the rate of matrix products, peak memory."""

import functools
import sys
import time
from collections.abc import Callable

import torch

from repa.base.precision import DTYPES

PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is timed: large enough for the full rate


def synchronise(device: torch.device) -> None:
    """Wait until what was asked of a GPU is done; a CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until what `run` asked of the device is done."""
    # What was asked of the device before must not be counted as time of this.
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begin


def product_rate(precision: str, device: torch.device, *, side: int = 0, repeats: int = 8) -> float:
    """FLOP/s of a square matrix product, the best of several; "fp32" as the run computes it (TF32 where that is on)."""
    side = side or PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, device) for _ in range(repeats))


@functools.cache
def quick_product_rate(precision: str, device: torch.device) -> float:
    """`product_rate` in a fraction of a second, from matrices of half the side."""
    return product_rate(precision, device, side=PRODUCT_SIDE[device.type] // 2, repeats=4)


def sustained_product_rate(precision: str, device: torch.device, seconds: float = 3.0) -> float:
    """FLOP/s of a large square product that goes on for so long: a burst runs at clocks that minutes of training do not have."""
    rate, side = product_rate(precision, device), PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    repeats = max(1, round(seconds * rate / (2 * side**3)))
    return repeats * 2 * side**3 / timed(lambda: [a @ b for _ in range(repeats)], device)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: of the device's memory on CUDA, of the machine's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Absent on Windows, where the rest of the package may be imported.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB on Linux
