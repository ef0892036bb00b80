"""DINOv2 with and without registers, from tiny random checkpoints in the hub's format."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from repa.base.errors import UserError
from repa.encoders import load_encoder
from repa.encoders.vit import resample_positions
from tests.oracles import bicubic

NATIVE = 5
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": NATIVE * 14,
    "patch_size": 14,
}
MODELS = {
    "dinov2-b": lambda: Dinov2Model(Dinov2Config(**SMALL)),
    "dinov2-reg-b": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)),
}
PREFIX = {"dinov2-b": 1, "dinov2-reg-b": 5}
both = pytest.mark.parametrize("name", list(MODELS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """Random checkpoints; weights initialised to 0 or 1 are changed, so that leaving one out shows."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    folders = {}
    for name, make in MODELS.items():
        model = make()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.embeddings.position_embeddings.data.mul_(5)
        folders[name] = tmp_path_factory.mktemp("hub") / name
        model.save_pretrained(folders[name])
    return folders


def noise_images(side: int) -> torch.Tensor:
    return torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(images: torch.Tensor) -> np.ndarray:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return (images.numpy() / 255 - mean[:, None, None]) / std[:, None, None]


@both
def test_tokens_equal_transformers_at_the_native_grid(folders, name):
    encoder = load_encoder(name, weights=folders[name])
    assert (encoder.dim, encoder.patch_size, encoder.name) == (32, 14, name)
    images = noise_images(NATIVE * 14)
    model = type(encoder.net).from_pretrained(folders[name]).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(normalised(images)).float())
    features = encoder(images, NATIVE)
    assert features.patches.shape == (2, NATIVE**2, 32)
    torch.testing.assert_close(features.patches, expected.last_hidden_state[:, PREFIX[name] :], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.pooled, expected.pooler_output, atol=1e-4, rtol=1e-4)


@both
def test_another_grid_resamples_image_and_positions_as_the_reference_does(folders, name):
    """The image is normalised, then resized bicubically without antialias; positions with antialias, by size, once."""
    encoder, grid = load_encoder(name, weights=folders[name]), 3
    images = noise_images(64)
    model = type(encoder.net).from_pretrained(folders[name]).eval()
    table = model.embeddings.position_embeddings.data
    image = table[0, 1:].T.reshape(32, NATIVE, NATIVE).numpy()
    patches = bicubic.resize(image, grid, antialias=True).reshape(32, grid * grid).T
    table = torch.cat([table[0, :1], torch.from_numpy(patches).float()])[None]
    model.embeddings.position_embeddings = torch.nn.Parameter(table)
    pixels = bicubic.resize(normalised(images), grid * 14, antialias=False)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).float()).last_hidden_state
    torch.testing.assert_close(encoder(images, grid).patches, expected[:, PREFIX[name] :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("native", "grid"), [(37, 16), (37, 32), (5, 9)])
def test_resampled_positions_equal_the_loops(native, grid):
    table = torch.randn(1, 1 + native**2, 4, generator=torch.Generator().manual_seed(0))
    image = table[0, 1:].T.reshape(4, native, native).numpy()
    expected = torch.from_numpy(bicubic.resize(image, grid, antialias=True).reshape(4, -1).T).float()
    resampled = resample_positions(table, grid)
    torch.testing.assert_close(resampled[0, 1:], expected, atol=1e-5, rtol=0)
    assert torch.equal(resampled[:, :1], table[:, :1])


def test_positions_are_unchanged_at_the_native_grid():
    table = torch.randn(1, 26, 4)
    assert torch.equal(resample_positions(table, 5), table)


@both
def test_going_to_another_grid_and_back_loses_nothing(folders, name):
    encoder, images = load_encoder(name, weights=folders[name]), noise_images(56)
    first = encoder(images, 4).patches
    encoder(images, 2)
    assert torch.equal(encoder(images, 4).patches, first)


@both
@pytest.mark.parametrize(("row", "column"), [(0, 3), (3, 1)])
def test_tokens_are_row_major(folders, name, row, column):
    encoder, grid = load_encoder(name, weights=folders[name]), 4
    grey = torch.full((1, 3, grid * 14, grid * 14), 128, dtype=torch.uint8)
    marked = grey.clone()
    marked[:, :, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] = 255
    moved = (encoder(marked, grid).patches - encoder(grey, grid).patches).norm(dim=-1)[0]
    assert int(moved.argmax()) == row * grid + column


@both
def test_the_encoder_is_frozen(folders, name):
    encoder = load_encoder(name, weights=folders[name]).train()
    features = encoder(noise_images(42), 3)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not features.patches.requires_grad


def test_the_references_spelling_loads_the_same_encoder(folders):
    encoder = load_encoder("dinov2-vit-b", weights=str(folders["dinov2-b"]))
    assert encoder.identity["name"] == "dinov2-b"


def test_a_missing_network_connection_gives_a_one_line_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_encoder("dinov2-reg-l")
    for words in ("dinov2-reg-l", "facebook/dinov2-with-registers-large", "could not be downloaded", "weights=FOLDER"):
        assert words in str(error.value)
    assert len(str(error.value).split()) < 60, str(error.value)


def test_a_cached_checkpoint_needs_no_network(folders, monkeypatch, tmp_path):
    """The hub's cache has folders models--OWNER--NAME, where refs/main names the snapshot."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--facebook--dinov2-base"
    shutil.copytree(folders["dinov2-b"], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert load_encoder("dinov2-b").dim == 32


def test_another_family_is_refused(folders):
    with pytest.raises(UserError, match="'dinov2_with_registers', but the encoder dinov2-b is of type 'dinov2'"):
        load_encoder("dinov2-b", weights=folders["dinov2-reg-b"])
    with pytest.raises(UserError, match="'dinov2', but the encoder dinov2-reg-b"):
        load_encoder("dinov2-reg-b", weights=folders["dinov2-b"])


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_encoder("dinov2-b", weights=tmp_path)


def test_damaged_weights_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["dinov2-b"], tmp_path / "copy")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as"):
        load_encoder("dinov2-b", weights=folder)
    tensors = load_file(folders["dinov2-b"] / "model.safetensors")
    tensors.pop("layernorm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of the encoder dinov2-b, for example layernorm\.weight"):
        load_encoder("dinov2-b", weights=folder)
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(UserError, match="does not fit"):
        load_encoder("dinov2-b", weights=folder)


@both
@pytest.mark.parametrize(
    "lie", [{"hidden_size": 2**17}, {"num_hidden_layers": 900}, {"mlp_ratio": 2**30}, {"num_labels": 2**31}]
)
def test_a_configuration_larger_than_its_weights_is_refused(folders, name, lie, tmp_path):
    shutil.copytree(folders[name], tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **lie}))
    with pytest.raises(UserError, match=r"config\.json (describes a larger network|has num_)"):
        load_encoder(name, weights=tmp_path / "copy")
