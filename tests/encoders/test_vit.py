"""Every family from a tiny random checkpoint in the hub's format, including text towers and decoders."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from repa.base.errors import UserError
from repa.encoders import ENCODERS, load_encoder
from tests.oracles import bicubic, vit

NATIVE, WIDTH = 4, 32
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
DECODER = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
           "decoder_intermediate_size": 8}  # fmt: skip
PATCH = {"dino-b": 16, "mocov3-l": 16, "mae-l": 16, "ijepa-h": 14, "clip-l": 14, "siglip-b": 16, "dinov3-b": 16}
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOURS = {"clip-l": CLIP, "siglip-b": ((0.5,) * 3, (0.5,) * 3)}
PREFIX = {"ijepa-h": 0, "siglip-b": 0, "dinov3-b": 5}
every = pytest.mark.parametrize("name", list(PATCH))


def make(name: str) -> torch.nn.Module:
    """A model as in the hub's repository; layer norms of DINO, MAE and I-JEPA have the hub's eps."""
    size = SMALL | {"patch_size": PATCH[name], "image_size": NATIVE * PATCH[name]}
    t = transformers
    if name == "clip-l":
        return t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=size, projection_dim=8))
    if name == "siglip-b":
        return t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=size))
    if name == "mae-l":
        return t.ViTMAEForPreTraining(t.ViTMAEConfig(**size, **DECODER, mask_ratio=0.75))
    if name == "ijepa-h":
        return t.IJepaModel(t.IJepaConfig(**size))
    if name == "dinov3-b":
        return t.DINOv3ViTModel(t.DINOv3ViTConfig(**size, num_register_tokens=4))
    return t.ViTModel(t.ViTConfig(**size), add_pooling_layer=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """name -> (folder, model); weights initialised to 0 or 1 are changed, so that leaving one out shows."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    made = {}
    for name in PATCH:
        model = make(name).eval()
        for key, parameter in model.named_parameters():
            parameter.data += (0.5 if "position" in key else 0.1) * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("hub") / name
        model.save_pretrained(folder)
        made[name] = (folder, model)
    return made


def noise_images(side: int, n: int = 2) -> torch.Tensor:
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def prepared(name: str, images: torch.Tensor, side: int) -> torch.Tensor:
    """The encoder's input, resized by bicubic loops without antialias; CLIP and SigLIP resize before normalising."""
    mean, std = (np.array(values)[:, None, None] for values in COLOURS.get(name, IMAGENET))
    pixels = images.numpy() / 255
    if name in COLOURS:
        pixels = (bicubic.resize(pixels, side, antialias=False) - mean) / std
    elif side != pixels.shape[-1]:
        pixels = bicubic.resize((pixels - mean) / std, side, antialias=False)
    else:
        pixels = (pixels - mean) / std
    return torch.from_numpy(pixels).float()


def expected_tokens(name: str, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """transformers' output for the whole sequence with class and register tokens; MAE's shuffled tokens are sorted."""
    with torch.no_grad():
        if name == "clip-l":
            return model.vision_model(pixels).last_hidden_state
        if name == "siglip-b":
            return model.vision_model(pixels).last_hidden_state
        if name != "mae-l":
            return model(pixels).last_hidden_state
        model.config.mask_ratio = 0.0
        shuffled = model.vit(pixels)
        order = shuffled.ids_restore[..., None].expand(-1, -1, WIDTH)
        tokens = shuffled.last_hidden_state
        assert not torch.equal(shuffled.ids_restore[0], torch.arange(NATIVE**2)), "the trap is not set"
        return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, order)], dim=1)


