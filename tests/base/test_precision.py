import pytest
import torch

from repa.base.precision import autocast, best_precision, no_autocast

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_are_in_the_named_precision(precision, dtype):
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        with no_autocast(CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_auto_is_what_the_machine_gains_from(monkeypatch):
    for native, precision, dtype in ((True, "bf16", torch.bfloat16), (False, "fp32", torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert best_precision(CPU) == precision
        with autocast(CPU, "auto"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_the_meta_device_has_no_autocast_to_switch_off():
    with no_autocast(torch.device("meta")):
        assert torch.ones(2, device="meta").is_meta
