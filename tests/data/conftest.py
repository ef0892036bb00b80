"""Small sources, and stand-ins for models that make every stored number predictable."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from repa.data import encoding
from repa.encoders.contract import Features
from tests.oracles.data import noise_image


class FakeAutoencoder:
    """Moments are block means of red and green (C = 2) at a quarter of the size, with standard deviations 1/2."""

    channels, factor, stores_moments, stored_channels = 2, 4, True, 4

    def __init__(self):
        self.identity = {"name": "fake", "sha256": "a" * 64}

    def check_resolution(self, height, width):
        """Every resolution is accepted."""

    def encode(self, images, dtype=torch.float32):
        assert len(images), "real networks may fail on no images"
        mean = F.avg_pool2d(images[:, :2].float() / 255, 4)
        return torch.cat([mean, torch.full_like(mean, 0.5)], 1)


class FakeEncoder:
    """Tokens are the RGB means of the grid's cells; calls are counted."""

    dim, patch_size = 3, 4

    def __init__(self):
        self.identity = {"name": "fake", "weights_sha256": "b" * 64}
        self.calls = 0

    def grid_for(self, resolution):
        return resolution // self.patch_size

    def __call__(self, images, grid):
        assert len(images), "real networks may fail on no images"
        self.calls += 1
        patches = F.adaptive_avg_pool2d(images.float() / 255, grid).flatten(2).transpose(1, 2)
        return Features(patches, patches.mean(1))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Skip fsync: these tests write hundreds of tiny files and do not test power cuts."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def fakes(monkeypatch):
    """Replace the models and return the replacements, whose identity a test can change."""
    autoencoder, encoder = FakeAutoencoder(), FakeEncoder()
    real = encoding.load_autoencoder
    monkeypatch.setattr(
        encoding,
        "load_autoencoder",
        lambda spec, **options: real(spec, **options) if spec == "pixels" else autoencoder,
    )
    monkeypatch.setattr(encoding, "load_encoder", lambda spec, **options: encoder)
    return autoencoder, encoder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes with 7 images in `ants` and 4 in `bees`."""
    root = tmp_path / "pictures"
    for name, num, first in (("ants", 7, 0), ("bees", 4, 100)):
        (root / name).mkdir(parents=True)
        for i in range(num):
            noise_image(first + i).save(root / name / f"{i:03d}.png")
    return root


def pack(root: Path, path: Path, prefix: str = "") -> Path:
    """A zip of a folder, with members in unsorted order."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.*"), reverse=True):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def spoil(path: Path) -> None:
    """Cut an image file in half."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, including hidden ones, with their bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def all_rows(data, field: str) -> np.ndarray:
    return data.gather(field, np.arange(data.num_images))
