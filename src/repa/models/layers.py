"""Layers of a diffusion transformer (Peebles & Xie, arXiv 2212.09748): embeddings, adaLN-Zero block, head.

N batch, C channels, T tokens, D width, h heads, d = D / h, G tokens per side, p patch size. Submodules have the names of
the released checkpoints of DiT, SiT and REPA, so that their state dicts load without a mapping.
"""

import math
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa.base.device import at_least_float32, no_autocast
from repa.base.errors import UserError
from repa.models.config import check_rotary
from repa.models.kernels import modulated_norm

NORM_EPS = 1e-6
MAX_PERIOD = 10000.0  # of every sinusoid, in time and in space
TIME_FEATURES = 256  # sines and cosines of a time
INIT_STD = 0.02  # of tables of labels and tokens, and of the timestep MLP


def xavier_layers(module: nn.Module, *kinds: type[nn.Linear | nn.Conv2d]) -> None:
    """Initialise all layers of these kinds by Xavier (uniform), with zero biases."""
    for layer in module.modules():
        if isinstance(layer, kinds):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def xavier_patches(conv: nn.Conv2d) -> None:
    """The same for a convolution over patches, as a linear layer."""
    # Flattened, for the fan of the linear layer instead of the convolution's; a view, so in place.
    nn.init.xavier_uniform_(conv.weight.flatten(1))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def normal_matrices(*modules: nn.Module) -> None:
    """Initialise all their matrices with small random numbers."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=INIT_STD)


def adaln_zero(network: nn.Module) -> None:
    """Blocks start as the identity and every prediction as zero."""
    # Must be the last initialiser, because the others fill every linear layer, including those that this one zeroes.
    for name, parameter in network.named_parameters():
        if name.endswith(("adaLN_modulation.1.weight", ".linear.weight")):
            nn.init.zeros_(parameter)


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


def timestep_frequencies(dim: int, max_period: float = MAX_PERIOD) -> Tensor:
    """(dim / 2,) angular frequencies 1 ... 1/max_period, float32 computed in float64."""
    half = dim // 2
    return (max_period ** -(torch.arange(half, dtype=torch.float64) / half)).float()


class BlockOptions(NamedTuple):
    """Layers of a block; the defaults are DiT's.

    LightningDiT, RAE and JiT have norm rms, mlp swiglu and rotary positions (which a network passes to its blocks). JiT and
    DDT also have qk_norm rms, and DDT has no bias.
    """

    norm: Literal["layer", "rms"] = "layer"  # LayerNorm without weights, or RMSNorm with one per channel
    mlp: Literal["gelu", "swiglu"] = "gelu"
    qk_norm: Literal["none", "layer", "rms"] = "none"  # of queries and keys, per head
    bias: bool = True  # of queries, keys, values and the MLP


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the wider type of input and weight, as autocast does for LayerNorm but not for RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


def token_norm(kind: str, dim: int) -> nn.Module:
    """The norm before adaLN's modulation: "layer" or "rms" of BlockOptions."""
    return RMSNorm(dim, eps=NORM_EPS) if kind == "rms" else nn.LayerNorm(dim, NORM_EPS, elementwise_affine=False)


def query_norm(kind: str, head_dim: int) -> nn.Module:
    """Norm of queries or keys: "none", "layer" or "rms" of BlockOptions."""
    if kind == "none":
        return nn.Identity()
    # LayerNorm with weights and PyTorch's eps, as in timm's attention, which the code of SiT and REPA uses.
    return RMSNorm(head_dim, eps=NORM_EPS) if kind == "rms" else nn.LayerNorm(head_dim)


class PatchEmbedding(nn.Module):
    """Cut the latents into patches, row-major, and project each to the width: (N, C, H, W) -> (N, T, D).

    Each patch includes `overlap` pixels of its neighbours on every side, which are zero outside the latents.
    """

    def __init__(self, channels: int, dim: int, patch_size: int, overlap: int = 0):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size + 2 * overlap, patch_size, padding=overlap)

    def forward(self, x: Tensor) -> Tensor:
        return tokens_of(self.proj(x))


