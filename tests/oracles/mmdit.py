"""REPA's text-to-image network from a state dict, in float64: two streams of tokens, and attention over [text, image]."""

import math

import torch

from tests.oracles.dit import gelu_tanh, layer_norm, position, silu, timestep_features


def forward(state, x, t, text, num_heads):
    """One sample: x (C, H, W), a time t, text (S, E) -> prediction (C, H, W) and {depth: image tokens (T, D)}."""
    state = {key: value.double() for key, value in state.items()}

    def linear(name, v):
        return v @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def modulated(v, shift, scale):
        return torch.stack([layer_norm(token, 1e-6) * (1 + scale) + shift for token in v])

    kernel = state["x_embedder.proj.weight"]
    dim, channels, p, _ = kernel.shape
    rows, columns = x.shape[1] // p, x.shape[2] // p
    places = [(row, column) for row in range(rows) for column in range(columns)]
    patches = [x[:, r * p : (r + 1) * p, c * p : (c + 1) * p] for r, c in places]
    image = torch.stack([(kernel * patch).sum((1, 2, 3)) for patch in patches]) + state["x_embedder.proj.bias"]
    image = image + torch.tensor([position(r, c, dim) for r, c in places], dtype=torch.float64)
    text = linear("context_embedder", text)
    time = silu(linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", timestep_features(t)))))

    hidden, block = {}, 0
    while f"blocks.{block}.image.qkv.weight" in state:
        parts, chunks = [], []
        for stream, tokens in (("text", text), ("image", image)):
            at = f"blocks.{block}.{stream}"
            chunks.append(linear(f"{at}.adaLN_modulation.1", time).split(dim))
            parts.append(linear(f"{at}.qkv", modulated(tokens, *chunks[-1][:2])))
        joined, mixed, d = torch.cat(parts), torch.zeros(len(text) + len(image), dim).double(), dim // num_heads
        for head in range(num_heads):
            q, k, v = (joined[:, part * dim + head * d :][:, :d] for part in range(3))
            weights = torch.exp(q @ k.T / math.sqrt(d))
            mixed[:, head * d : (head + 1) * d] = weights / weights.sum(1, keepdim=True) @ v
        found = []
        for stream, tokens, attended, parts_of in zip(
            ("text", "image"), (text, image), mixed.split((len(text), len(image))), chunks, strict=True
        ):
            at = f"blocks.{block}.{stream}"
            if len(parts_of) == 6:  # two for the text of the last block, which is only read
                tokens = tokens + parts_of[2] * linear(f"{at}.proj", attended)
                inner = gelu_tanh(linear(f"{at}.mlp.fc1", modulated(tokens, *parts_of[3:5])))
                tokens = tokens + parts_of[5] * linear(f"{at}.mlp.fc2", inner)
            found.append(tokens)
        text, image = found
        block += 1
        hidden[block] = image

    features = linear(
        "final_layer.linear", modulated(image, *linear("final_layer.adaLN_modulation.1", time).split(dim))
    )
    out = torch.zeros(x.shape).double()
    for (r, c), token in zip(places, features, strict=True):
        out[:, r * p : (r + 1) * p, c * p : (c + 1) * p] = token.reshape(p, p, channels).permute(2, 0, 1)
    return out, hidden
