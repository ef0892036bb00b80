"""The two packaged networks: size, integrity, token order, and quality of their features."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import repa.encoders
from repa.base.errors import UserError
from repa.base.images import to_tensor
from repa.data.sources.photographs import load_photographs
from repa.encoders import load_encoder

WEIGHTS = Path(repa.encoders.__file__).parent / "weights"
NAMES = ["tiny", "tiny-classifier"]


@pytest.fixture(scope="module")
def encoders() -> dict:
    return {name: load_encoder(name) for name in NAMES}


@pytest.fixture(scope="module")
def crops() -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of 32-pixel crops, 8 pixels apart, at 8 places in each of four photographs."""
    first, second = [], []
    for name in ("astronaut", "cat", "coffee", "space shuttle"):
        image = to_tensor(load_photographs()[name].resize((96, 96)))
        for left in (8, 48):
            first.append(image[:, 32:64, left : left + 32])
            second.append(image[:, 32:64, left + 8 : left + 40])
    return torch.stack(first), torch.stack(second)


def test_the_packaged_networks_are_small():
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 2.5e6


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_file_records_its_origin(name):
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        facts = file.metadata()
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118, no iterator in safetensors
    assert {"name", "objective", "data", "epochs", "seed", "torch", "linear_probe"} <= facts.keys()
    assert facts["name"] == name
    assert dtypes == {torch.float16}


@pytest.mark.parametrize(("name", "patch_size", "dim"), [("tiny", 4, 192), ("tiny-classifier", 8, 128)])
@pytest.mark.parametrize("grid", [4, 7])
def test_features_have_the_documented_shapes(encoders, name, patch_size, dim, grid):
    encoder = encoders[name]
    assert (encoder.name, encoder.patch_size, encoder.dim) == (name, patch_size, dim)
    features = encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), grid)
    assert features.patches.shape == (2, grid * grid, dim)
    torch.testing.assert_close(features.pooled, features.patches.mean(1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("row", "column"), [(0, 1), (1, 0), (1, 1)])
def test_tokens_are_row_major(encoders, crops, name, row, column):
    """Replacing one quadrant of the image changes the tokens of that quadrant most."""
    encoder, images = encoders[name], crops[0]
    changed = images.clone()
    rows, columns = slice(row * 16, row * 16 + 16), slice(column * 16, column * 16 + 16)
    changed[:, :, rows, columns] = images.roll(1, dims=0)[:, :, rows, columns]
    moved = (encoder(changed, 8).patches - encoder(images, 8).patches).norm(dim=-1).mean(0)  # (64,)
    quadrants = moved.view(2, 4, 2, 4).mean((1, 3))
    assert quadrants.argmax() == 2 * row + column
    assert quadrants[row, column] > 1.5 * quadrants.sum() / 4


def test_large_images_are_downsampled_with_antialiasing(encoders):
    """A fine checkerboard must become grey; without antialiasing it would become another pattern."""
    board = (torch.arange(128)[:, None] + torch.arange(128)) % 2 * 255
    board = board.to(torch.uint8).expand(1, 3, 128, 128)
    pixels = encoders["tiny"].prepare(board.float() / 255, 32)
    torch.testing.assert_close(pixels, torch.zeros_like(pixels), atol=0.02, rtol=0)


def test_crops_of_one_place_are_closer_than_crops_of_others(encoders, crops):
    a, b = (torch.nn.functional.normalize(encoders["tiny"](batch, 8).pooled, dim=1) for batch in crops)
    cosine = a @ b.T
    others = cosine[~torch.eye(len(cosine), dtype=torch.bool)]
    assert (cosine.argmax(1) == torch.arange(len(cosine))).float().mean() >= 0.75
    assert cosine.diagonal().mean() > others.mean() + 0.3


def test_the_classifiers_features_move_with_corruption(encoders, crops):
    clean = crops[0].float()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    images = [(clean + strength * noise).clamp(0, 255).to(torch.uint8) for strength in (0, 2, 8, 24)]
    pooled = [encoders["tiny-classifier"](batch, 4).pooled for batch in images]
    small, medium, large = ((spoilt - pooled[0]).norm(dim=1).mean() for spoilt in pooled[1:])
    assert 0 < 1.5 * small < medium
    assert 1.5 * medium < large


def test_overlapping_crops_have_similar_tokens_at_the_same_place(encoders, crops):
    """The crops are 8 pixels, or two tokens, apart: token (r, c + 2) of the first is (r, c) of the second."""
    a, b = (encoders["tiny"](batch, 8).patches.unflatten(1, (8, 8)) for batch in crops)
    same = torch.cosine_similarity(a[:, :, 2:], b[:, :, :-2], dim=-1).mean()
    mirrored = torch.cosine_similarity(a[:, :, 2:], b[:, :, :-2].flip(2), dim=-1).mean()
    assert same > 0.8
    assert same > mirrored + 0.2


def test_damaged_or_wrong_weights_are_refused(tmp_path):
    whole = (WEIGHTS / "tiny.safetensors").read_bytes()
    damaged, incomplete = tmp_path / "damaged.safetensors", tmp_path / "incomplete.safetensors"
    damaged.write_bytes(whole[: len(whole) // 2])
    tensors = load_file(WEIGHTS / "tiny.safetensors")
    tensors.pop("head.bias")
    save_file(tensors, incomplete)
    for path in (damaged, incomplete, WEIGHTS / "tiny-classifier.safetensors"):
        with pytest.raises(UserError, match=path.name):
            load_encoder("tiny", weights=path)
    with pytest.raises(UserError, match=r"\.safetensors file"):
        load_encoder("tiny", weights=tmp_path)