def through_last_norm(name: str, model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model.vit.layernorm(tokens) if name == "mae-l" else tokens


@every
def test_tokens_equal_transformers_at_the_native_grid(made, name):
    folder, model = made[name]
    encoder = load_encoder(name, weights=folder)
    assert (encoder.dim, encoder.patch_size, encoder.name) == (WIDTH, PATCH[name], name)
    side = NATIVE * PATCH[name]
    images, prefix = noise_images(side), PREFIX.get(name, 1)
    tokens = expected_tokens(name, model, prepared(name, images, side))
    features = encoder(images, NATIVE)
    assert features.patches.shape == (2, NATIVE**2, WIDTH)
    with torch.no_grad():
        patches, pooled = (through_last_norm(name, model, part) for part in features[:2])
    torch.testing.assert_close(patches, tokens[:, prefix:], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(pooled, tokens[:, 0] if prefix else tokens.mean(1), atol=1e-3, rtol=1e-3)


def test_mae_leaves_the_last_norm_out(made):
    """The output of transformers is normalised, but REPA's targets are not."""
    folder, model = made["mae-l"]
    patches = load_encoder("mae-l", weights=folder)(noise_images(64), NATIVE).patches
    assert (patches.std(-1, unbiased=False) - 1).abs().max() > 0.1
    with torch.no_grad():
        assert (model.vit.layernorm(patches) - patches).abs().max() > 0.5


def test_clip_has_neither_last_norm_nor_projection(made):
    folder, model = made["clip-l"]
    features = load_encoder("clip-l", weights=folder)(noise_images(56), NATIVE)
    with torch.no_grad():
        output = model.vision_model(prepared("clip-l", noise_images(56), 56))
        torch.testing.assert_close(model.vision_model.post_layernorm(features.pooled), output.pooler_output)
    assert not torch.allclose(features.pooled, output.pooler_output, atol=0.1)


@every
def test_another_grid_resamples_image_and_positions_as_the_reference_does(made, name):
    """The image is resized bicubically without antialias, positions with it, once. DINOv3 rotates by the grid."""
    folder, model = made[name]
    grid, images = 3, noise_images(61)
    side = grid * PATCH[name]
    features = load_encoder(name, weights=folder)(images, grid)
    other = make_at(name, model, grid)
    tokens = expected_tokens(name, other, prepared(name, images, side))
    with torch.no_grad():
        patches = through_last_norm(name, model, features.patches)
    torch.testing.assert_close(patches, tokens[:, PREFIX.get(name, 1) :], atol=1e-3, rtol=1e-3)


def make_at(name: str, model: torch.nn.Module, grid: int) -> torch.nn.Module:
    """A model with native grid `grid`: the weights of `model`, with positions resampled by the loops."""
    config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
    for part in (config, getattr(config, "vision_config", config)):
        part.image_size = grid * PATCH[name]
    build = {"add_pooling_layer": False} if isinstance(model, transformers.ViTModel) else {}
    other, state = type(model)(config, **build).eval(), model.state_dict()
    rows = min(PREFIX.get(name, 1), 1)
    for key in [key for key in state if "vision" in key or not hasattr(config, "vision_config")]:
        if "position_embedding" in key and "decoder" not in key:
            table = state[key].reshape(1, -1, WIDTH)
            state[key] = vit.positions(table, grid, rows).float().reshape(*state[key].shape[:-2], -1, WIDTH)
        elif "decoder_pos_embed" in key:
            state[key] = other.state_dict()[key]
    other.load_state_dict(state)
    return other


@every
def test_resolutions_256_and_512_give_the_expected_grids(made, name):
    """16 x 16 and 32 x 32 tokens; patch 14 resizes to 224 and 448 pixels, patch 16 keeps the image size."""
    encoder = load_encoder(name, weights=made[name][0])
    seen = []
    encoder.net.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].shape[-1]), with_kwargs=True
    )
    first = encoder(noise_images(256, 1), encoder.grid_for(256)).patches
    large = encoder(noise_images(512, 1), encoder.grid_for(512)).patches
    assert torch.equal(encoder(noise_images(256, 1), 16).patches, first)
    assert (first.shape, large.shape) == ((1, 256, WIDTH), (1, 1024, WIDTH))
    assert seen == [16 * PATCH[name], 32 * PATCH[name], 16 * PATCH[name]]


