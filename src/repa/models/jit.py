"""JiT, a diffusion transformer on pixels that predicts the clean image (arXiv 2511.13720), and PixelREPA's adapter on it.

N batch, C channels, T tokens of the grid, S class tokens, D width, h heads, d = D / h. Large patches go through a narrow
bottleneck; blocks have RMSNorm, SwiGLU, rotary positions and normalised queries and keys. From one block on, copies of the
class are tokens in front of the grid. Submodules have the names of the released checkpoints.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa.base.errors import UserError
from repa.models.config import JIT_SIZES, Dimensions, ModelConfig, dimensions
from repa.models.contract import Backbone, Condition, Output, State, Tap, Times
from repa.models.layers import (
    INIT_STD,
    Block,
    BlockOptions,
    FinalLayer,
    LabelEmbedding,
    Rotation,
    TimestepEmbedding,
    adaln_zero,
    normal_matrices,
    sincos_positions,
    tokens_of,
    unpatchify,
    xavier_layers,
    xavier_patches,
)

OPTIONS = BlockOptions(norm="rms", mlp="swiglu", qk_norm="rms")


class JiT(Backbone):
    """A diffusion transformer on pixels; `jit_dimensions("JiT-B/16")` has the paper's sizes. Times are not scaled; the released
    weights use data times, where t = 1 is the clean image.

    Args:
        latent_size: side of the image, or (height, width); multiples of patch_size.
        bottleneck: width between the patch and the token.
        class_tokens: S copies of the class in front of the grid, each with a learned position; 0: none.
        class_tokens_from: number of blocks before the class tokens enter; PixelREPA aligns the taps of these blocks.

    Hidden taps, (N, T, D), and attention taps, (N, h, T, T), are of the grid only. The released H/16 also drops a fifth of
    the outputs of its middle blocks in training; networks here have no dropout.

    Raises:
        UserError: incompatible sizes.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        latent_size: int | Sequence[int],
        latent_channels: int = 3,
        patch_size: int = 16,
        hidden_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        bottleneck: int = 128,
        class_tokens: int = 32,
        class_tokens_from: int = 4,
    ):
        super().__init__()
        self.take_sizes(latent_size, latent_channels, patch_size, hidden_dim, depth, num_heads)
        if class_tokens and not 0 <= class_tokens_from < depth:
            raise UserError(
                f"class_tokens_from must be 0 to {depth - 1} for {depth} blocks, but got {class_tokens_from}."
            )
        self.num_classes = self.null_label = num_classes
        self.class_tokens, self.class_tokens_from = class_tokens, class_tokens_from

        self.register_buffer("pos_embed", sincos_positions(hidden_dim, self.grid), persistent=False)  # (1, T, D)
        self.rotation = Rotation(hidden_dim // num_heads, self.grid)
        self.x_embedder = BottleneckEmbedding(latent_channels, bottleneck, hidden_dim, patch_size)
        self.t_embedder = TimestepEmbedding(hidden_dim)
        self.y_embedder = LabelEmbedding(num_classes, hidden_dim)
        self.in_context_posemb = nn.Parameter(torch.zeros(1, class_tokens, hidden_dim)) if class_tokens else None
        self.blocks = nn.ModuleList(Block(hidden_dim, num_heads, options=OPTIONS) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_dim, patch_size**2 * latent_channels, OPTIONS.norm)
        initialise(self)
        for conv in (self.x_embedder.proj1, self.x_embedder.proj2):
            xavier_patches(conv)

    def forward(
        self, state: State, t: Times, condition: Condition, taps: tuple[Tap, ...] = (), keep: Tensor | None = None
    ) -> Output:
        """Predict from the noised state; see `Backbone.forward`. `keep` is not supported.

        Raises:
            UserError: the state has other shapes, a tap is not a block, or a time per token or tokens to keep are given.
        """
        self.check(state, taps)
        t = self.one_time(t, keep)
        x = self.x_embedder(state["x"]) + self.pos_embed  # (N, T, D)
        label = self.y_embedder(condition.labels)  # (N, D)
        silu_c = F.silu(self.t_embedder(t) + label)
        seen: dict[Tap, Tensor] = {}
        front, rotation = 0, self.rotation()  # number of class tokens in front of the grid so far
        for depth in range(1, self.depth + 1):
            if self.in_context_posemb is not None and depth == self.class_tokens_from + 1:
                front, rotation = self.class_tokens, self.rotation(self.class_tokens)
                x = torch.cat([label[:, None] + self.in_context_posemb, x], dim=1)  # (N, S + T, D)
            (x,) = self.run(depth, x, silu_c, None, rotation, taps=taps, seen=seen, front=front)
        tokens = self.final_layer(x[:, front:], silu_c)  # (N, T, p * p * C)
        return Output({"x": unpatchify(tokens, self.grid, self.patch_size)}, seen, {})


def jit(
    config: ModelConfig, *, bottleneck: int | None = None, class_tokens: int = 32, class_tokens_from: int | None = None
) -> JiT:
    """The backbone `jit` with the sizes of the configuration; the others are the paper's."""
    config.refuse_dit_options()
    given = {"bottleneck": bottleneck, "class_tokens_from": class_tokens_from}
    own = {**further_sizes(config.dims()), **{name: value for name, value in given.items() if value is not None}}
    return JiT(**config.sizes(), num_classes=config.num_classes, class_tokens=class_tokens, **own)


def further_sizes(sizes: Dimensions) -> dict[str, int]:
    """The paper's further settings for these sizes (table 9); class tokens enter after a third of the blocks."""
    return {"bottleneck": 256 if sizes.hidden_dim >= 1280 else 128, "class_tokens_from": sizes.depth // 3}


def jit_dimensions(name: str) -> dict[str, int]:
    """Arguments of JiT for a name such as "JiT-B/16"; raises UserError if it is unknown."""
    sizes = dimensions(name)
    if not name.startswith("JiT"):
        raise UserError(f"{name} is not a JiT: use JiT-{{{','.join(JIT_SIZES)}}}/{{16,32}}, as in 'JiT-B/16'.")
    return sizes._asdict() | further_sizes(sizes)


class BottleneckEmbedding(nn.Module):
    """Cut the image into patches and project each through a narrow layer without bias: (N, C, H, W) -> (N, T, D)."""

    def __init__(self, channels: int, bottleneck: int, dim: int, patch_size: int):
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, kernel_size=patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return tokens_of(self.proj2(self.proj1(x)))


class MaskedAdapter(nn.Module):
    """PixelREPA's projector (arXiv 2603.14366): hidden tokens, some masked, through two JiT blocks to features.

    It is conditioned like the network, with its own embeddings and class tokens. If the features have the width of the
    tokens, the tokens are the output; otherwise a head follows: Linear, LayerNorm, SiLU, Linear.

    `forward(hidden, t, condition, visible)`: hidden (N, T, D), t (N,), visible (N, T) bool, False for masked tokens, or None
    for no mask. The mask is an argument because networks use no random numbers. -> (N, T, F).

    Args:
        hidden_dim: D.
        feature_dim: F.
        grid: (rows, columns) of the tokens.
        num_classes: number of classes of the network.
        masked: share of the tokens to mask in training, for the code that samples the mask.
    """

    def __init__(
        self,
        hidden_dim: int,
        feature_dim: int,
        grid: tuple[int, int],
        *,
        num_classes: int,
        num_heads: int,
        depth: int = 2,
        class_tokens: int = 32,
        masked: float = 0.2,
    ):
        super().__init__()
        self.masked = masked
        self.rotation = Rotation(hidden_dim // num_heads, grid)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.t_embedder = TimestepEmbedding(hidden_dim)
        self.y_embedder = LabelEmbedding(num_classes, hidden_dim)
        self.in_context_posemb = nn.Parameter(torch.zeros(1, class_tokens, hidden_dim))
        self.blocks = nn.ModuleList(Block(hidden_dim, num_heads, options=OPTIONS) for _ in range(depth))
        head = [
            nn.Linear(hidden_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, feature_dim),
        ]
        self.projection = nn.Sequential(*(head if hidden_dim != feature_dim else []))
        initialise(self)
        nn.init.normal_(self.mask_token, std=INIT_STD)

    def forward(self, hidden: Tensor, t: Tensor, condition: Condition, visible: Tensor | None = None) -> Tensor:
        x = hidden  # (N, T, D)
        if visible is not None:
            # The mask token in the dtype of the taps: a float32 parameter would promote all of them.
            x = torch.where(visible[..., None], hidden, self.mask_token.to(hidden.dtype))
        label = self.y_embedder(condition.labels)
        silu_c = F.silu(self.t_embedder(t) + label)
        front = self.in_context_posemb.shape[1]
        x = torch.cat([label[:, None] + self.in_context_posemb, x], dim=1)  # (N, S + T, D)
        rotation = self.rotation(front)
        for block in self.blocks:
            x, _ = block(x, silu_c, rotation=rotation)
        return self.projection(x[:, front:])  # (N, T, F)


def initialise(module: JiT | MaskedAdapter) -> None:
    """Initialise linear layers by Xavier with zero biases, tables with small random numbers, and adaLN-Zero."""
    xavier_layers(module, nn.Linear)
    normal_matrices(module.y_embedder, module.t_embedder)
    if module.in_context_posemb is not None:
        nn.init.normal_(module.in_context_posemb, std=INIT_STD)
    adaln_zero(module)
