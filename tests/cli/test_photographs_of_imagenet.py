"""The commands on real photographs from $REPA_TEST_DATA or from an ImageNet sample next to the repository."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repa.cli.main import run
from repa.data import open_data
from repa.encoders import load_encoder
from repa.evaluation import evaluate, reference_of
from repa.runs import read_metrics

BESIDE = Path(__file__).parents[2].parent / "shared" / "data" / "imagenet-sample"
SOURCE = Path(os.environ.get("REPA_TEST_DATA") or BESIDE)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")

pytestmark = pytest.mark.skipif(not SOURCE.is_dir(), reason=f"no photographs in {SOURCE}")


@pytest.fixture(scope="module", params=[32, 64])
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / str(request.param)
    argv = ["prepare", str(SOURCE), str(folder), "--resolution", str(request.param), "--features", "tiny"]
    assert run(argv) == 0
    return open_data(folder)


def photographs() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*") if path.suffix.lower() in EXTENSIONS)


def test_every_photograph_is_prepared(prepared):
    paths = photographs()
    assert prepared.num_images == len(paths)
    assert [prepared.class_names[label] for label in prepared.labels] == [path.parent.name for path in paths]
    prepared.check()
    side = prepared.resolution // 4
    tokens = prepared.gather("features.tiny", np.arange(5))
    assert tokens.shape == (5, side * side, prepared.features["tiny"].dim)
    assert np.isfinite(tokens).all()


def test_the_crop_is_the_middle_square(prepared):
    """It resembles the middle square, resized by Pillow in one step, more than a shifted one."""
    size = prepared.resolution
    for index in range(0, prepared.num_images, 3):
        with Image.open(photographs()[index]) as image:
            picture = image.convert("RGB")
        short = min(picture.size)
        left, top = (picture.width - short) / 2, (picture.height - short) / 2

        def square(dx: float, dy: float, picture=picture, short=short, left=left, top=top) -> np.ndarray:
            corner = min(max(left + dx, 0), picture.width - short), min(max(top + dy, 0), picture.height - short)
            box = (*corner, corner[0] + short, corner[1] + short)
            return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(float)

        found = prepared.gather("images", np.array([index]))[0].transpose(1, 2, 0).astype(float)
        wanted = square(0, 0)
        error = np.abs(found - wanted).mean()
        step = 2 * short / size  # two pixels of the resized image
        others = [square(dx, dy) for dx, dy in ((step, 0), (-step, 0), (0, step), (0, -step))]
        # a square image has no shifted square
        others = [other for other in others if not np.array_equal(other, wanted)]
        for other in (*others, wanted[:, ::-1]):
            assert error < np.abs(found - other).mean(), photographs()[index]


def test_a_few_training_steps_and_a_distance(prepared, tmp_path):
    argv = (
        f"train quickstart-repa --data {prepared.folder} --out {tmp_path / 'r'} --model.hidden-dim 64 --model.depth 2 "
        "--model.num-heads 2 --alignments.0.projector linear --batch-size 10 --num-steps 20 --log-every 5 --preview.every 0"
    )
    assert run(argv.split()) == 0
    rows = [row for row in read_metrics(tmp_path / "r") if row["kind"] == "train"]
    assert rows[-1]["denoising"] < rows[0]["denoising"]
    assert rows[-1]["alignment"]["tiny@2"] < rows[0]["alignment"]["tiny@2"]
    images = torch.from_numpy(prepared.gather("images", np.arange(prepared.num_images)))
    extractor = load_encoder("tiny-classifier")
    reference = reference_of(prepared, extractor, "tiny-classifier")
    noise = torch.randint(-40, 41, images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images + noise).clamp(0, 255).to(torch.uint8)
    distances = [evaluate([batch], extractor, reference)["fd"] for batch in (images, images.flip(-1), noisy)]
    # a mirror image resembles a photograph more than a noisy one does
    assert distances[0] < 1e-4 < distances[1] < distances[2]
