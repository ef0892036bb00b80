"""FLOPs from shapes against torch's count, and the logged utilisation."""

import pytest
import torch

from repa.alignment import Alignment
from repa.alignment.config import AlignmentConfig
from repa.base.device import quick_product_rate
from repa.models import build
from repa.performance.counts import flops_per_image
from repa.runs import read_metrics
from repa.training import Objective, TrainConfig
from repa.training.log import flops_of


@pytest.mark.parametrize("projector", ["mlp:width=96", "conv:kernel=3"])
def test_flops_equal_torchs_count(projector):
    config = TrainConfig(
        model={"name": "SiT-S/2", "hidden_dim": 64, "depth": 3, "num_heads": 2, "latent_size": 16, "latent_channels": 4,
               "num_classes": 10},
        alignments=(AlignmentConfig(target="tiny", depth=2, projector=projector),),
    )  # fmt: skip
    model = build(config.model)
    objective = Objective(
        model, [Alignment.of(config.alignments[0], model, {"tiny": 48})], config.diffusion, label_dropout=0.0, seed=0
    )
    # without gradients of the latents and of the time features, which shapes do not show
    assert flops_of(objective) == pytest.approx(flops_per_image(config, {"tiny": 48}), rel=0.01)


def test_logged_rows_contain_the_utilisation(tiny_config, run_training, tmp_path):
    seen: list = []
    run_training(tiny_config.override(num_steps=2), tmp_path / "r", progress=seen.append)
    row = [row for row in read_metrics(tmp_path / "r") if row["kind"] == "train"][-1]
    rate = quick_product_rate("fp32", torch.device("cpu"))
    assert row["utilisation"] == pytest.approx(row["images_per_second"] * flops_of(seen[0].objective) / rate)
    assert 0 < row["utilisation"] < 1
    assert row["peak_memory"] > 2**20
    assert row["data_wait"] >= 0
