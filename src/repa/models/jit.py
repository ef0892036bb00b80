"""JiT, a diffusion transformer on pixels that predicts the clean image (arXiv 2511.13720), and PixelREPA's adapter on it.

N batch, C channels, T tokens of the grid, S class tokens, D width, h heads, d = D / h. Large patches go through a narrow
bottleneck; blocks have RMSNorm, SwiGLU, rotary positions and normed queries and keys; from one block on, copies of the
class stand in front of the grid as tokens. Submodules carry the names of the released checkpoints.
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
    """Sizes of the paper: `jit_dimensions("JiT-B/16")`. Times go to the sinusoid as they are; those of the released weights are
    data times, t = 1 the clean image.

    Args:
        latent_size: side of the image, or (height, width); multiples of patch_size.
        bottleneck: width between the patch and the token.
        class_tokens: S copies of the class in front of the grid, each with a learned position; 0 for none.
        class_tokens_from: blocks before the class tokens come in; their taps are what PixelREPA aligns.

    Hidden taps are of the grid alone, (N, T, D), and so are attention taps, (N, h, T, T). The released H/16 also drops a
    fifth of the outputs of its middle blocks in training; a network here draws no random numbers.

    Raises:
        UserError: sizes that do not fit together.
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
                f"class_tokens_from {class_tokens_from} is not a block of {depth}: choose 0 to {depth - 1}."
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
        """Predict from the noised state; see `Backbone.forward`. `keep` is not for this network.

        Raises:
            UserError: the state has other shapes, a tap is not a block, or a time per token or tokens to keep are given.
        """
        self.check(state, taps)
        t = self.one_time(t, keep)
        x = self.x_embedder(state["x"]) + self.pos_embed  # (N, T, D)
        label = self.y_embedder(condition.labels)  # (N, D)
        silu_c = F.silu(self.t_embedder(t) + label)
        seen: dict[Tap, Tensor] = {}
        front, rotation = 0, self.rotation()  # class tokens that are in front of the grid
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
    """The backbone `jit` with the sizes of the configuration; those left out are the paper's."""
    config.refuse_dit_options()
    given = {"bottleneck": bottleneck, "class_tokens_from": class_tokens_from}
    own = {**further_sizes(config.dims()), **{name: value for name, value in given.items() if value is not None}}
    return JiT(**config.sizes(), num_classes=config.num_classes, class_tokens=class_tokens, **own)


def further_sizes(sizes: Dimensions) -> dict[str, int]:
    """What the paper gives a network of these sizes besides (table 9): class tokens come in after a third of the blocks."""
    return {"bottleneck": 256 if sizes.hidden_dim >= 1280 else 128, "class_tokens_from": sizes.depth // 3}


def jit_dimensions(name: str) -> dict[str, int]:
    """Arguments of JiT by a name such as "JiT-B/16"; raises UserError when there is none."""
    sizes = dimensions(name)
    if not name.startswith("JiT"):
        raise UserError(f"{name} is no JiT: a name is JiT-{{{','.join(JIT_SIZES)}}}/{{16,32}}, as in 'JiT-B/16'.")
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

    It is conditioned as the network is, by embeddings and class tokens it has to itself. Where the features have the width of the
    tokens, the tokens are the answer; elsewhere a head follows: Linear, LayerNorm, SiLU, Linear.

    `forward(hidden, t, condition, visible)`: hidden (N, T, D), t (N,), visible (N, T) bool, False where the mask token stands,
    or None where all are seen. The mask is handed in, since a network draws no random numbers. -> (N, T, F).

    Args:
        hidden_dim: D.
        feature_dim: F.
        grid: (rows, columns) of the tokens.
        num_classes: of the network.
        masked: share of the tokens that are to be masked in training; told to whoever draws the mask.
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
            # The token in the type of the taps: a parameter in float32 would widen all of them.
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
    """Linear layers by Xavier without bias, tables of small numbers, and adaLN-Zero."""
    xavier_layers(module, nn.Linear)
    normal_matrices(module.y_embedder, module.t_embedder)
    if module.in_context_posemb is not None:
        nn.init.normal_(module.in_context_posemb, std=INIT_STD)
    adaln_zero(module)