def tokens_of(image: Tensor) -> Tensor:
    """(N, D, rows, columns) -> (N, T, D), contiguous.

    A view, and every sum with it, would be contiguous by channel, so all norms of the network would copy it.
    """
    return image.flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedding(nn.Module):
    """[cos, sin] of t, unscaled, through an MLP: (N,) -> (N, D), (N, T) -> (N, T, D). No autocast: bfloat16 blurs near times."""

    frequencies: Tensor

    def __init__(self, dim: int, max_period: float = MAX_PERIOD):
        super().__init__()
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.register_buffer("frequencies", timestep_frequencies(TIME_FEATURES, max_period), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # Moves with .to() to another device but keeps its dtype, because rounding would change the frequencies.
        super()._apply(*args, **kwargs)
        self.frequencies = timestep_frequencies(TIME_FEATURES, self.max_period).to(self.frequencies.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        with no_autocast(t.device):
            angles = t[..., None] * self.frequencies  # (..., 128)
            # Cosines first, as DiT's released weights expect; its positions have sines first.
            features = torch.cat([angles.cos(), angles.sin()], dim=-1)
            return self.mlp(features.to(next(self.mlp.parameters()).dtype))  # (..., D)


class LabelEmbedding(nn.Module):
    """A vector per class and, last, one for the null class: (N,) int64 -> (N, D)."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)  # (N, D)


class Rotation(nn.Module):
    """Cosines and sines of rotary positions (arXiv 2104.09864) on a grid: the first half of a head rotates by row, the second by
    column, and pairs of neighbouring channels by the same angle. Tokens in front of the grid are not rotated.

    Rows and columns are 0, 1, 2 ..., or scaled so that the last one is `extent`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, grid: tuple[int, int], extent: float = 0.0):
        super().__init__()
        check_rotary(head_dim)
        half = head_dim // 2
        rates = MAX_PERIOD ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)  # (d / 4,)
        axes = [torch.arange(side) * (extent / max(side - 1, 1) if extent else 1.0) for side in grid]
        row, column = ((axis[:, None] * rates).repeat_interleave(2, dim=1) for axis in axes)  # (side, d / 2) each
        rows, columns = grid
        # (rows, columns, d)
        angles = torch.cat([row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], dim=-1)
        # Stored in checkpoints, like the fixed positions: nothing else there shows that a network has rotary positions.
        self.register_buffer("cos", angles.flatten(0, 1).cos().float())  # (T, d)
        self.register_buffer("sin", angles.flatten(0, 1).sin().float())

    def forward(self, front: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (front + T, d) each."""
        return F.pad(self.cos, (0, 0, front, 0), value=1.0), F.pad(self.sin, (0, 0, front, 0))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of channels of x (N, h, T, d); cos and sin (T, d), or (N, 1, T, d)."""
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Multi-head self-attention, (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, num_heads: int, options: BlockOptions):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=options.bias)
        self.q_norm = query_norm(options.qk_norm, dim // num_heads)
        self.k_norm = query_norm(options.qk_norm, dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, rotation: tuple[Tensor, Tensor] | None = None, tapped: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(output (N, T, D), logits (N, h, T, T) if `tapped`).

        Args:
            mask: (N, T, T) bool, True where a token may attend.
            rotation: cosines and sines of the tokens' positions.
        """
        q, k, v = by_head(self.qkv(x), self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        # Under autocast norms and rotations return float32, but the fused kernels need one type for all three.
        q, k = q.to(v.dtype), k.to(v.dtype)
        # The fused kernels return no logits, so a tapped block computes the product of queries and keys again.
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) if tapped else None
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2)), logits  # (N, T, D)


def by_head(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (N, h, T, d) from the output of one product (N, T, 3 D), without a copy.

    Unbound before the transposition: autograd then writes their gradients once, packed as the product's backward needs them.
    """
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(2, (3, num_heads, -1)).unbind(2))
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (N, h, T, d), by PyTorch's fused kernels; `mask` (N, T, T): True where a token may attend.

    Exception: in bfloat16 on a CPU their backward pass is slow, so two products with a softmax between them are used;
    `python benchmarks/attention.py` prints the times.
    """
    mask = None if mask is None else mask[:, None]  # the same for every head
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        heads = q.shape[:2]
        # Flattened, which copies row by row; matmul on four axes would copy the keys column by column.
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        logits = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)).unflatten(0, heads)  # (N, h, T, T)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        weights = logits.softmax(-1).to(v.dtype)  # the softmax computes in float32 whatever its input
        return torch.bmm(weights.flatten(0, 1), v).unflatten(0, heads)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class MLP(nn.Module):
    """Two linear layers with GELU (tanh approximation) between: (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, hidden: int, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


GELU_SLOPE = 2 * (2 / math.pi) ** 0.5  # 2 sqrt(2 / pi), of tanh-GELU's x * sigmoid(SLOPE * (x + CUBIC * x^3))
GELU_CUBIC = 0.044715


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation.

    For a CPU it is compiled as x * sigmoid(...), the same function, because tanh takes twice the time (`python benchmarks/besides.py`).
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # float32 costs nothing here: in one compiled loop the intermediate values stay in registers.
        wide = at_least_float32(x)
        return (wide * torch.sigmoid(GELU_SLOPE * wide * (1 + GELU_CUBIC * wide * wide))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


class SwiGLU(nn.Module):
    """SiLU(x W1) * (x W2), then W3, at two thirds of the hidden width (arXiv 2002.05202): (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, hidden: int, bias: bool = True):
        super().__init__()
        # Three matrices of two thirds of the width have as many parameters as GELU's two.
        narrow = int(hidden * 2 / 3)
        self.w12 = nn.Linear(dim, 2 * narrow, bias=bias)
        self.w3 = nn.Linear(narrow, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulation(dim: int, chunks: int) -> nn.Sequential:
    """The linear layer of adaLN; the Identity replaces SiLU(c), which the network computes once for all blocks."""
    return nn.Sequential(nn.Identity(), nn.Linear(dim, chunks * dim))


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed * (1 + scale) + shift: normed (N, T, D), shift and scale (N, 1 or T, D).

    Computed in the dtype of x: in bfloat16, 1 + scale loses every scale below 0.004, that is, all of them early in training.
    """
    return torch.addcmul(shift, normed, 1 + scale)


class TwoConditions(NamedTuple):
    """SiLU of two conditions per image, and the choice for each token."""

    both: Tensor  # (N, 2, D)
    second: Tensor  # (N, T, 1) bool


Conditioning = Tensor | TwoConditions  # SiLU of time and label: (N, D), (N, T, D), or two per image


def modulations(layer: nn.Module, silu_c: Conditioning, x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates in the dtype of x: silu_c (N, D) -> (N, 1, D) each, (N, T, D) or TwoConditions -> (N, T, D) each."""
    if isinstance(silu_c, TwoConditions):
        # Two products per image and a choice, instead of one product per token.
        first, second = layer(silu_c.both).to(x.dtype).split(1, dim=1)
        return torch.where(silu_c.second, second, first).chunk(chunks, dim=2)
    out = layer(silu_c).to(x.dtype)
    return (out if out.ndim == 3 else out.unsqueeze(1)).chunk(chunks, dim=2)


class Block(nn.Module):
    """Transformer block with adaLN-Zero, or without any modulation.

    Under autocast the residual stream stays in float32.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        options: BlockOptions | None = None,
        modulated: bool = True,
    ):
        super().__init__()
        options = options or BlockOptions()
        self.norm1 = token_norm(options.norm, dim)
        self.attn = Attention(dim, num_heads, options)
        self.norm2 = token_norm(options.norm, dim)
        mlp = SwiGLU if options.mlp == "swiglu" else MLP
        self.mlp = mlp(dim, int(dim * mlp_ratio), options.bias)
        self.adaLN_modulation = modulation(dim, 6) if modulated else None
        self.fused_norm = False

    def forward(
        self,
        x: Tensor,
        silu_c: Conditioning,
        mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        tapped: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x (N, T, D), silu_c of it, mask (N, T, T) -> (x, attention logits (N, h, T, T) if `tapped`)."""
        if self.adaLN_modulation is None:
            attention, logits = self.attn(self.norm1(x), mask, rotation, tapped)
            x = x + attention
            return x + self.mlp(self.norm2(x)), logits
        # The order of these six in DiT's released weights.
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulations(
            self.adaLN_modulation, silu_c, x, 6
        )
        attention, logits = self.attn(self._modulated(self.norm1, x, shift_attn, scale_attn), mask, rotation, tapped)
        x = torch.addcmul(x, gate_attn, attention)
        return torch.addcmul(x, gate_mlp, self.mlp(self._modulated(self.norm2, x, shift_mlp, scale_mlp))), logits

    def _modulated(self, norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        # The kernel fuses the gradient's sum over tokens, which a shift per token does not have.
        if self.fused_norm and scale.shape[1] == 1:
            return modulated_norm(x, shift, scale, NORM_EPS)
        return modulate(norm(x), shift, scale)

    def fuse_norm(self) -> bool:
        """Use the kernel of `kernels.py` for LayerNorm with adaLN; returns False for other blocks."""
        self.fused_norm = type(self.norm1) is nn.LayerNorm and self.adaLN_modulation is not None
        return self.fused_norm


class FinalLayer(nn.Module):
    """Modulated norm and the projection of every token to its patch: (N, T, D) -> (N, T, out_features)."""

    def __init__(self, dim: int, out_features: int, norm: str = "layer"):
        super().__init__()
        self.norm_final = token_norm(norm, dim)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, x: Tensor, silu_c: Conditioning) -> Tensor:
        return self.linear(self.normed(x, silu_c))  # (N, T, p * p * C)

    def normed(self, x: Tensor, silu_c: Conditioning) -> Tensor:
        """Input of the projection: (N, T, D)."""
        return modulate(self.norm_final(x), *modulations(self.adaLN_modulation, silu_c, x, 2))


class Stream(nn.Module):
    """Embedding and prediction of a stream, one token in front of the grid (REG, arXiv 2507.01467).

    Embedding: Linear and an affine LayerNorm, (N, F) -> (N, 1, D). Prediction: Linear on the final layer's normalised token,
    (N, D) -> (N, F).
    """

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.embed = nn.Linear(features, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.linear = nn.Linear(dim, features)

    def forward(self, vector: Tensor) -> Tensor:
        return self.norm(self.embed(vector)).unsqueeze(1)  # (N, 1, D)


def patchify(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, T, p * p * C), the inverse of `unpatchify`."""
    n, channels, height, width = x.shape
    rows, columns = height // patch[0], width // patch[1]
    cut = x.reshape(n, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * columns, -1)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int, overlap: int = 0) -> Tensor:
    """(N, rows * columns, q * q * C) -> (N, C, rows * p, columns * p); features are ordered (row in patch, column in patch, channel).

    q = p + 2 overlap: the predictions of overlapping patches for a pixel are summed, and those outside the latents are
    discarded.
    """
    n, p = len(tokens), patch_size
    if overlap:
        q = p + 2 * overlap
        patches = tokens.unflatten(2, (q, q, -1)).permute(0, 4, 2, 3, 1).flatten(1, 3)  # (N, C * q * q, T)
        # bfloat16 would round every partial sum.
        return F.fold(at_least_float32(patches), (grid[0] * p, grid[1] * p), q, padding=overlap, stride=p)
    # Channels last in a patch, as in DiT, SiT, REG and JiT; the released code of DDT and SPRINT has them first.
    x = tokens.reshape(n, *grid, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, grid[0] * p, grid[1] * p)


def grid_side(num_tokens: int) -> int:
    """Side of a square grid of tokens: 256 -> 16; raises UserError if it is not square."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens or side == 0:
        raise UserError(
            f"{num_tokens} tokens are not a square grid such as 16 x 16 or 32 x 32: remove class and register tokens, "
            "or give the grid as grid=(rows, columns)."
        )
    return side


class TokenConvolution(nn.Module):
    """A convolution over the grid of tokens that preserves its size: (N, T, D) -> (N, T, F).

    Args:
        grid: (rows, columns); None: a square.
    """

    def __init__(self, dim: int, features: int, kernel: int, grid: tuple[int, int] | None):
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(dim, features, kernel, padding=kernel // 2)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        grid = grid or self.grid or (grid_side(tokens.shape[1]),) * 2
        image = tokens.transpose(1, 2).unflatten(2, grid)  # (N, D, rows, columns)
        return self.conv(image).flatten(2).transpose(1, 2)  # (N, T, F)
