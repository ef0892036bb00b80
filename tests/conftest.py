"""Settings of every test: one thread, no network, and small real data made by the package itself."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """40 images of two classes that differ in colour and texture, as class folders of 20-pixel PNGs."""
    root = tmp_path_factory.mktemp("images")
    stream = np.random.default_rng(0)
    for label, (name, base) in enumerate({"dark": 60, "light": 180}.items()):
        (root / name).mkdir()
        for index in range(20):
            stripes = 40 * np.sin(np.arange(20) * (label + 1) / 2)[:, None, None]
            noise = stream.normal(0, 15, (20, 20, 3))
            pixels = np.clip(base + stripes + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02}.png")
    return root


@pytest.fixture(scope="session")
def data_folder(image_folder, tmp_path_factory) -> Path:
    """Those images prepared at 16 pixels with the tokens of `tiny` (a 4 x 4 grid)."""
    from repa.data import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("data") / "shards"
    prepare(str(image_folder), folder, PrepareConfig(resolution=16, features=("tiny",), shard_size=16))
    return folder


@pytest.fixture(scope="session")
def tiny_config():
    """A network of 2 blocks and 16 tokens, aligned to `tiny`, ten steps."""
    from repa.alignment.config import AlignmentConfig
    from repa.models.config import ModelConfig
    from repa.training import TrainConfig

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


@pytest.fixture(scope="session")
def random_run(tiny_config, data_folder, tmp_path_factory) -> Path:
    """A run folder with checkpoints of steps 10 and 20: random weights, as the zero initialisation answers 0 everywhere."""
    from repa.data import open_data
    from repa.runs import save_checkpoint
    from repa.training.resolve import claim_folder, resolve
    from repa.training.state import build_state

    run = tmp_path_factory.mktemp("runs") / "random"
    data = open_data(data_folder)
    config = resolve(tiny_config, data, torch.device("cpu"))
    claim_folder(run, config, data)
    state = build_state(config, {"tiny": data.features["tiny"].dim}, torch.device("cpu"))
    stream = torch.Generator().manual_seed(0)
    for state.step in (10, 20):
        for network in (state.model, state.ema.model):
            for p in network.parameters():
                p.data = torch.randn(p.shape, generator=stream) * 0.15
        save_checkpoint(run, state.snapshot())
    return run
