"""Which arithmetic a machine gains from, and the autocast that uses it."""

import contextlib
import functools
import time
from collections.abc import Iterator

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = ("bf16", "fp16")  # precisions whose matrix products are autocast; weights, norms and losses stay float32
WORTH = 1.25  # times as fast that products in bf16 must be on a CPU: casts take some of it back
SIDE, REPEATS = 512, 5  # of the matrices that are multiplied to see it; the best of so many


class Float32Default(contextlib.ContextDecorator):
    """New tensors are float32 in the block, whatever torch.set_default_dtype says: a caller's habit must not change what is computed."""

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)

    def _recreate_cm(self) -> "Float32Default":  # one object for each call, as calls nest
        return Float32Default()


def best_precision(device: torch.device) -> str:
    """ "bf16" where products are faster in it, else "fp32": on CUDA by what the hardware says, on a CPU by trying."""
    # Emulated bf16, which older GPUs offer, is slower than float32.
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if product_seconds(torch.float32) > WORTH * product_seconds(torch.bfloat16) else "fp32"
    return "fp32"


@functools.cache
def product_seconds(dtype: torch.dtype) -> float:
    """Of processor time, for a square product on the CPU: what other programs do meanwhile does not count. Once a process."""
    x, found = torch.ones(SIDE, SIDE, device="cpu").to(dtype), []
    with no_autocast(x.device), torch.no_grad():
        # The first one prepares the kernel, and is not counted.
        for _ in range(REPEATS + 1):
            begin = time.process_time()
            x @ x
            found.append(time.process_time() - begin)
    return min(found[1:])


def resolved(precision: str, device: torch.device) -> str:
    """What "auto" is on this device; any other precision as it is."""
    return best_precision(device) if precision == "auto" else precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in bf16 or fp16 as named (for "auto": bf16 where that is faster), nothing changed for "fp32"."""
    precision = resolved(precision, device)
    return torch.autocast(device.type, DTYPES[precision if precision in HALF else "bf16"], enabled=precision in HALF)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """What is inside computes in the precision of its inputs; the meta device, which has no autocast, always does."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32, which cuDNN takes for convolutions unless told otherwise, and a trainer for its products."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
