"""DINO, MoCo v3, MAE and I-JEPA from tiny random files in their original formats, against float64 loops."""

import argparse
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import ViTConfig, ViTModel

from repa.base.errors import UserError
from repa.encoders import load_encoder
from repa.encoders.checkpoints import convert_original
from repa.encoders.families import FAMILIES
from tests.oracles import bicubic, vit

NATIVE, HEADS = 4, 2
WIDTH = {"dino-b": 128, "mocov3-b": 128, "mae-l": 128, "ijepa-h": 160}
PATCH = {"dino-b": 16, "mocov3-b": 16, "mae-l": 16, "ijepa-h": 14}
FILES = {
    "dino-b": "dinov1_vitb.pth",
    "mocov3-b": "mocov3_vitb.pth",
    "mae-l": "mae_vitl.pth",
    "ijepa-h": "ijepa_vith.pth",
}
every = pytest.mark.parametrize("name", list(WIDTH))


def random_state(name: str, seed: int = 0, depth: int = 2) -> dict[str, torch.Tensor]:
    """A state dict with timm's names, in which no weight is 0 or 1."""
    width, patch, class_rows = WIDTH[name], PATCH[name], int(name != "ijepa-h")
    shapes = {"cls_token": (1, 1, width)} if class_rows else {}
    shapes |= {"pos_embed": (1, class_rows + NATIVE**2, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes |= {"patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    for block in range(depth):
        linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linear |= {"mlp.fc1": (2 * width, width), "mlp.fc2": (width, 2 * width)}
        for part, shape in (linear | {"norm1": (width,), "norm2": (width,)}).items():
            shapes[f"blocks.{block}.{part}.weight"] = shape
            shapes[f"blocks.{block}.{part}.bias"] = shape[:1]
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * (np.prod(shape[1:]) ** -0.5 if len(shape) > 1 and "_" not in key[:4] else 0.5)
        for key, shape in shapes.items()
    }  # fmt: skip


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def checkpoint(name: str, state: dict) -> dict:
    """The content of each project's file, including networks other than the encoder."""
    other, arguments = random_state(name, seed=1), argparse.Namespace(lr=0.1)
    if name == "mocov3-b":
        head = {"head.0.weight": torch.ones(2, 2), "head.1.running_mean": torch.ones(2)}
        networks = prefixed("module.base_encoder.", state | head) | prefixed("module.momentum_encoder.", other | head)
        networks["module.predictor.0.weight"] = torch.ones(2, 2)
        return {"epoch": 300, "arch": "vit_base", "state_dict": networks, "optimizer": {"state": {}}, "args": arguments}
    if name == "mae-l":
        decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 17, 8)}
        return {
            "model": state | decoder | prefixed("decoder_blocks.0.", {"norm1.weight": torch.ones(8)}),
            "args": arguments,
        }
    if name == "ijepa-h":
        networks = {"encoder": prefixed("module.", state), "target_encoder": prefixed("module.", other)}
        return networks | {"predictor": {"module.x": torch.ones(2)}, "opt": {}, "scaler": None, "epoch": 300, "lr": 0.1}
    return state


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict:
    folder, made = tmp_path_factory.mktemp("originals"), {}
    for name, file in FILES.items():
        state = random_state(name)
        torch.save(checkpoint(name, state), folder / file)
        made[name] = (folder / file, state)
    return made


def noise_images(side: int, n: int = 2) -> torch.Tensor:
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(images: torch.Tensor) -> np.ndarray:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return (images.numpy() / 255 - mean[:, None, None]) / std[:, None, None]


