"""Tiny random files in the formats of torch.hub's DINOv2, OpenAI's CLIP (TorchScript) and MoCo v3, against loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repa.base.errors import UserError
from repa.encoders import load_encoder
from repa.encoders.checkpoints import network_settings
from repa.encoders.families import FAMILIES
from tests.oracles import bicubic, vit

NATIVE, PATCH, WIDTH, HEADS = 5, 14, 128, 2
STATISTICS = {
    "dinov2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
}
names = pytest.mark.parametrize("name", ["dinov2-b", "dinov2-g", "dinov2-reg-s", "dinov2-reg-g"])


def filled(shapes: dict[str, tuple], seed: int = 0) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=stream) * (np.prod(shape[1:]) ** -0.5 if len(shape) in (2, 4) else 0.5)
        for key, shape in shapes.items()
    }


def dinov2(name: str, width: int = WIDTH) -> dict[str, Tensor]:
    """A state dict with names and shapes of facebookresearch/dinov2; the giant has gated MLPs."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + NATIVE**2, width), "mask_token": (1, width)}
    if "-reg-" in name:
        shapes["register_tokens"] = (1, 4, width)
    shapes |= {"patch_embed.proj.weight": (width, 3, PATCH, PATCH), "patch_embed.proj.bias": (width,)}
    gated = (int(4 * width * 2 / 3) + 7) // 8 * 8
    mlp = {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    if name.endswith("-g"):
        mlp = {"mlp.w12": (2 * gated, width), "mlp.w3": (width, gated)}
    for block in range(2):
        linear = {
            "norm1": (width,),
            "norm2": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            **mlp,
        }
        for part, shape in linear.items():
            shapes |= {f"blocks.{block}.{part}.weight": shape, f"blocks.{block}.{part}.bias": shape[:1]}
        shapes |= {f"blocks.{block}.ls{i}.gamma": (width,) for i in (1, 2)}
    return filled(shapes | {"norm.weight": (width,), "norm.bias": (width,)})


def images(side: int) -> Tensor:
    return torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(pixels: np.ndarray, family: str) -> np.ndarray:
    mean, std = (np.array(values)[:, None, None] for values in STATISTICS[family])
    return (pixels - mean) / std


@names
@pytest.mark.parametrize(("grid", "side"), [(NATIVE, NATIVE * PATCH), (3, 50)])
def test_dinov2_files_of_torch_hub_give_the_loops_tokens(name, grid, side, tmp_path):
    state = dinov2(name)
    torch.save(state, tmp_path / "dinov2.pth")
    encoder = load_encoder(name, weights=tmp_path / "dinov2.pth")
    assert (encoder.dim, encoder.patch_size) == (WIDTH, PATCH)
    pixels = normalised(images(side).numpy() / 255, "dinov2")
    if side != grid * PATCH:
        pixels = bicubic.resize(pixels, grid * PATCH, antialias=False)
    wanted = torch.stack([vit.tokens(state, torch.as_tensor(p), HEADS, True) for p in pixels]).float()
    features = encoder(images(side), grid)
    torch.testing.assert_close(features.patches, wanted[:, 5 if "-reg-" in name else 1 :], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(features.pooled, wanted[:, 0], atol=2e-4, rtol=1e-4)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = (
            nn.Parameter(torch.empty(3 * WIDTH, WIDTH)),
            nn.Parameter(torch.empty(3 * WIDTH)),
        )
        self.out_proj = nn.Linear(WIDTH, WIDTH)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 4 * WIDTH))
        self.mlp.add_module("c_proj", nn.Linear(4 * WIDTH, WIDTH))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.Sequential(Block(), Block())


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding, self.proj = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH, 8))
        self.positional_embedding = nn.Parameter(torch.empty(1 + NATIVE**2, WIDTH))
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.ln_pre, self.ln_post, self.transformer = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Transformer()


