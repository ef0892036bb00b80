"""What the quickstart chooses for images of one's own."""

import numpy as np
import pytest
from PIL import Image

from repa.base.errors import UserError
from repa.cli import options
from repa.cli.train import TrainArguments
from repa.data.sources.contract import Source
from repa.recipes import load_recipe
from repa.recipes.own_images import choose


class Pictures(Source):
    """`num` pictures of one size; every fifth cannot be read."""

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
    ("num", "size", "resolution", "model", "flip", "steps", "judge"),
    [
        (20, (500, 400), 64, "SiT-S/8", True, 1000, "lite0"),
        (6_000, (40, 32), 32, "SiT-S/4", False, 1000, "lite0"),
        (50_000, (32, 32), 32, "SiT-S/4", False, 2000, "tiny-judge"),
    ],
)
def test_by_the_data(num, size, resolution, model, flip, steps, judge):
    choice = choose(Pictures(num, size), 1000)
    assert (choice.resolution, choice.flip) == (resolution, flip)
    overlap = 4 if resolution == 64 else 2  # half a patch
    changes = {"model.name": model, "model.patch_overlap": overlap, "num_steps": steps, "preview.features": judge}
    assert choice.changes == changes
    assert f"{resolution} pixels, because the images' shorter sides are about {min(size)} pixels" in choice.reasons[0]
    words = ["quickstart-repa", "--data", "d", "--out", "o", *choice.flags()]
    recipe = options.parse(
        TrainArguments, words, verb="train", about="", positional=("recipe",), values=load_recipe(words[0])
    )
    assert (recipe.model.name, recipe.num_steps, recipe.preview.features) == (model, steps, judge)
    assert recipe.model.hidden_dim == load_recipe("quickstart-repa").model.hidden_dim


def test_what_is_asked_for_is_taken():
    choice = choose(Pictures(100, (500, 500)), 1000, resolution=32, asked_steps=7)
    assert (choice.resolution, choice.changes["num_steps"]) == (32, 7)
    assert choice.flags()[:4] == ["--model.name", "SiT-S/4", "--model.patch-overlap", "2"]


def test_without_its_package_the_small_judge(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choice = choose(Pictures(100, (500, 500)), 1000)
    assert choice.changes["preview.features"] == "tiny-judge"
    assert 'pip install "repa[judge]"' in choice.reasons[-1]


@pytest.mark.parametrize(
    ("num", "said"), [(19, "holds 19 images.* give more"), (100_001, "holds 100,001 images.*prepare")]
)
def test_too_few_and_too_many_are_refused(num, said):
    with pytest.raises(UserError, match=said):
        choose(Pictures(num, (32, 32)), 1000)