@every
@pytest.mark.parametrize(("grid", "side"), [(NATIVE, None), (5, None), (3, 50)])
def test_tokens_equal_the_loops(given, name, grid, side):
    """At the native grid, at a larger grid with the image at its size, and with both resized."""
    path, state = given[name]
    encoder, side = load_encoder(name, weights=path), side or grid * PATCH[name]
    assert (encoder.dim, encoder.patch_size, encoder.name) == (WIDTH[name], PATCH[name], name)
    images = noise_images(side)
    pixels = normalised(images)
    if side != grid * PATCH[name]:
        pixels = bicubic.resize(pixels, grid * PATCH[name], antialias=False)
    expected = torch.stack([vit.tokens(state, torch.as_tensor(p), HEADS, name != "mae-l") for p in pixels]).float()
    features = encoder(images, grid)
    patches = expected if name == "ijepa-h" else expected[:, 1:]
    pooled = expected.mean(1) if name == "ijepa-h" else expected[:, 0]
    torch.testing.assert_close(features.patches, patches, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(features.pooled, pooled, atol=2e-4, rtol=1e-4)


@every
def test_a_file_in_the_cache_folder_is_found_by_name(given, name, monkeypatch, tmp_path):
    path, _ = given[name]
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders" / FILES[name]).write_bytes(path.read_bytes())
    monkeypatch.setenv("REPA_CACHE", str(tmp_path))
    encoder = load_encoder(name)
    assert torch.equal(
        encoder(noise_images(64), 4).patches, load_encoder(name, weights=path)(noise_images(64), 4).patches
    )
    assert encoder.weights_file == tmp_path / "encoders" / FILES[name]


@every
def test_the_error_about_missing_weights_names_file_and_folder(name, monkeypatch, tmp_path):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_encoder(name)
    for words in (name, "weights=FILE", str(tmp_path / "encoders" / FILES[name])):
        assert words in str(error.value)


def test_large_moco_has_a_separate_file(monkeypatch, tmp_path):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"not on the hub.*mocov3_vitl\.pth"):
        load_encoder("mocov3-vit-l")


@pytest.mark.parametrize(("name", "other"), [(a, b) for a in WIDTH for b in WIDTH if a != b])
def test_another_projects_file_is_refused(given, name, other):
    with pytest.raises(UserError, match=f"checkpoint for the encoder {name}: .*Give the checkpoint of"):
        load_encoder(name, weights=given[other][0])


@every
def test_missing_and_unknown_tensors_are_named(name, tmp_path):
    state = random_state(name)
    del state["blocks.1.mlp.fc2.bias"]
    torch.save(checkpoint(name, state), tmp_path / "less.pth")
    with pytest.raises(UserError, match=f"lacks weights of the encoder {name}"):
        load_encoder(name, weights=tmp_path / "less.pth")
    torch.save(checkpoint(name, random_state(name) | {"blocks.0.ls1.gamma": torch.ones(2)}), tmp_path / "more.pth")
    with pytest.raises(UserError, match=f"belongs to another network: the encoder {name} has no .*gamma"):
        load_encoder(name, weights=tmp_path / "more.pth")


@every
def test_damaged_files_are_refused(given, name, tmp_path):
    whole = given[name][0].read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        (tmp_path / "damaged.pth").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as"):
            load_encoder(name, weights=tmp_path / "damaged.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="checkpoint"):
        load_encoder(name, weights=tmp_path / "list.pth")


class Executed:
    def __reduce__(self):
        return (exec, ("raise AssertionError('code of the file was run')",))


def test_code_in_a_file_is_not_run(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Executed(), protocol=2))
    with pytest.raises(UserError, match="class exec, which is not read"):
        load_encoder("mae-l", weights=tmp_path / "evil.pth")
    torch.save({"model": Executed()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="class exec, which is not read"):
        load_encoder("mae-l", weights=tmp_path / "evil.pth")


def test_tensor_names_are_those_of_a_saved_vision_transformer(tmp_path):
    state = random_state("dino-b")
    settings, converted = convert_original(state, FAMILIES["dino"].original)
    assert settings == {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
        "patch_size": 16, "image_size": 64,
    }  # fmt: skip
    ViTModel(ViTConfig(**settings), add_pooling_layer=False).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert set(converted) == set(saved.keys())
        assert all(tuple(converted[key].shape) == tuple(saved.get_slice(key).get_shape()) for key in converted)
    back = torch.cat(
        [converted[f"encoder.layer.1.attention.attention.{part}.weight"] for part in ("query", "key", "value")]
    )
    assert torch.equal(back, state["blocks.1.attn.qkv.weight"])
    assert torch.equal(converted["encoder.layer.0.layernorm_after.bias"], state["blocks.0.norm2.bias"])


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("blocks.13.norm13.weight", "encoder.layer.13.layernorm_before.weight"),
        ("blocks.13.mlp.fc13.bias", "encoder.layer.13.intermediate.dense.bias"),
        ("blocks.14.norm14.bias", "encoder.layer.14.layernorm_after.bias"),
        ("blocks.14.mlp.fc14.weight", "encoder.layer.14.output.dense.weight"),
        ("blocks.13.norm1.weight", "encoder.layer.13.layernorm_before.weight"),
    ],
)
def test_misspelt_tensor_names_of_moco_are_read(misspelt, meant):
    marked = torch.full((3, 3), 7.0)
    _, converted = convert_original(random_state("mocov3-b") | {misspelt: marked}, FAMILIES["mocov3"].original)
    assert converted[meant] is marked
