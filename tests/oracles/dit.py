"""The diffusion transformer of the papers from a state dict, in float64, one token, head and patch at a time."""

import math

import torch


def layer_norm(v, eps, weight=None, bias=None):
    mean = v.mean()
    out = (v - mean) / torch.sqrt(((v - mean) ** 2).mean() + eps)
    return out if weight is None else out * weight + bias


def silu(v):
    return v / (1 + torch.exp(-v))


def gelu_tanh(v):
    return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def position(row, column, dim):
    """Half the channels for the column, then half for the row; each sines, then cosines."""
    values = []
    for index in (column, row):
        rates = [10000 ** (-k / (dim // 4)) for k in range(dim // 4)]
        values += [math.sin(index * rate) for rate in rates] + [math.cos(index * rate) for rate in rates]
    return values


def timestep_features(t, dim=256):
    half = dim // 2
    rates = [math.exp(-math.log(10000) * k / half) for k in range(half)]
    return torch.tensor([math.cos(t * r) for r in rates] + [math.sin(t * r) for r in rates], dtype=torch.float64)


def attention(state, prefix, tokens, num_heads):
    """softmax(q k / sqrt(d)) v, head by head and query by query."""
    dim = tokens.shape[1]
    d = dim // num_heads
    qkv = [state[f"{prefix}qkv.weight"] @ token + state[f"{prefix}qkv.bias"] for token in tokens]
    out = torch.zeros_like(tokens)
    for head in range(num_heads):
        q, k, v = ([token[part * dim + head * d : part * dim + (head + 1) * d] for token in qkv] for part in range(3))
        if f"{prefix}q_norm.weight" in state:
            q = [layer_norm(x, 1e-5, state[f"{prefix}q_norm.weight"], state[f"{prefix}q_norm.bias"]) for x in q]
            k = [layer_norm(x, 1e-5, state[f"{prefix}k_norm.weight"], state[f"{prefix}k_norm.bias"]) for x in k]
        for n, query in enumerate(q):
            scores = torch.stack([torch.exp((query * key).sum() / math.sqrt(d)) for key in k])
            weights = scores / scores.sum()
            out[n, head * d : (head + 1) * d] = sum(w * value for w, value in zip(weights, v, strict=True))
    return torch.stack([state[f"{prefix}proj.weight"] @ token + state[f"{prefix}proj.bias"] for token in out])


def forward(state, x_t, t, labels, num_heads):
    """(N, C, H, W) -> prediction (N, C', H, W) and {depth: residual stream (N, T, D)}."""
    state = {key: value.double() for key, value in state.items()}
    samples = zip(x_t.double(), t.tolist(), labels.tolist(), strict=True)
    results = [_forward_one(state, x, s, y, num_heads) for x, s, y in samples]
    hidden = {depth: torch.stack([r[1][depth] for r in results]) for depth in results[0][1]}
    return torch.stack([r[0] for r in results]), hidden


def _forward_one(state, x, t, label, num_heads):
    kernel, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    dim, _, p, _ = kernel.shape
    grid = x.shape[1] // p
    tokens = []
    for row in range(grid):
        for column in range(grid):
            patch = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            embedded = torch.stack([(kernel[d] * patch).sum() for d in range(dim)]) + bias
            tokens.append(embedded + torch.tensor(position(row, column, dim), dtype=torch.float64))
    tokens = torch.stack(tokens)

    time = state["t_embedder.mlp.0.weight"] @ timestep_features(t) + state["t_embedder.mlp.0.bias"]
    time = state["t_embedder.mlp.2.weight"] @ silu(time) + state["t_embedder.mlp.2.bias"]
    c = time + state["y_embedder.embedding_table.weight"][label]

    hidden, block = {}, 0
    while f"blocks.{block}.attn.qkv.weight" in state:
        b = f"blocks.{block}."
        ada = state[f"{b}adaLN_modulation.1.weight"] @ silu(c) + state[f"{b}adaLN_modulation.1.bias"]
        shift1, scale1, gate1, shift2, scale2, gate2 = (ada[i * dim : (i + 1) * dim] for i in range(6))
        normed = torch.stack([layer_norm(token, 1e-6) * (1 + scale1) + shift1 for token in tokens])
        tokens = tokens + gate1 * attention(state, f"{b}attn.", normed, num_heads)
        for n in range(len(tokens)):
            h = layer_norm(tokens[n], 1e-6) * (1 + scale2) + shift2
            h = gelu_tanh(state[f"{b}mlp.fc1.weight"] @ h + state[f"{b}mlp.fc1.bias"])
            tokens[n] = tokens[n] + gate2 * (state[f"{b}mlp.fc2.weight"] @ h + state[f"{b}mlp.fc2.bias"])
        block += 1
        hidden[block] = tokens.clone()

    ada = state["final_layer.adaLN_modulation.1.weight"] @ silu(c) + state["final_layer.adaLN_modulation.1.bias"]
    shift, scale = ada[:dim], ada[dim:]
    weight, bias = state["final_layer.linear.weight"], state["final_layer.linear.bias"]
    out_channels = len(bias) // p**2
    out = torch.zeros(out_channels, grid * p, grid * p, dtype=torch.float64)
    for n, token in enumerate(tokens):
        features = weight @ (layer_norm(token, 1e-6) * (1 + scale) + shift) + bias
        for row in range(p):
            for column in range(p):
                for channel in range(out_channels):
                    value = features[(row * p + column) * out_channels + channel]
                    out[channel, (n // grid) * p + row, (n % grid) * p + column] = value
    return out, hidden