@every
@pytest.mark.parametrize(("row", "column"), [(0, 3), (3, 1)])
def test_tokens_are_row_major(made, name, row, column):
    encoder, grid, patch = load_encoder(name, weights=made[name][0]), 4, PATCH[name]
    grey = torch.full((1, 3, grid * patch, grid * patch), 128, dtype=torch.uint8)
    marked = grey.clone()
    marked[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 255
    moved = (encoder(marked, grid).patches - encoder(grey, grid).patches).norm(dim=-1)[0]
    assert int(moved.argmax()) == row * grid + column


@every
def test_the_encoder_is_frozen_and_deterministic(made, name):
    encoder = load_encoder(name, weights=made[name][0]).train()
    images = noise_images(48)
    features = encoder(images, 3)
    assert torch.equal(encoder(images, 3).patches, features.patches)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not features.patches.requires_grad


@pytest.mark.parametrize("name", ["dino-b", "clip-l"])
def test_requesting_attention_does_not_change_later_features(made, name):
    """Attention logits need another kernel with different rounding."""
    encoder, images = load_encoder(name, weights=made[name][0]), noise_images(64)
    kernel, before = encoder.net.config._attn_implementation, encoder(images, 4)
    assert set(encoder(images, 4, (1, 2)).attention) == {1, 2}
    assert encoder.net.config._attn_implementation == kernel != "eager"
    assert torch.equal(encoder(images, 4).patches, before.patches)


@every
def test_half_precision_works_at_every_grid(made, name):
    encoder, images = load_encoder(name, weights=made[name][0]), noise_images(48)
    exact = [encoder(images, grid).patches for grid in (3, 5)]
    half = [encoder.to(torch.bfloat16)(images, grid).patches for grid in (3, 5)]
    for a, b in zip(exact, half, strict=True):
        assert b.dtype == torch.bfloat16
        assert F.cosine_similarity(a, b.float(), dim=-1).mean() > 0.99


@pytest.mark.parametrize("name", ["dino-b", "mocov3-l", "mae-l", "ijepa-h"])
def test_layer_norms_use_the_eps_of_training(made, name):
    """The hub's configurations have 1e-12, the projects' code has 1e-6."""
    encoder = load_encoder(name, weights=made[name][0])
    assert json.loads((made[name][0] / "config.json").read_text())["layer_norm_eps"] == 1e-12
    assert {module.eps for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("name", ["clip-l", "siglip-b"])
def test_a_folder_with_only_the_vision_tower_loads(made, name, tmp_path):
    folder, model = made[name]
    model.vision_model.save_pretrained(tmp_path)
    images = noise_images(64)
    expected = load_encoder(name, weights=folder)(images, NATIVE).patches
    assert torch.equal(load_encoder(name, weights=tmp_path)(images, NATIVE).patches, expected)


@every
def test_weights_in_pytorch_format_load(made, name, tmp_path):
    folder, _ = made[name]
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    images, encoder = noise_images(64), load_encoder(name, weights=tmp_path)
    assert torch.equal(encoder(images, 3).patches, load_encoder(name, weights=folder)(images, 3).patches)
    assert encoder.weights_file == tmp_path / "pytorch_model.bin"
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as"):
        load_encoder(name, weights=tmp_path)


@pytest.mark.parametrize(("name", "other"), [("dino-b", "mae-l"), ("clip-l", "siglip-b"), ("ijepa-h", "dinov3-b")])
def test_another_family_is_refused(made, name, other):
    with pytest.raises(UserError, match=f"holds a model of type .*, but the encoder {name} is of type"):
        load_encoder(name, weights=made[other][0])


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "siglip.pt").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"holds no config\.json, which the encoder siglip-b needs: give weights=FOLDER"
    ):
        load_encoder("siglip-b", weights=tmp_path / "siglip.pt")


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("dino-b", "facebook/dino-vitb16"),
        ("mae-l", "facebook/vit-mae-large"),
        ("ijepa-h", "facebook/ijepa_vith14_1k"),
        ("clip-l", "openai/clip-vit-large-patch14"),
        ("siglip-b", "google/siglip-base-patch16-256"),
        ("siglip-l", "google/siglip-large-patch16-256"),
        ("dinov3-s", "facebook/dinov3-vits16-pretrain-lvd1689m"),
        ("dinov3-b", "facebook/dinov3-vitb16-pretrain-lvd1689m"),
        ("dinov3-l", "facebook/dinov3-vitl16-pretrain-lvd1689m"),
    ],
)
def test_a_missing_network_connection_gives_a_one_line_error(name, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_encoder(name)
    for words in (name, hub, "could not be downloaded", "weights=F", str(tmp_path / "encoders")):
        assert words in str(error.value)


def test_a_folder_in_the_cache_is_found_by_the_encoders_name(made, monkeypatch, tmp_path):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path))
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders" / "clip-l").symlink_to(made["clip-l"][0])
    assert load_encoder("clip-vit-L").dim == WIDTH


