"""The choice of attention kernels: all available ones are timed, and the order applies only inside the block."""

import pytest
import torch

from repa.models.config import ModelConfig
from repa.training import TrainConfig, acceleration
from repa.training.acceleration import KERNELS, attention_shape, fastest_kernels, kernel_seconds

CPU = torch.device("cpu")
MODEL = ModelConfig(name="SiT-XL/2", latent_size=32, latent_channels=4)


def test_kernels_are_timed_on_the_shape_of_one_micro_batch():
    config = TrainConfig(model=MODEL, batch_size=256)
    assert attention_shape(config, 1) == (256, 16, 256, 72)
    assert attention_shape(config.override(accumulate=2), 8) == (16, 16, 256, 72)


def test_available_kernels_are_timed_and_sorted():
    found = kernel_seconds((2, 3, 16, 8), torch.float32, CPU)
    assert {"flash", "math"} <= found.keys() <= KERNELS.keys()  # available on a CPU
    assert list(found.values()) == sorted(found.values())
    assert min(found.values()) > 0


def test_nothing_is_measured_on_a_cpu(monkeypatch):
    monkeypatch.setattr(acceleration, "kernel_seconds", lambda *a: pytest.fail("measured"))
    with fastest_kernels(TrainConfig(model=MODEL), 1, CPU) as found:
        assert found == {}


def test_on_cuda_the_measured_order_is_used_inside_the_block(monkeypatch):
    """Without a GPU, with invented measurements; the order is read back from PyTorch."""
    order = torch._C._get_sdp_priority_order
    before = order()
    monkeypatch.setattr(acceleration, "kernel_seconds", lambda *a: {"cudnn": 1.0, "flash": 2.0})
    with fastest_kernels(TrainConfig(model=MODEL, precision="bf16"), 1, torch.device("cuda")) as found:
        assert list(found) == ["cudnn", "flash"]
        wanted = [int(KERNELS[name]) for name in ("cudnn", "flash", "efficient", "math")]
        assert [k for k in order() if k in wanted] == wanted
    assert order() == before
