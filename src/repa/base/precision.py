"""Which arithmetic a machine gains from, and the autocast that uses it."""

import torch


def best_precision(device: torch.device) -> str:
    """ "bf16" where the hardware multiplies it natively, else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in bf16 for "bf16" (and "auto" where that is faster), nothing changed for "fp32"."""
    if precision == "auto":
        precision = best_precision(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
