"""Options of blocks: RMSNorm, SwiGLU, normalised queries and keys, biases, rotary positions."""

import pytest
import torch

from repa.base.errors import UserError
from repa.models import Condition, Tap, build_model, load_exported
from repa.models.config import ModelConfig
from repa.models.exported import save_exported
from repa.models.layers import Rotation, rotate
from repa.models.published import constructor_arguments

ALL = {"norm": "rms", "mlp": "swiglu", "qk_norm": "rms", "bias": False, "rotary": True}


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    return (
        {"x": torch.randn(n, 3, 6, 6, generator=generator)},
        torch.rand(n, generator=generator),
        Condition(torch.arange(n)),
    )


def literal(model, state, t, condition):
    """The first block of a network with all options in float64, one image and one token at a time."""
    x = (model.x_embedder(state["x"]) + model.pos_embed).double()
    c = torch.nn.functional.silu(model.t_embedder(t) + model.y_embedder(condition.labels)).double()
    block = model.blocks[0].double()
    heads, grid = block.attn.num_heads, model.grid[1]

    def rms(v, weight):
        return v / (v.square().mean() + 1e-6).sqrt() * weight

    def turned(v, place):
        v, half = v.clone(), len(v) // 2
        for axis, index in ((0, place // grid), (1, place % grid)):
            for pair in range(half // 2):
                angle = torch.tensor(index * 10000 ** (-2 * pair / half), dtype=torch.float64)
                i = axis * half + 2 * pair
                a, b = v[i].clone(), v[i + 1].clone()
                v[i], v[i + 1] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return v

    out = torch.empty_like(x)
    for n in range(len(x)):
        a, b, gate, d, e, gate2 = (block.adaLN_modulation[1].weight @ c[n] + block.adaLN_modulation[1].bias).chunk(6)
        qkv = [block.attn.qkv.weight @ (rms(token, block.norm1.weight) * (1 + b) + a) for token in x[n]]
        found = []
        for h in range(heads):
            width = x.shape[2] // heads
            part = slice(h * width, (h + 1) * width)
            q = [turned(rms(v.chunk(3)[0][part], block.attn.q_norm.weight), i) for i, v in enumerate(qkv)]
            k = [turned(rms(v.chunk(3)[1][part], block.attn.k_norm.weight), i) for i, v in enumerate(qkv)]
            logits = torch.stack([torch.stack([query @ key for key in k]) for query in q]) / width**0.5
            found.append(logits.softmax(1) @ torch.stack([v.chunk(3)[2][part] for v in qkv]))
        y = x[n] + gate * (torch.cat(found, 1) @ block.attn.proj.weight.T + block.attn.proj.bias)
        for i, token in enumerate(y):
            first, second = (block.mlp.w12.weight @ (rms(token, block.norm2.weight) * (1 + e) + d)).chunk(2)
            out[n, i] = token + gate2 * (block.mlp.w3.weight @ (first / (1 + (-first).exp()) * second))
    return out


def test_a_block_with_all_options_equals_the_literal_one(random_dit):
    model = random_dit(**ALL)
    given = inputs(2)
    found = model(*given, taps=(Tap(1),)).taps[Tap(1)]
    torch.testing.assert_close(found.double(), literal(model, *given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{key: value} for key, value in ALL.items()] + [ALL])
def test_every_parameter_receives_a_gradient(options, random_dit):
    model = random_dit(**options)
    model(*inputs()).prediction["x"].square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_rotary_logits_depend_only_on_the_distance():
    cos, sin = Rotation(8, (5, 5))()
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    logits = (rotate(q.expand(-1, -1, 25, -1), cos, sin) @ rotate(k.expand(-1, -1, 25, -1), cos, sin).mT)[0, 0]
    logits = logits.reshape(5, 5, 5, 5)
    torch.testing.assert_close(logits[0, 0, 1, 2], logits[2, 1, 3, 3], rtol=0, atol=1e-6)
    assert abs(logits[0, 0, 1, 2] - logits[0, 0, 2, 1]) > 1e-3


def test_prefix_tokens_are_not_rotated():
    cos, sin = Rotation(8, (2, 3))(front=2)
    assert cos.shape == sin.shape == (8, 8)
    assert torch.equal(cos[:3], torch.ones(3, 8))  # two prefix tokens, and row 0, column 0
    assert not sin[:3].any()


def test_rotary_positions_can_be_stretched():
    plain, stretched = Rotation(8, (5, 5)), Rotation(8, (5, 5), extent=16.0)
    assert torch.equal(stretched.cos[1], Rotation(8, (5, 5), extent=4.0).cos[4])  # both are at coordinate 4
    assert torch.equal(plain.cos, Rotation(8, (5, 5), extent=4.0).cos)


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [("SiT-XL/2", {}, 675), ("SiT-XL/1", {"norm": "rms", "mlp": "swiglu", "rotary": True, "latent_channels": 32}, 675)],
)
def test_parameter_counts_match_the_papers(name, options, millions):
    """DiT-XL/2, and LightningDiT-XL/1 on VA-VAE latents."""
    with torch.device("meta"):
        model = build_model(name, latent_size=16, num_classes=1000, **options)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_an_exported_network_keeps_its_options(random_dit, tmp_path):
    model = random_dit(**ALL, positions=False)
    state = model.state_dict()
    save_exported(tmp_path, state, constructor_arguments(state, 2), {})
    assert torch.equal(load_exported(tmp_path)(*inputs()).prediction["x"], model(*inputs()).prediction["x"])


def test_invalid_input_is_refused(random_dit):
    with pytest.raises(ValueError, match="rotary rotates pairs"):
        ModelConfig(hidden_dim=24, num_heads=4, depth=2, rotary=True)
    with pytest.raises(UserError, match="multiple of 4"):
        random_dit(rotary=True, hidden_dim=24, num_heads=4)
    with pytest.raises(ValueError, match="where its tokens are: add --model.rotary true"):
        ModelConfig(hidden_dim=24, num_heads=2, depth=2, positions=False)
    with pytest.raises(UserError, match="'jit' has no rotary"):
        ModelConfig(backbone="jit", rotary=True).refuse_dit_options()
