"""A device: its fastest precision and autocast, seconds of work, rate of matrix products, peak memory."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator

import torch

from repa.base.errors import UserError, require_type

PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # side of the timed matrices: large enough for the full rate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = ("bf16", "fp16")  # precisions whose matrix products are autocast; weights, norms and losses stay float32
WORTH = 1.25  # least speedup of bf16 products on a CPU: casts take a part of it
SIDE, REPEATS = 512, 5  # of the measured products: side of the matrices, and number of timings


def checked_device(name: str | torch.device) -> torch.device:
    """The device of a name such as "cuda:1"; UserError if this machine, or this installation of torch, lacks it."""
    require_type(name, (str, torch.device), "A device is a text such as 'cuda' or 'cpu'")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"There is no device {name!r}. Choose cpu, cuda, cuda:1 or mps.") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"The device {name!r} cannot be used: {str(error).splitlines()[0]}. Choose cpu.") from None
    return device


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


class Float32Default(contextlib.ContextDecorator):
    """New tensors are float32 in the block, so that a caller's torch.set_default_dtype does not change results."""

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)

    def _recreate_cm(self) -> "Float32Default":  # one object per call, because calls may be nested
        return Float32Default()


def best_precision(device: torch.device) -> str:
    """ "bf16" if its products are faster, else "fp32". CUDA reports its support; a CPU is measured."""
    # Emulated bf16, which older GPUs offer, is slower than float32.
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if product_seconds(torch.float32) > WORTH * product_seconds(torch.bfloat16) else "fp32"
    return "fp32"


@functools.cache
def product_seconds(dtype: torch.dtype) -> float:
    """Processor time of a square product on the CPU, which other programs do not affect. Measured once per process."""
    x, found = torch.ones(SIDE, SIDE, device="cpu").to(dtype), []
    with no_autocast(x.device), torch.no_grad():
        # The first product prepares the kernel and does not count.
        for _ in range(REPEATS + 1):
            begin = time.process_time()
            x @ x
            found.append(time.process_time() - begin)
    return min(found[1:])


def resolved(precision: str, device: torch.device) -> str:
    """The precision that "auto" selects on this device; any other precision is returned unchanged."""
    return best_precision(device) if precision == "auto" else precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast of matrix products to bf16 or fp16; none for "fp32". "auto" chooses bf16 if it is faster."""
    precision = resolved(precision, device)
    return torch.autocast(device.type, DTYPES[precision if precision in HALF else "bf16"], enabled=precision in HALF)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Compute in the precision of the inputs. The meta device has no autocast and always does."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32, which cuDNN uses for convolutions by default and a trainer may enable for matrix products."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
