"""Arithmetic that figures of three digits can rest on."""

import contextlib
from collections.abc import Iterator

import torch


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
