"""Settings for all tests: one thread, no network, and small data sets and runs made by the package itself."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """40 images of two classes that differ in colour and texture, as 20-pixel PNGs in class folders."""
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
    """These images prepared at 16 pixels with the tokens of `tiny` (a 4 x 4 grid)."""
    from repa.data import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("data") / "shards"
    prepare(str(image_folder), folder, PrepareConfig(resolution=16, features=("tiny",), shard_size=16))
    return folder


@pytest.fixture(scope="session")
def tiny_config():
    """A network with 2 blocks and 16 tokens, aligned to `tiny`, trained for ten steps."""
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
    """A run with checkpoints of steps 10 and 20; weights are random, because the initial prediction is zero."""
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


@pytest.fixture(scope="session")
def captioned_data(image_folder, tmp_path_factory) -> Path:
    """These images with captions, two for all but one, prepared with text tokens (stored/) and without (plain/)."""
    from repa.data import PrepareConfig, prepare

    root = tmp_path_factory.mktemp("captioned")
    shutil.copytree(image_folder, root / "source")
    for path in sorted((root / "source").rglob("*.png")):
        if (path.parent.name, path.stem) != ("dark", "03"):
            path.with_suffix(".txt").write_text(f"a {path.parent.name} picture\nnumber {path.stem}")
    config = PrepareConfig(resolution=16, features=("tiny",), shard_size=16, text="tiny-text:tokens=4,width=8")
    prepare(root / "source", root / "stored", config)
    prepare(root / "source", root / "plain", config.override(text=""))
    return root


@pytest.fixture(scope="session")
def text_run(tiny_config, captioned_data, tmp_path_factory) -> Path:
    """A run of an MMDiT with random weights on `captioned_data`, without a training step."""
    from repa.data import open_data
    from repa.runs import save_checkpoint
    from repa.training.inputs import TextConditions
    from repa.training.resolve import claim_folder, resolve
    from repa.training.state import build_state

    run, device = tmp_path_factory.mktemp("runs") / "text", torch.device("cpu")
    data = open_data(captioned_data / "stored")
    config = resolve(tiny_config.override(model=tiny_config.model.override(backbone="mmdit")), data, device)
    texts = TextConditions(config, data, device)
    config = texts.completed(config)
    claim_folder(run, config, data, texts.identity)
    state = build_state(config, {"tiny": data.features["tiny"].dim}, device, empty_text=texts.empty)
    stream = torch.Generator().manual_seed(0)
    for network in (state.model, state.ema.model):
        for p in network.parameters():
            p.data = torch.randn(p.shape, generator=stream) * 0.15
    state.step = 10
    save_checkpoint(run, state.snapshot())
    return run
