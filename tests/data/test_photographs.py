import re
import socket

import numpy as np
import pytest
from PIL import Image

from repa.base.errors import UserError
from repa.data import open_source
from repa.data.sources import photographs
from repa.data.sources.photographs import FOLDER, load_photographs, photograph_crop


def pixels(index, resolution=16, seed=0):
    return np.asarray(photograph_crop(index, resolution, seed))


def test_all_photographs_are_in_the_package(monkeypatch):
    """They load without network, are in colour and square, and take less than 2 MB."""
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("went to the network"))
    load_photographs.cache_clear()
    loaded = load_photographs().values()
    assert len(loaded) == 20
    assert all(p.mode == "RGB" and p.size == (256, 256) for p in loaded)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2e6


def test_every_photograph_records_its_origin():
    table = (FOLDER / "ATTRIBUTION.md").read_text()
    rows = re.findall(r"^\| `(.+)` \| (.+) \| https://\S+ \| .+ \|$", table, re.M)
    assert [name for name, author in rows] == sorted(path.name for path in FOLDER.glob("*.jpg"))
    assert "CC0 1.0" in table


def test_a_crop_depends_only_on_seed_and_index():
    later = pixels(5)
    for index in range(5):
        pixels(index)
    np.testing.assert_array_equal(pixels(5), later)
    assert (pixels(5, seed=1) != later).any()
    assert (pixels(5 + 20) != later).any()


def test_every_resolution_shows_the_same_crop():
    small, large = pixels(3, 16).astype(float), pixels(3, 64).astype(float)
    means = large.reshape(16, 4, 16, 4, 3).mean((1, 3))
    other = pixels(3 + 20, 16).astype(float)
    assert abs(small - means).mean() < 0.3 * abs(other - means).mean()


def test_classes_are_the_photographs():
    source = open_source("photographs:num=40,seed=7")
    assert len(source) == 40
    assert source.class_names == sorted(load_photographs())
    assert repr(source).endswith("40 images of 20 classes; labels from the photographs: each is a class")
    assert {"astronaut", "cat", "coffee", "hot air balloon"} < set(source.class_names)
    assert source.labels.tolist() == [i % 20 for i in range(40)]
    np.testing.assert_array_equal(np.asarray(source.image(23, 16)), pixels(23, 16, 7))
    assert source.identity["num_images"] == 40
    assert source.identity["seed"] == 7


def test_changed_photographs_have_another_identity(monkeypatch):
    from repa.data.sources import photographs

    first = open_source("photographs").identity
    changed = {name: p.rotate(90) if name == "cat" else p for name, p in load_photographs().items()}
    monkeypatch.setattr(photographs, "load_photographs", lambda: changed)
    monkeypatch.setattr(photographs, "checksum", photographs.checksum.__wrapped__)
    assert open_source("photographs").identity != first


def test_size_position_and_mirroring_of_crops_follow_their_distributions(monkeypatch):
    """The boxes passed to Pillow have uniform sides inside the photograph, and half of the crops are mirrored."""
    boxes, mirrored = [], []
    resize = Image.Image.resize

    def spy(self, size, resample, box):
        boxes.append(box)
        return resize(self, (2, 2), resample, box=box)

    monkeypatch.setattr(Image.Image, "resize", spy)
    monkeypatch.setattr(Image.Image, "transpose", lambda self, method: mirrored.append(method) or self)
    for index in range(400):
        photograph_crop(index, 2, 0)
    left, top, right, bottom = np.array(boxes).T
    np.testing.assert_allclose(right - left, bottom - top)
    assert (np.minimum(left, top) >= 0).all()
    assert (np.maximum(right, bottom) <= 256).all()
    uniform = {
        "side": ((right - left) / 256 - 0.6) / 0.4,
        "left": left / (256 - (right - left)),
        "top": top / (256 - (right - left)),
    }
    for name, place in uniform.items():  # each is uniform on [0, 1]
        assert abs(np.sort(place) - (np.arange(400) + 0.5) / 400).max() < 0.08, name  # Kolmogorov-Smirnov, p = 0.01
    assert 160 < len(mirrored) < 240
    assert set(mirrored) == {Image.Transpose.FLIP_LEFT_RIGHT}


def test_the_smallest_crop_is_a_setting():
    wide, default = (open_source(f"photographs:num=40{more}") for more in (",smallest=1", ""))
    for index in range(40):
        whole = load_photographs()[wide.class_names[index % 20]].resize((16, 16), Image.Resampling.BICUBIC)
        found = np.asarray(wide.image(index, 16))
        assert any(np.array_equal(found, side) for side in (np.asarray(whole), np.asarray(whole)[:, ::-1]))
    shares = [photographs.crop_of(index, 0, 256, 0.8).share for index in range(400)]
    assert 0.8 <= min(shares) < 0.81
    assert 0.99 < max(shares) < 1
    assert wide.identity != default.identity
    for value in ("0", "0.05", "1.5", "half", "nan", "true"):
        with pytest.raises(UserError, match="smallest"):
            open_source(f"photographs:smallest={value}")


def test_captions_describe_the_crop():
    plain, told = (open_source(f"photographs:num=400,seed=2{more}") for more in ("", ",captions=true"))
    assert plain.captions(3) == ()
    assert not plain.has_captions
    assert told.identity != plain.identity
    light = {"dark": [], "": [], "bright": []}
    for index in range(400):
        sentence, words = told.captions(index)
        name = told.class_names[index % 20]
        assert name in sentence
        assert words.startswith(name)
        side = photographs.crop_of(index, 2, 256).share
        assert ("close" in sentence) == ("close" in words) == (side < 0.8)
        word = next((word for word in ("dark", "bright") if word in sentence), "")
        assert (name, word) not in photographs.unseen()
        difference = np.asarray(told.image(index, 8), float).mean() - np.asarray(plain.image(index, 8), float).mean()
        light[word].append(difference)
    assert max(light["dark"]) < -5
    assert min(light["bright"]) > 5
    assert set(light[""]) == {0.0}
    assert all(90 < len(found) < 200 for found in light.values())
    assert len(photographs.unseen()) == 10
    assert photographs.captions_of("owl", "bright", True) == ("a bright picture of an owl, close", "owl, bright, close")
    assert photographs.captions_of("books", "", False) == ("a picture of books", "books")
    with pytest.raises(UserError, match="must be true or false"):
        open_source("photographs:captions=2")


def test_without_labels_the_same_crops_are_one_class():
    whole, one = (open_source("photographs:num=30", labels=labels) for labels in ("", "none"))
    assert (one.class_names, set(one.labels)) == (["all"], {0})
    assert one.identity != whole.identity
    assert one.image(21, 16) == whole.image(21, 16)
