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
