"""Layers of a diffusion transformer (Peebles & Xie, arXiv 2212.09748): embeddings, adaLN-Zero block, head.

N batch, C channels, T tokens, D width, h heads, G tokens per side, p patch size. Submodules carry the names of the
released checkpoints of DiT, SiT and REPA, so that their state dicts load without a map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa.base.precision import no_autocast

NORM_EPS = 1e-6
MAX_PERIOD = 10000.0  # of every sinusoid, in time and in space


def sincos_positions(dim: int, grid: int) -> Tensor:
    """(1, grid * grid, dim) fixed positions of a row-major token grid, float32 computed in float64.

    The first half of the channels encodes the column, the second the row, each as [sin, cos] of the raw integer index.
    """
    rates = MAX_PERIOD ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates  # (G, D/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (G, D/2)
    column = axis.expand(grid, grid, -1)
    row = axis[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=-1).reshape(1, grid * grid, dim).float()


def timestep_frequencies(dim: int) -> Tensor:
    """(dim / 2,) angular frequencies 1 ... 1/MAX_PERIOD, float32 computed in float64."""
    half = dim // 2
    return (MAX_PERIOD ** -(torch.arange(half, dtype=torch.float64) / half)).float()


class PatchEmbedding(nn.Module):
    """Cut the latent into patches, row by row, and project each to the width: (N, C, H, W) -> (N, T, D)."""

    def __init__(self, channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, T, D)


class TimestepEmbedding(nn.Module):
    """[cos, sin] of t (N,), unscaled, through an MLP -> (N, D). Not under autocast: bfloat16 blurs near times."""

    def __init__(self, dim: int, num_features: int = 256):
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.register_buffer("frequencies", timestep_frequencies(num_features), persistent=False)

    def _apply(self, *args, **kwargs):
        # Follow every .to() in device, never in dtype: rounded frequencies would be other frequencies.
        super()._apply(*args, **kwargs)
        self.frequencies = timestep_frequencies(self.num_features).to(self.frequencies.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        with no_autocast(t.device):
            angles = t[:, None] * self.frequencies  # (N, 128)
            features = torch.cat([angles.cos(), angles.sin()], dim=1)
            return self.mlp(features.to(self.mlp[0].weight.dtype))  # (N, D)


class LabelEmbedding(nn.Module):
    """One vector per class and one, the last, for the null class: (N,) int64 -> (N, D)."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)  # (N, D)


class Attention(nn.Module):
    """Multi-head self-attention, (N, T, D) -> (N, T, D); `qk_norm` normalises queries and keys per head."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 of (N, h, T, D/h)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast leaves a norm in float32
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))  # (N, T, D)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (N, h, T, d), by PyTorch's fused kernels.

    The one exception: in bfloat16 on a CPU their backward is slow, and two products with a softmax between them take less
    time: `python benchmarks/attention.py` prints how much less.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (N, h, T, T)
        return logits.softmax(-1).to(v.dtype) @ v  # the softmax computes in float32 whatever its input
    return F.scaled_dot_product_attention(q, k, v)


class MLP(nn.Module):
    """Two linear layers with GELU (tanh approximation) between: (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(dim: int, chunks: int) -> nn.Sequential:
    """The linear layer of adaLN; the Identity stands where SiLU(c) was, which the network computes once for all."""
    return nn.Sequential(nn.Identity(), nn.Linear(dim, chunks * dim))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift: x (N, T, D), shift and scale (N, 1, D).

    All in the dtype of x: in bfloat16, 1 + scale loses every scale below 0.004, which is all of them early in training.
    """
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


class Block(nn.Module):
    """Transformer block with adaLN-Zero, x (N, T, D) and silu_c (N, D) -> (N, T, D).

    Under autocast the residual stream stays in float32.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.attn = Attention(dim, num_heads, qk_norm)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = modulation(dim, 6)

    def forward(self, x: Tensor, silu_c: Tensor) -> Tensor:
        chunks = self.adaLN_modulation(silu_c).to(x.dtype).unsqueeze(1).chunk(6, dim=2)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = chunks  # 6 of (N, 1, D)
        x = torch.addcmul(x, gate_attn, self.attn(modulate(x, shift_attn, scale_attn)))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Modulated norm and the projection of every token to its patch: (N, T, D) -> (N, T, out_features)."""

    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, x: Tensor, silu_c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(silu_c).to(x.dtype).unsqueeze(1).chunk(2, dim=2)
        return self.linear(modulate(x, shift, scale))  # (N, T, p * p * C)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """(N, G * G, p * p * C) -> (N, C, G * p, G * p); features are ordered (row in patch, column in patch, channel)."""
    n, num_tokens, _ = tokens.shape
    grid, p = math.isqrt(num_tokens), patch_size
    x = tokens.reshape(n, grid, grid, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, grid * p, grid * p)
