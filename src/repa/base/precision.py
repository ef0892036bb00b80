"""Which arithmetic a machine gains from, and the autocast that uses it."""

import contextlib

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Float32Default(contextlib.ContextDecorator):
    """New tensors are float32 in the block, whatever torch.set_default_dtype says: a caller's habit must not change what is computed."""

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)

    def __exit__(self, *_) -> None:
        torch.set_default_dtype(self.before)

    def _recreate_cm(self) -> "Float32Default":  # one object for each call, as calls nest
        return Float32Default()


def best_precision(device: torch.device) -> str:
    """ "bf16" where the hardware multiplies it natively, else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "fp32"
    return "fp32"


def resolved(precision: str, device: torch.device) -> str:
    """What "auto" is on this device; any other precision as it is."""
    return best_precision(device) if precision == "auto" else precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in bf16 or fp16 as named (for "auto": bf16 where that is faster), nothing changed for "fp32"."""
    precision = resolved(precision, device)
    return torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """What is inside computes in the precision of its inputs; the meta device, which has no autocast, always does."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
