"""The model of several GPUs against hand computation, and the strategy chosen from it."""

import pytest
import torch
from benchmarks.scaling import checkpoint

from repa.base import dist
from repa.models.config import ModelConfig
from repa.models.cost import model_cost
from repa.training import TrainConfig
from repa.training.resolve import strategy
from repa.training.scaling import Machine, faster, step

PLAIN = Machine(seconds_per_tflop=1e-3, memory=4e12, links=4e11, network=2e11, latency=0.0, contention=0.0)
P = 700e6


def test_the_step_of_eight_gpus_matches_hand_computation():
    """Computing takes 10 + 20 ms, the hidden all-reduce of 5.6 GB at 7/8 takes 12.25 ms, the update 64 P / 4 TB/s."""
    found = step("ddp", P, 1e12, 30, 1, 8, PLAIN)
    assert found.compute == pytest.approx(0.030)
    assert found.communication == pytest.approx(8 * P * 7 / 8 / 4e11)
    assert found.exposed == pytest.approx(0)
    assert found.update == pytest.approx(0.0112)
    assert found.sent == pytest.approx(8 * P * 7 / 8)
    shared = step("fsdp", P, 1e12, 30, 1, 8, PLAIN)
    assert shared.communication == pytest.approx((2 + 4) * P * 7 / 8 / 4e11)
    assert shared.update == pytest.approx(found.update / 8)
    assert shared.seconds < found.seconds


def test_gradients_between_machines_use_the_network():
    """With small batches, 2 ms of computing cannot hide 8 P 3/4 / 200 GB/s = 21 ms plus 12.25 ms within a machine."""
    found = step("ddp", P, 1e12, 2, 4, 8, PLAIN)
    between = 8 * P * 3 / 4 / 2e11
    assert found.communication == pytest.approx(8 * P * 7 / 8 / 4e11 + between)
    assert found.exposed == pytest.approx(found.communication - 2 / 3 * 0.002)
    busy = step("ddp", P, 1e12, 100, 4, 8, PLAIN)
    assert busy.exposed == 0


def test_overlap_is_not_free_and_collectives_have_latency():
    slow = Machine(seconds_per_tflop=1e-3, links=4e11, network=2e11, latency=1e-3, contention=0.5)
    found = step("ddp", P, 1e12, 60, 1, 8, slow, buckets=10)
    communication = 8 * P * 7 / 8 / 4e11 + 10 * 1e-3
    assert found.exposed == pytest.approx(0.5 * communication)


def test_checkpoint_times_match_hand_computation():
    """Of 16 GB in 15 parts, 8 processes write 2 GB each, 16 processes a 15th each; the disk takes at most 4 GB/s."""
    one = checkpoint(1e9, 1, 8, host=4e9, disk=1e9, shared=16e9, links=8e9)
    assert vars(one) == {"size": 16e9, "writers": 8, "gather": 2.5, "write": 2.0, "verify": 2.0, "deal": 4.5}
    many = checkpoint(1e9, 2, 8, host=4e9, disk=1e9, shared=4e9, links=8e9, network=2e9)
    assert (many.writers, many.write) == (15, 4.0)
    assert many.deal == pytest.approx(4 + 16 / 15 / 4 + 8)


def test_the_faster_strategy_is_chosen():
    assert faster(P, 1e12, 256, 1, 1) == "ddp"  # one process
    assert faster(P, 1e12, 32, 1, 8) == "fsdp"  # saves updating all parameters on every GPU
    assert faster(1e6, 1e12, 256, 1, 8) == "ddp"  # nothing to save


@pytest.mark.parametrize(
    ("device", "world", "changes", "wanted"),
    [
        ("cuda", 8, {}, "fsdp"), ("cuda", 1, {}, "ddp"), ("cpu", 8, {}, "ddp"), ("cuda", 8, {"parallel": "ddp"}, "ddp"),
        ("cuda", 8, {"optimizer": {"name": "muon"}}, "ddp"),
    ],
)  # fmt: skip
def test_auto_is_resolved_by_device_and_optimizer(device, world, changes, wanted, monkeypatch):
    monkeypatch.setattr(dist, "active", lambda: world > 1)
    monkeypatch.setattr(dist, "world", lambda: world)
    model = ModelConfig(name="SiT-XL/2", latent_size=32, latent_channels=4, num_classes=1000)
    assert model_cost(model).parameters > 6e8
    assert strategy(TrainConfig(model=model, batch_size=256, **changes), torch.device(device)) == wanted
