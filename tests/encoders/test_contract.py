"""The contract of all encoders, tested on the small one."""

import hashlib

import pytest
import torch

from repa.base.errors import UserError
from repa.encoders import ENCODERS, VisionEncoder, load_encoder
from repa.encoders.contract import resize
from tests.oracles import bicubic


@pytest.fixture(scope="module")
def tiny() -> VisionEncoder:
    return load_encoder("tiny")


def noise_images(n: int, side: int) -> torch.Tensor:
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (torch.zeros(2, 3, 32, 32), ["torch.float32"]),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), ["(3, 32, 32)"]),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), ["(2, 1, 32, 32)"]),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), ["(2, 32, 32, 3)"]),
        (torch.zeros(2, 3, 32, 48, dtype=torch.uint8), ["(2, 3, 32, 48)", "square"]),
    ],
)
def test_wrong_inputs_are_refused_with_what_arrived(tiny, images, names):
    with pytest.raises(UserError) as error:
        tiny(images, 8)
    assert all(name in str(error.value) for name in ["tiny", "uint8", *names])


def test_a_grid_below_one_is_refused(tiny):
    with pytest.raises(UserError, match="at least 1, but got 0"):
        tiny(noise_images(1, 32), 0)


def test_encoders_stay_frozen_and_in_eval_mode(tiny):
    images = noise_images(2, 32)
    before = tiny(images, 8)
    torch.nn.ModuleList([tiny]).train()
    assert not any(module.training for module in tiny.modules())
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    after = tiny(images, 8)
    assert torch.equal(before.patches, after.patches)
    assert torch.equal(before.pooled, after.pooled)
    assert not after.patches.requires_grad
    assert not after.pooled.requires_grad


def test_images_do_not_influence_each_other(tiny):
    images = noise_images(3, 32)
    torch.testing.assert_close(tiny(images, 8).patches[1:2], tiny(images[1:2], 8).patches)


def test_encoders_compute_in_the_dtype_of_their_weights():
    tiny = load_encoder("tiny")
    exact = tiny(noise_images(2, 32), 8).patches
    half = tiny.to(torch.bfloat16)(noise_images(2, 32), 8).patches
    assert exact.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(exact, half.float(), dim=-1).min() > 0.99


def test_the_identity_contains_the_files_checksum(tiny):
    assert tiny.identity["name"] == "tiny"
    assert tiny.identity["weights_sha256"] == hashlib.sha256(tiny.weights_file.read_bytes()).hexdigest()
    assert "antialias" in tiny.identity["preprocessing"]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [5, 14, 21])
def test_resize_is_bicubic(size, antialias):
    image = torch.rand(1, 2, 14, 14, generator=torch.Generator().manual_seed(1))
    expected = torch.from_numpy(bicubic.resize(image.numpy(), size, antialias)).float()
    torch.testing.assert_close(resize(image, size, antialias), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("dinov2-vit-b", "dinov2-b"),
        ("dinov2reg-vit-l", "dinov2-reg-l"),
        ("dinov2-reg-vit-g", "dinov2-reg-g"),
        ("dinov2-s", "dinov2-s"),
        ("tiny", "tiny"),
    ],
)
def test_spellings_of_the_reference_code_are_accepted(spelling, name):
    assert ENCODERS.check(spelling) == name
    assert ENCODERS.target(spelling) == ENCODERS.target(name)


@pytest.mark.parametrize(
    ("given", "meant"), [("tinny", "tiny"), ("dinov2-vit-xl", "dinov2-l"), ("dino2-b", "dinov2-b")]
)
def test_an_unknown_name_suggests_the_nearest(given, meant):
    with pytest.raises(UserError, match=f"Did you mean '{meant}'"):
        load_encoder(given)


def test_a_missing_weight_path_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_encoder("tiny", weights=tmp_path / "nowhere")


def test_a_tilde_in_the_weight_path_is_expanded(tmp_path, monkeypatch):
    """A shell does not expand the ~ in dinov2-b=~/folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=str(tmp_path / "nowhere")):
        load_encoder("tiny", weights="~/nowhere")


def test_a_private_encoder_loads_by_dotted_name(tiny):
    assert load_encoder("tests.encoders.private.load").dim == 3
    with pytest.raises(UserError, match="must return an instance of VisionEncoder, but returned dict"):
        load_encoder("tests.encoders.private.load_wrong")


@pytest.mark.parametrize(("function", "given"), [("load_map", "(2, 3, 4, 4)"), ("load_summary", "(2, 17, 3)")])
def test_a_private_encoder_must_give_one_token_per_position(function, given):
    """A map or a class token would otherwise be resampled as part of the grid."""
    encoder = load_encoder(f"tests.encoders.private.{function}")
    with pytest.raises(UserError) as error:
        encoder(noise_images(2, 8), 4)
    assert f"= (2, 16, 3), but returned {given}" in str(error.value)
