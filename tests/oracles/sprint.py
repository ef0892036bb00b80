"""SPRINT's network from a state dict, in float64: rotary positions alone, and two paths of tokens that are fused."""

import math

import torch

from tests.oracles.dit import gelu_tanh, layer_norm, silu, timestep_features


def angles(places, head_dim):
    """Half the channels of a head for the row, then half for the column; each frequency for two neighbouring channels."""
    half = head_dim // 2
    rates = [10000 ** (-k / half) for k in range(0, half, 2)]
    return torch.tensor([[index * r for index in place for r in rates for _ in range(2)] for place in places]).double()


def rotated(v, angle):
    """Pairs (a, b) of channels become (a cos - b sin, b cos + a sin)."""
    turned = torch.stack([-v[:, 1::2], v[:, 0::2]], dim=2).flatten(1)
    return v * angle.cos() + turned * angle.sin()


def rms(v, weight):
    return v / torch.sqrt((v**2).mean(1, keepdim=True) + 1e-6) * weight


def forward(state, x, t, label, num_heads, route, keep, dropped=False):
    """One sample: x (C, H, W) -> prediction (C, H, W); `keep`: the tokens in the routed blocks; `dropped`: the path is dropped."""
    state = {key: value.double() for key, value in state.items()}

    def linear(name, v):
        return v @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["x_embedder.proj.weight"]
    dim, channels, p, _ = kernel.shape
    d, grid = dim // num_heads, x.shape[1] // p
    places = [(row, column) for row in range(grid) for column in range(grid)]
    angle = angles(places, d)
    time = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", timestep_features(t))))
    c = silu(time + state["y_embedder.embedding_table.weight"][label])

    def modulated(v, shift, scale):
        return torch.stack([layer_norm(token, 1e-6) * (1 + scale) + shift for token in v])

    def block(number, tokens, angle):
        at = f"blocks.{number - 1}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{at}.adaLN_modulation.1", c).split(dim)
        qkv, mixed = linear(f"{at}.attn.qkv", modulated(tokens, shift1, scale1)), torch.zeros_like(tokens)
        for head in range(num_heads):
            q, k, v = (qkv[:, part * dim + head * d :][:, :d] for part in range(3))
            q, k = (rotated(rms(u, state[f"{at}.attn.{n}_norm.weight"]), angle) for u, n in ((q, "q"), (k, "k")))
            weights = torch.exp(q @ k.T / math.sqrt(d))
            mixed[:, head * d : (head + 1) * d] = weights / weights.sum(1, keepdim=True) @ v
        tokens = tokens + gate1 * linear(f"{at}.attn.proj", mixed)
        inner = gelu_tanh(linear(f"{at}.mlp.fc1", modulated(tokens, shift2, scale2)))
        return tokens + gate2 * linear(f"{at}.mlp.fc2", inner)

    patches = [x[:, r * p : (r + 1) * p, s * p : (s + 1) * p] for r, s in places]
    tokens = torch.stack([(kernel * patch).sum((1, 2, 3)) for patch in patches]) + state["x_embedder.proj.bias"]
    first, last = route
    for number in range(1, first):
        tokens = block(number, tokens, angle)
    deep = tokens[keep]
    for number in range(first, last + 1):
        deep = block(number, deep, angle[keep])
    back = state["router.mask_token"].repeat(len(tokens), 1)
    if not dropped:
        back[keep] = deep
    tokens = linear("router.fuse", torch.cat([back, tokens], dim=1))
    number = last + 1
    while f"blocks.{number - 1}.attn.qkv.weight" in state:
        tokens, number = block(number, tokens, angle), number + 1
    features = linear("final_layer.linear", modulated(tokens, *linear("final_layer.adaLN_modulation.1", c).split(dim)))
    out = torch.zeros(x.shape).double()
    for (r, s), token in zip(places, features, strict=True):
        out[:, r * p : (r + 1) * p, s * p : (s + 1) * p] = token.reshape(p, p, channels).permute(2, 0, 1)
    return out
