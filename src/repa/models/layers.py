"""Layers of a diffusion transformer (Peebles & Xie, arXiv 2212.09748): embeddings, adaLN-Zero block, head.

N batch, C channels, T tokens, D width, h heads, G tokens per side, p patch size. Submodules carry the names of the
released checkpoints of DiT, SiT and REPA, so that their state dicts load without a map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa.base.precision import no_autocast

NORM_EPS = 1e-6
MAX_PERIOD = 10000.0  # of every sinusoid, in time and in space


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """(1, rows * columns, dim) fixed positions of a row-major token grid, float32 computed in float64.

    The first half of the channels encodes the column, the second the row, each as [sin, cos] of the raw integer index.
    """
    rates = MAX_PERIOD ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = grid
    angles = torch.arange(max(grid), dtype=torch.float64)[:, None] * rates  # (G, D/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (G, D/2)
    column = axis[:columns].expand(rows, columns, -1)
    row = axis[:rows, None].expand(rows, columns, -1)
    return torch.cat([column, row], dim=-1).reshape(1, rows * columns, dim).float()


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
    """[cos, sin] of t, unscaled, through an MLP: (N,) -> (N, D), (N, T) -> (N, T, D). Not under autocast: bfloat16 blurs near times."""

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
            angles = t[..., None] * self.frequencies  # (..., 128)
            features = torch.cat([angles.cos(), angles.sin()], dim=-1)
            return self.mlp(features.to(self.mlp[0].weight.dtype))  # (..., D)


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

    def forward(self, x: Tensor, mask: Tensor | None = None, tapped: bool = False) -> tuple[Tensor, Tensor | None]:
        """(output, logits): `mask` (N, T, T) bool is True where a token may look; logits (N, h, T, T) when `tapped`."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 of (N, h, T, D/h)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast leaves a norm in float32
        # the fused kernels keep no logits: a tapped block pays for one more product of queries and keys
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) if tapped else None
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2)), logits  # (N, T, D)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (N, h, T, d), by PyTorch's fused kernels; `mask` (N, T, T): True may be seen.

    The one exception: in bfloat16 on a CPU their backward is slow, and two products with a softmax between them take less
    time: `python benchmarks/attention.py` prints how much less.
    """
    mask = None if mask is None else mask[:, None]  # the same for every head
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (N, h, T, T)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        return logits.softmax(-1).to(v.dtype) @ v  # the softmax computes in float32 whatever its input
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


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
    """LayerNorm(x) * (1 + scale) + shift: x (N, T, D), shift and scale (N, 1 or T, D).

    All in the dtype of x: in bfloat16, 1 + scale loses every scale below 0.004, which is all of them early in training.
    """
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def modulations(layer: nn.Module, silu_c: Tensor, x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates in the dtype of x: silu_c (N, D) -> (N, 1, D) each, (N, T, D) -> (N, T, D) each."""
    out = layer(silu_c).to(x.dtype)
    return (out if out.ndim == 3 else out.unsqueeze(1)).chunk(chunks, dim=2)


class Block(nn.Module):
    """Transformer block with adaLN-Zero.

    Under autocast the residual stream stays in float32.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.attn = Attention(dim, num_heads, qk_norm)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = modulation(dim, 6)

    def forward(
        self, x: Tensor, silu_c: Tensor, mask: Tensor | None = None, tapped: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (N, T, D), silu_c (N, D) or (N, T, D), mask (N, T, T) -> (x, attention logits (N, h, T, T) when `tapped`)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulations(
            self.adaLN_modulation, silu_c, x, 6
        )
        attention, logits = self.attn(modulate(x, shift_attn, scale_attn), mask, tapped)
        x = torch.addcmul(x, gate_attn, attention)
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp))), logits


class FinalLayer(nn.Module):
    """Modulated norm and the projection of every token to its patch: (N, T, D) -> (N, T, out_features)."""

    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, x: Tensor, silu_c: Tensor) -> Tensor:
        return self.linear(self.normed(x, silu_c))  # (N, T, p * p * C)

    def normed(self, x: Tensor, silu_c: Tensor) -> Tensor:
        """What the projection sees: (N, T, D)."""
        return modulate(x, *modulations(self.adaLN_modulation, silu_c, x, 2))


class Stream(nn.Module):
    """A further noised vector as one token in front of the grid (REG, arXiv 2507.01467): its way in and its way out.

    In: Linear and an affine LayerNorm, (N, F) -> (N, 1, D). Out: Linear from the token that the final layer normed, (N, D) -> (N, F).
    """

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.embed = nn.Linear(features, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.linear = nn.Linear(dim, features)

    def forward(self, vector: Tensor) -> Tensor:
        return self.norm(self.embed(vector)).unsqueeze(1)  # (N, 1, D)


def patchify(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, T, p * p * C), the way back of `unpatchify`."""
    n, channels, height, width = x.shape
    rows, columns = height // patch[0], width // patch[1]
    cut = x.reshape(n, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * columns, -1)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """(N, rows * columns, p * p * C) -> (N, C, rows * p, columns * p); features are ordered (row in patch, column in patch, channel)."""
    n, p = len(tokens), patch_size
    x = tokens.reshape(n, *grid, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, grid[0] * p, grid[1] * p)
