import time

import pytest
import torch

from repa.base.device import autocast, best_precision, no_autocast, product_seconds

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_are_in_the_named_precision(precision, dtype):
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        with no_autocast(CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_auto_chooses_the_faster_precision(monkeypatch):
    for times, precision, dtype in (
        (2.1, "bf16", torch.bfloat16),
        (1.1, "fp32", torch.float32),
        (0.3, "fp32", torch.float32),
    ):
        seconds = {torch.float32: times, torch.bfloat16: 1.0}
        monkeypatch.setattr("repa.base.device.product_seconds", seconds.__getitem__)
        assert best_precision(CPU) == precision
        with autocast(CPU, "auto"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_products_are_timed_once_in_processor_time():
    """Processor time, so that pauses do not count."""
    product_seconds.cache_clear()
    begin = time.process_time()
    first = product_seconds(torch.float32)
    assert 0 < first <= time.process_time() - begin
    assert product_seconds(torch.float32) == first


def test_full_precision_works_on_the_meta_device():
    with no_autocast(torch.device("meta")):
        assert torch.ones(2, device="meta").is_meta
