import socket

import numpy as np
import pytest

from repa.base.errors import UserError
from repa.data import open_source
from repa.data.sources import photographs
from repa.data.sources.photographs import PHOTOGRAPHS, load_photographs, photograph_crop


def pixels(index, resolution=16, seed=0):
    return np.asarray(photograph_crop(index, resolution, seed))


def test_all_ship_with_the_dependencies(monkeypatch):
    """They load with the network cut off, in colour, large enough for the crops."""
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("went to the network"))
    load_photographs.cache_clear()
    loaded = load_photographs()
    assert len(loaded) == len(PHOTOGRAPHS) == 17
    assert all(p.mode == "RGB" and min(p.size) * photographs.LARGEST > photographs.SMALLEST for p in loaded)


def test_a_missing_one_is_said(monkeypatch):
    monkeypatch.setitem(PHOTOGRAPHS, "moon", ("skimage", "data", "removed.png"))
    load_photographs.cache_clear()
    with pytest.raises(UserError, match=r"'moon' is missing.*data/removed\.png"):
        open_source("photographs")
    load_photographs.cache_clear()


def test_a_crop_depends_on_seed_and_index_alone():
    later = pixels(5)
    for index in range(5):
        pixels(index)
    np.testing.assert_array_equal(pixels(5), later)
    assert (pixels(5, seed=1) != later).any()
    assert (pixels(5 + 17) != later).any()


def test_every_resolution_shows_the_same_crop():
    small, large = pixels(3, 16).astype(float), pixels(3, 64).astype(float)
    means = large.reshape(16, 4, 16, 4, 3).mean((1, 3))
    other = pixels(3 + 17, 16).astype(float)
    assert abs(small - means).mean() < 0.3 * abs(other - means).mean()


def test_classes_are_the_photographs():
    source = open_source("photographs:num=40,seed=7")
    assert len(source) == 40
    assert source.class_names == sorted(PHOTOGRAPHS)
    assert source.labels.tolist() == [i % 17 for i in range(40)]
    np.testing.assert_array_equal(np.asarray(source.image(20, 16)), pixels(20, 16, 7))
    assert source.identity == {"name": "photographs", "num_images": 40, "seed": 7}


def test_sides_places_and_mirroring_follow_their_distributions(monkeypatch):
    """The boxes that Pillow is asked for: log-uniform sides, inside the photograph, half of them mirrored."""
    from PIL import Image

    boxes, mirrored = [], []
    resize = Image.Image.resize

    def spy(self, size, resample, box):
        boxes.append((*box, *self.size))
        return resize(self, (2, 2), resample, box=box)

    monkeypatch.setattr(Image.Image, "resize", spy)
    monkeypatch.setattr(Image.Image, "transpose", lambda self, method: mirrored.append(method) or self)
    for index in range(0, 17 * 400, 17):  # always the astronaut, 512 x 512
        photograph_crop(index, 2, 0)
    left, top, right, bottom, width, height = np.array(boxes).T
    np.testing.assert_allclose(right - left, bottom - top)
    assert (np.minimum(left, top) >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    place = (np.log(right - left) - np.log(40)) / (np.log(0.6 * 512) - np.log(40))  # uniform on [0, 1]
    assert abs(np.sort(place) - (np.arange(400) + 0.5) / 400).max() < 0.08  # Kolmogorov-Smirnov, p = 0.01
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.4
    assert 160 < len(mirrored) < 240
    assert set(mirrored) == {Image.Transpose.FLIP_LEFT_RIGHT}
