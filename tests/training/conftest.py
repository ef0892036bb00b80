from pathlib import Path

import pytest
import torch

from repa.data import open_data
from repa.training import TrainConfig, train


@pytest.fixture
def run_training(data_folder):
    def start(config: TrainConfig, run: Path, **options):
        options.setdefault("say", lambda text: None)
        return train(config, open_data(data_folder), run, device=torch.device("cpu"), **options)

    return start