def test_a_gated_repository_gives_a_one_line_error(monkeypatch, tmp_path):
    from huggingface_hub.errors import GatedRepoError

    def hub(repository, **_):
        raise GatedRepoError(f"gated: {repository}", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setenv("REPA_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    with pytest.raises(UserError, match=r"dinov3-vitb16-pretrain-lvd1689m.*accept its licence"):
        load_encoder("dinov3-b")


def test_a_repository_without_safetensors_is_downloaded(made, monkeypatch, tmp_path):
    """facebook/vit-mae-large has no model.safetensors."""
    folder, _ = made["mae-l"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())

    def hub(repository, allow_patterns, **_):
        assert repository == "facebook/vit-mae-large"
        if "pytorch_model.bin" in allow_patterns:
            torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert load_encoder("mae-l").weights_file == tmp_path / "pytorch_model.bin"


def test_every_name_of_the_table_is_known():
    expected = {f"{stem}-{size}" for stem in ("dinov2", "dinov2-reg") for size in "sblg"}
    expected |= {
        "tiny",
        "tiny-classifier",
        "lite0",
        "dino-b",
        "mocov3-s",
        "mocov3-b",
        "mocov3-l",
        "mae-l",
        "ijepa-h",
        "clip-l",
    }
    assert expected | {"siglip-b", "siglip-l", "dinov3-s", "dinov3-b", "dinov3-l"} == set(ENCODERS.names())


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("dinov1-vit-b", "dino-b"),
        ("mocov3-vit-b", "mocov3-b"),
        ("mocov3-vit-l", "mocov3-l"),
        ("mae-vit-l", "mae-l"),
        ("jepa-vit-h", "ijepa-h"),
        ("clip-vit-L", "clip-l"),
        ("siglip-vit-b", "siglip-b"),
        ("dinov3-vit-l", "dinov3-l"),
        ("dinov2reg-b", "dinov2-reg-b"),
        ("mylab.clip-vit-L", "mylab.clip-vit-L"),
        ("tiny-classifier", "tiny-classifier"),
    ],
)
def test_spellings_of_the_reference_code_are_accepted(spelling, name):
    from repa.encoders import canonical

    assert canonical(spelling) == name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_hidden_layers": 1}, r"has layers\.1\..*, but its config\.json describes a smaller network"),
        ({"qkv_bias": False}, r"has layers\.0\.attention\..*bias, but its config\.json describes a smaller network"),
        ({"num_attention_heads": 0}, r"does not fit its config\.json"),
        ({"patch_size": 0}, r"does not fit its config\.json"),
    ],
)
def test_a_configuration_that_leaves_out_parts_is_refused(changed, message, made, tmp_path):
    """transformers only logs the tensors that it did not read: the features would be of another network."""
    folder = shutil.copytree(made["dino-b"][0], tmp_path / "copy")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changed}))
    with pytest.raises(UserError, match=message):
        load_encoder("dino-b", weights=folder)


def test_a_configuration_that_asks_for_tuples_changes_nothing(made, tmp_path):
    folder = shutil.copytree(made["dino-b"][0], tmp_path / "copy")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "return_dict": False}))
    pictures = noise_images(64)
    found, wanted = (load_encoder("dino-b", weights=w)(pictures, 4)[0] for w in (folder, made["dino-b"][0]))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("kind", [torch.int8, torch.int64])
def test_weights_of_integers_are_refused(kind, pickled, made, tmp_path):
    folder = shutil.copytree(made["dino-b"][0], tmp_path / "copy")
    state = {name: (50 * x).to(kind) for name, x in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"(weight|bias)' has the type .*Give weights of 16 or 32 bits"):
        load_encoder("dino-b", weights=folder)


@every
def test_another_setting_that_changes_features_changes_the_identity(made, name, tmp_path):
    folder, _ = made[name]
    usual, images = load_encoder(name, weights=folder), noise_images(NATIVE * PATCH[name])
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy/config.json"
    config = json.loads(path.read_text())
    config.get("vision_config", config)["hidden_act"] = "relu"
    path.write_text(json.dumps(config))
    other = load_encoder(name, weights=tmp_path / "copy")
    assert not torch.equal(usual(images, NATIVE).patches, other(images, NATIVE).patches)
    assert other.identity["weights_sha256"] == usual.identity["weights_sha256"]
    assert other.identity["preprocessing"] == f"{usual.identity['preprocessing']}; hidden_act relu"
