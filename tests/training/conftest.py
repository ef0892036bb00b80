from pathlib import Path

import pytest
import torch

from repa.alignment.config import AlignmentConfig
from repa.data import open_data
from repa.models.config import ModelConfig
from repa.training import TrainConfig, train


@pytest.fixture(scope="session")
def tiny_config() -> TrainConfig:
    """A network of 2 blocks and 16 tokens, aligned to `tiny`, ten steps."""
    return TrainConfig(
        model=ModelConfig(name="SiT-S/4", hidden_dim=32, depth=2, num_heads=2),
        alignments=(AlignmentConfig(target="tiny", depth=1, projector="mlp:width=16"),),
        batch_size=8,
        num_steps=10,
        ema_decay=0.9,
        log_every=1,
        save_every=5,
        precision="fp32",
    )


@pytest.fixture
def run_training(data_folder):
    def start(config: TrainConfig, run: Path, **options):
        options.setdefault("say", lambda text: None)
        return train(config, open_data(data_folder), run, device=torch.device("cpu"), **options)

    return start
