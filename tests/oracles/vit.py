"""A vision transformer with the original projects' tensor names in float64, one patch and head at a time.

DINOv2 has registers without position between class token and patches, a scale per branch, and gated MLPs in the giant.
"""

import math

import torch
from torch import Tensor

from tests.oracles import bicubic


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def gated(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    both = x @ w["mlp.w12.weight"].T + w["mlp.w12.bias"]
    gate, value = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    return (gate / (1 + torch.exp(-gate)) * value) @ w["mlp.w3.weight"].T + w["mlp.w3.bias"]


def positions(table: Tensor, grid: int, class_rows: int) -> Tensor:
    """(1, class_rows + M*M, D) -> (class_rows + grid*grid, D), by the bicubic loops with antialias."""
    native, dim = math.isqrt(table.shape[1] - class_rows), table.shape[2]
    image = table[0, class_rows:].T.reshape(dim, native, native).numpy()
    rows = image if native == grid else bicubic.resize(image, grid, antialias=True)
    return torch.cat([table[0, :class_rows], torch.as_tensor(rows).reshape(dim, -1).T])


def attention(x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, heads: int) -> Tensor:
    tokens, dim = x.shape
    width = dim // heads
    fused = x @ qkv_weight.T + qkv_bias
    result = torch.empty_like(x)
    for head in range(heads):
        q, k, v = (fused[:, part * dim + head * width : part * dim + (head + 1) * width] for part in range(3))
        for i in range(tokens):
            weights = torch.softmax(q[i] @ k.T / math.sqrt(width), 0)
            result[i, head * width : (head + 1) * width] = weights @ v
    return result


def tokens(
    state: dict[str, Tensor], image: Tensor, heads: int, final_norm: bool, act=gelu, eps: float = 1e-6
) -> Tensor:
    """Normalised image (3, S, S) -> (class token if there is one, registers, then patches row by row; D)."""
    state, image = {key: value.double() for key, value in state.items()}, image.double()
    kernel = state["patch_embed.proj.weight"]
    patch, has_class = kernel.shape[-1], "cls_token" in state
    grid = image.shape[-1] // patch
    rows = [state["cls_token"][0, 0]] if has_class else []
    for row in range(grid):
        for column in range(grid):
            window = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            rows.append((kernel * window).sum((1, 2, 3)) + state.get("patch_embed.proj.bias", 0))
    x = torch.stack(rows) + positions(state["pos_embed"], grid, int(has_class))
    if "register_tokens" in state:
        x = torch.cat([x[:1], state["register_tokens"][0], x[1:]])
    if "norm_pre.weight" in state:
        x = layer_norm(x, state["norm_pre.weight"], state["norm_pre.bias"], eps)
    for block in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))):
        w = {key.removeprefix(f"blocks.{block}."): value for key, value in state.items()}
        h = layer_norm(x, w["norm1.weight"], w["norm1.bias"], eps)
        h = attention(h, w["attn.qkv.weight"], w["attn.qkv.bias"], heads)
        x = x + w.get("ls1.gamma", 1) * (h @ w["attn.proj.weight"].T + w["attn.proj.bias"])
        h = layer_norm(x, w["norm2.weight"], w["norm2.bias"], eps)
        if "mlp.w12.weight" in w:
            h = gated(h, w)
        else:
            h = act(h @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
        x = x + w.get("ls2.gamma", 1) * h
    return layer_norm(x, state["norm.weight"], state["norm.bias"]) if final_norm else x
