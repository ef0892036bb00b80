"""Counted work and measured time against sums by hand."""

import itertools
import time
from dataclasses import replace

import pytest
import torch

from repa.alignment.config import AlignmentConfig
from repa.base.device import PRODUCT_SIDE, product_rate, timed
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.performance.batches import Synthetic, in_memory
from repa.performance.counts import flops_per_image
from repa.performance.measure import PARTS, MeasuredStep, Measurement, advise, measure, table
from repa.training import TrainConfig

CPU = torch.device("cpu")
SIZE = {"hidden_dim": 32, "depth": 3, "num_heads": 2, "latent_size": 8, "latent_channels": 3, "num_classes": 5}


def configuration(**changes) -> TrainConfig:
    alignments = (AlignmentConfig(target="tiny", depth=2, projector="mlp:width=24"),)
    return TrainConfig(
        model=ModelConfig(name="SiT-S/2", **SIZE), alignments=alignments, batch_size=4, precision="fp32"
    ).override(**changes)


def multiply_adds(tokens=16, width=32, depth=3, patch=4 * 3, out=4 * 3) -> tuple[int, int]:
    """Multiply-adds of a forward, and of the layers whose input needs no gradient because it depends on no weights."""
    block = tokens * (3 + 1 + 4 + 4) * width**2 + 2 * tokens**2 * width + 6 * width**2
    leaves = tokens * patch * width + 256 * width
    return depth * block + leaves + width**2 + tokens * width * out + 2 * width**2, leaves


def test_work_counts_every_product_forward_and_backward():
    network, leaves = multiply_adds()
    assert flops_per_image(configuration(alignments=()), {}) == 2 * (3 * network - leaves)
    projector = 16 * (32 * 24 + 24 * 24 + 24 * 7)
    assert flops_per_image(configuration(), {"tiny": 7}) == 2 * (3 * network - leaves + 3 * projector)


@pytest.mark.parametrize("changes", [
    {"checkpoint_activations": True}, {"precision": "bf16"}, {"batch_size": 8},
    {"diffusion": DiffusionConfig(path="vp")},
])  # fmt: skip
def test_recomputation_and_other_kernels_do_not_count_as_work(changes):
    assert flops_per_image(configuration(**changes), {"tiny": 7}) == flops_per_image(configuration(), {"tiny": 7})


def test_nt_xent_work_grows_with_the_batch():
    """Only its logits grow with the batch: 16 tokens against two images, in the forward and in one backward product."""
    contrasting = configuration(alignments=(configuration().alignments[0].override(loss="nt_xent"),))
    more = flops_per_image(contrasting, {"tiny": 7}) - flops_per_image(configuration(), {"tiny": 7})
    assert more == 2 * 2 * 16 * 2 * 7


def test_a_step_is_measured_whole_and_in_parts():
    config, data = configuration(), Synthetic({"tiny": 7}, 4)
    batch = data.batch(config, CPU, 16)
    step = MeasuredStep(config, in_memory(data.widths, batch), CPU)
    before = [p.detach().clone() for p in step.state.objective.parameters()]

    def slow_encoder(batch):
        time.sleep(0.05)
        return batch.features

    step.source = replace(step.source, encode=slow_encoder)
    figures = measure(step, {"fp32": 1e9}, 2)
    assert tuple(figures.parts) == PARTS
    assert figures.parts["encoder"] == pytest.approx(0.05, abs=0.03)
    assert figures.parts["network"] > figures.parts["data"]
    assert sum(figures.share(part) for part in PARTS) == pytest.approx(1)
    assert figures.floor == 4 * flops_per_image(config, {"tiny": 7}) / 1e9
    assert figures.utilisation == figures.floor / figures.seconds
    assert figures.images_per_second == 4 / figures.seconds
    assert step.state.step == 1 + 2 + 1  # one warm-up, two rounds, one in parts
    assert any(not torch.equal(a, b) for a, b in zip(before, step.state.objective.parameters(), strict=True))


def test_rates_are_work_divided_by_time(monkeypatch):
    assert timed(lambda: time.sleep(0.05), CPU) == pytest.approx(0.05, abs=0.04)
    monkeypatch.setitem(PRODUCT_SIDE, "cpu", 64)
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 2.0 * next(ticks))  # every product takes two seconds
    assert product_rate("fp32", CPU) == 2 * 64**3 / 2


def figures(seconds=1.0, batch=8, precision="fp32", compiled=False, features="cached", **parts) -> Measurement:
    shares = {"encoder": 0.0, "network": 0.8, "optimizer": 0.0, "averages": 0.0, "data": 0.0, **parts}
    return Measurement("SiT-B/2", features, batch, precision, compiled, seconds, 0.5, None, shares)


def test_advice_is_sorted_by_gain():
    now = figures(features="online", network=0.6, optimizer=0.1)
    now.parts["encoder"] = 0.3  # the names of its parts are used
    others = [figures(0.5, precision="bf16", features="online"), figures(0.9, compiled=True, features="online")]
    gains = [advice.gain for advice in advise(now, others)]
    assert gains == pytest.approx([2.0, 1 / 0.7, 1 / 0.9, 1 / 0.95])
    sentences = [advice.sentence for advice in advise(now, others)]
    assert "--precision bf16: 2.00 times" in sentences[0]
    assert "the encoder takes 30% of the step" in sentences[1]
    assert "--compile true: 1.11 times" in sentences[2]
    assert "take 10% of a step of 8 images" in sentences[3]


def test_slower_settings_and_noise_are_not_advised():
    assert advise(figures(), [figures(1.2, precision="bf16"), figures(0.98, compiled=True)]) == []


def test_slow_reading_is_reported_only_when_it_limits_the_step():
    assert advise(figures(data=0.7), []) == []  # hidden behind 0.8 s of computing
    (advice,) = advise(figures(data=1.6), [])
    assert advice.gain == pytest.approx(2)
    assert "reading a batch takes 1.600 s, computing its step 0.800 s" in advice.sentence


def test_the_table_has_a_column_for_every_part():
    row = figures(seconds=0.25, network=0.75, features="online", optimizer=0.25)
    head, _, line = table([row]).splitlines()
    cells = [dict(zip(*([c.strip() for c in text.split("|")[1:-1]] for text in (head, line)), strict=True))]
    assert cells[0]["images/s"] == "32.0"
    assert cells[0]["MFU"] == "200%"
    assert cells[0]["network"] == "75%"
    assert cells[0]["optimizer"] == "25%"
    assert cells[0]["memory"] == ""


def test_the_time_of_averages_is_separate_from_the_optimizer(monkeypatch):
    config, data = configuration(), Synthetic({"tiny": 7}, 4)
    batch = data.batch(config, CPU, 16)
    step = MeasuredStep(config, in_memory(data.widths, batch), CPU)
    monkeypatch.setattr(step, "advance", lambda: time.sleep(0.2))
    monkeypatch.setattr(step, "average", lambda: time.sleep(0.15))
    parts = step.parts()
    assert parts["averages"] == pytest.approx(0.15, abs=0.04)
    assert parts["optimizer"] == pytest.approx(0.05, abs=0.04)