class Clip(nn.Module):
    """Modules, names and half precision of OpenAI's archive; forward uses all tensors, so that tracing keeps them."""

    def __init__(self):
        super().__init__()
        self.visual, self.logit_scale = Tower(), nn.Parameter(torch.tensor(4.6))
        self.token_embedding = nn.Embedding(9, 8)
        for parameter, value in zip(
            self.parameters(), filled({k: tuple(p.shape) for k, p in self.named_parameters()}).values(), strict=True
        ):
            parameter.data = value
        self.half()

    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.parameters():
            x = x + parameter.sum()
        return x


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename OpenAI's tensors to the names of the literal transformer."""
    w = {key.removeprefix("visual."): value.float() for key, value in state.items()}
    named = {
        "cls_token": w["class_embedding"][None, None], "pos_embed": w["positional_embedding"][None],
        "patch_embed.proj.weight": w["conv1.weight"],
        "norm_pre.weight": w["ln_pre.weight"], "norm_pre.bias": w["ln_pre.bias"],
    }  # fmt: skip
    for block in range(2):
        old, new = f"transformer.resblocks.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            named[f"{new}norm1.{kind}"], named[f"{new}norm2.{kind}"] = w[f"{old}ln_1.{kind}"], w[f"{old}ln_2.{kind}"]
            named[f"{new}attn.qkv.{kind}"], named[f"{new}attn.proj.{kind}"] = (
                w[f"{old}attn.in_proj_{kind}"],
                w[f"{old}attn.out_proj.{kind}"],
            )
            named[f"{new}mlp.fc1.{kind}"], named[f"{new}mlp.fc2.{kind}"] = (
                w[f"{old}mlp.c_fc.{kind}"],
                w[f"{old}mlp.c_proj.{kind}"],
            )
    return named


@pytest.mark.parametrize("form", ["torchscript", "state dict"])
@pytest.mark.parametrize(("grid", "side"), [(NATIVE, NATIVE * PATCH), (3, 50)])
def test_clip_files_of_openai_give_the_loops_tokens(form, grid, side, tmp_path, monkeypatch):
    net, path = Clip(), tmp_path / "ViT-L-14.pt"
    if form == "torchscript":
        torch.jit.save(torch.jit.trace(net, torch.ones(1).half(), check_trace=False), path)
    else:
        torch.save(net.state_dict(), path)
    monkeypatch.setattr(torch.jit, "load", None)  # loading would compile the archive's code
    encoder = load_encoder("clip-l", weights=path)
    assert (encoder.dim, encoder.patch_size) == (WIDTH, PATCH)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    pixels = images(side).numpy() / 255
    if side != grid * PATCH:
        pixels = bicubic.resize(pixels, grid * PATCH, antialias=False)
    state = timm_names(net.state_dict())
    pixels = normalised(pixels, "clip")
    wanted = torch.stack(
        [vit.tokens(state, torch.as_tensor(p), HEADS, False, vit.quick_gelu, 1e-5) for p in pixels]
    ).float()
    torch.testing.assert_close(encoder(images(side), grid).patches, wanted[:, 1:], atol=5e-4, rtol=1e-3)


def test_the_small_moco_has_heads_of_width_32():
    shapes = {"patch_embed.proj.weight": (384, 3, 16, 16), "pos_embed": (1, 197, 384), "blocks.11.norm1.weight": (384,)}
    state = {key: torch.empty(shape) for key, shape in shapes.items()} | {
        "blocks.0.mlp.fc1.weight": torch.empty(1536, 384)
    }
    for size, heads in (("s", 12), ("b", 6)):
        assert network_settings(state, FAMILIES["mocov3"].original_of(size))["num_attention_heads"] == heads


def test_a_file_of_another_size_is_refused(tmp_path):
    torch.save(dinov2("dinov2-s", width=384), tmp_path / "s.pth")
    assert load_encoder("dinov2-s", weights=tmp_path / "s.pth").dim == 384
    with pytest.raises(UserError, match="has the width 384, but the encoder dinov2-b has 768"):
        load_encoder("dinov2-b", weights=tmp_path / "s.pth")


@pytest.mark.parametrize(("name", "other"), [("dinov2-b", "dinov2-reg-b"), ("dinov2-reg-b", "dinov2-b")])
def test_a_wrong_number_of_registers_is_refused(name, other, tmp_path):
    torch.save(dinov2(other), tmp_path / "other.pth")
    with pytest.raises(UserError, match="register_tokens"):
        load_encoder(name, weights=tmp_path / "other.pth")


def test_files_are_found_in_the_caches_of_their_own_code(tmp_path, monkeypatch):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    kept = SimpleNamespace(
        dinov2=tmp_path / "torch" / "hub" / "checkpoints" / "dinov2_vitb14_reg4_pretrain.pth",
        clip=tmp_path / ".cache" / "clip" / "ViT-L-14.pt",
    )
    kept.dinov2.parent.mkdir(parents=True)
    kept.clip.parent.mkdir(parents=True)
    torch.save(dinov2("dinov2-reg-b"), kept.dinov2)
    torch.save(Clip().state_dict(), kept.clip)
    assert load_encoder("dinov2-reg-b").weights_file == kept.dinov2
    assert load_encoder("clip-l").weights_file == kept.clip
