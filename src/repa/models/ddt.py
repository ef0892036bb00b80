"""DDT: an encoder whose tokens modulate, place by place, a head of further blocks that reads the noised latents again.

Three networks of papers are settings of it: DDT (arXiv 2504.05741), whose head is the last blocks; DiT^DH of RAE (arXiv
2510.11690), whose head is two wide blocks; and that of RAEv2 (arXiv 2605.18324), where time and class are tokens in front of
the encoder. N batch, C channels, T tokens of the grid, S tokens in front, D width of the encoder, E of the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from repa.base.errors import UserError
from repa.base.precision import at_least_float32, no_autocast
from repa.models.config import BLOCK_OPTIONS, ModelConfig, check_dimensions
from repa.models.contract import Backbone, Condition, Output, State, Tap, Times
from repa.models.layers import (
    INIT_STD,
    Block,
    BlockOptions,
    FinalLayer,
    LabelEmbedding,
    PatchEmbedding,
    Rotation,
    TimestepEmbedding,
    adaln_zero,
    normal_matrices,
    sincos_positions,
    unpatchify,
    xavier_layers,
    xavier_patches,
)


@dataclass(frozen=True)
class DDTOptions:
    """The backbone `ddt`: what a DDT has besides the sizes, layers and heads of the configuration.

    DDT: head_depth=6,final_norm=layer,extent=16,max_period=10 with norm rms, mlp swiglu, qk_norm rms, bias false, rotary.
    RAE: head_depth=2,head_dim=2048,head_heads=16,positions=true,times=fourier,silu_twice=true with norm rms, mlp swiglu, rotary.

    Attributes:
        head_depth, head_dim, head_heads: blocks of the head, their width and attention heads; 0: as in the encoder.
        final_norm: of the final layers; empty: that of the blocks.
        positions: the fixed positions are added to the encoder's tokens.
        extent: rotary positions run from 0 to it; 0: they are the indices of rows and columns.
        times: "sinusoid", with the longest period max_period, or "fourier": 256 frozen random frequencies.
        silu_twice: SiLU is applied once more in each modulation, as the code of RAE does.
        time_tokens, class_tokens: tokens of time and class in front of an encoder without modulation; 0 and 0: it is modulated.
    """

    head_depth: PositiveInt
    head_dim: NonNegativeInt = 0
    head_heads: NonNegativeInt = 0
    final_norm: Literal["", "layer", "rms"] = ""
    positions: bool = False
    extent: NonNegativeFloat = 0.0
    times: Literal["sinusoid", "fourier"] = "sinusoid"
    max_period: PositiveFloat = 10_000.0
    silu_twice: bool = False
    time_tokens: NonNegativeInt = 0
    class_tokens: NonNegativeInt = 0

    def __call__(self, config: ModelConfig) -> "DDT":
        config.refuse_dit_options(allowed=("heads", *BLOCK_OPTIONS))
        blocks = BlockOptions(**config.given(*BlockOptions._fields))
        return DDT(self, blocks, **config.sizes(), **config.given("num_classes", "rotary", "heads"))


class Encoded(NamedTuple):
    """What the encoder found: `self_condition` (N, T, D) modulates the head; taps and heads are as in Output."""

    self_condition: Tensor
    taps: dict[Tap, Tensor]
    heads: dict[int, Tensor]


class DDT(Backbone):
    """Blocks 1 ... depth - head_depth are the encoder, the others the head.

    The encoder's tokens h and the time give s = SiLU(time + h), which modulates each token of the head's blocks and of the
    final layer. `encode` and `decode` are the two halves: s changes slowly over the steps of a sampler, which may keep it.

    Args:
        options, blocks: what head, encoder and their blocks are made of.
        latent_size: side of the latent, or (height, width); multiples of patch_size.
        depth: of encoder and head together.
        rotary: as in DiT.
        heads: depths of encoder blocks that also predict x, by a final layer each, on SiLU(time + tokens).

    Hidden taps are of the grid alone, and so are attention taps, (N, h, T, T).

    Raises:
        UserError: sizes that do not fit together.
    """

    pos_embed: Tensor | None

    def __init__(
        self,
        options: DDTOptions,
        blocks: BlockOptions,
        *,
        latent_size: int | Sequence[int],
        latent_channels: int = 4,
        patch_size: int = 2,
        hidden_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        rotary: bool = True,
        heads: Sequence[int] = (),
    ):
        super().__init__()
        head_dim, head_heads = options.head_dim or hidden_dim, options.head_heads or num_heads
        self.take_sizes(latent_size, latent_channels, patch_size, hidden_dim, depth, num_heads)
        check_dimensions(head_dim, depth, head_heads, patch_size, 0)
        self.encoder_depth = depth - options.head_depth
        if not 0 < options.head_depth < depth:
            raise UserError(
                f"The head must be some of the {depth} blocks, but head_depth is {options.head_depth}: choose fewer."
            )
        if outside := [head for head in heads if not 1 <= head <= self.encoder_depth]:
            raise UserError(
                f"heads names block {outside[0]}, but the encoder has blocks 1 to {self.encoder_depth}: choose one of them."
            )
        self.head_dim, self.num_classes, self.null_label = head_dim, num_classes, num_classes
        time_tokens, class_tokens = options.time_tokens, options.class_tokens
        self.silu_twice, self.front = options.silu_twice, time_tokens + class_tokens

        # A buffer and no parameter: the positions are fixed, but checkpoints of the papers hold them.
        positions = sincos_positions(hidden_dim, self.grid) if options.positions else None
        self.register_buffer("pos_embed", positions)  # (1, T, D)
        self.rotation = Rotation(hidden_dim // num_heads, self.grid, options.extent) if rotary else None
        self.head_rotation = Rotation(head_dim // head_heads, self.grid, options.extent) if rotary else None
        self.t_embedder = (
            FourierTimes(hidden_dim)
            if options.times == "fourier"
            else TimestepEmbedding(hidden_dim, max_period=options.max_period)
        )
        self.y_embedder = LabelEmbedding(num_classes, hidden_dim)
        self.time_tokens = nn.Parameter(torch.zeros(1, time_tokens, hidden_dim)) if time_tokens else None
        self.class_tokens = nn.Parameter(torch.zeros(1, class_tokens, hidden_dim)) if class_tokens else None
        self.s_embedder = PatchEmbedding(latent_channels, hidden_dim, patch_size)
        self.x_embedder = PatchEmbedding(latent_channels, head_dim, patch_size)
        self.s_projector = nn.Linear(hidden_dim, head_dim) if head_dim != hidden_dim else nn.Identity()
        # RAEv2 gives time and class to the encoder as tokens; it then has no adaLN, which would give them twice.
        modulated = not self.front
        encoder = [Block(hidden_dim, num_heads, mlp_ratio, blocks, modulated) for _ in range(self.encoder_depth)]
        head = [Block(head_dim, head_heads, mlp_ratio, blocks) for _ in range(options.head_depth)]
        self.blocks = nn.ModuleList(encoder + head)
        patch_features, final_norm = patch_size**2 * latent_channels, options.final_norm or blocks.norm
        self.final_layer = FinalLayer(head_dim, patch_features, final_norm)
        self.heads = nn.ModuleDict(
            {str(tap): FinalLayer(hidden_dim, patch_features, final_norm) for tap in sorted(heads)}
        )
        self.initialise()

    def initialise(self) -> None:
        """As DiT: blocks start as the identity and every prediction as zero (adaLN-Zero)."""
        xavier_layers(self, nn.Linear)
        for patches in (self.s_embedder.proj, self.x_embedder.proj):
            xavier_patches(patches)
        normal_matrices(self.y_embedder, self.t_embedder)
        for tokens in (self.time_tokens, self.class_tokens):
            if tokens is not None:
                nn.init.normal_(tokens, std=INIT_STD)
        adaln_zero(self)

    @property
    def tapped_depth(self) -> int:
        # An aligner has one width. Where the head is wider than the encoder, only the encoder can be tapped.
        return self.depth if self.head_dim == self.hidden_dim else self.encoder_depth

    def checked(self, tap: Tap) -> Tap:
        """The tap itself; raises UserError when there is no such block, or its tokens have the head's other width."""
        super().checked(tap)
        if tap.depth > self.tapped_depth:
            raise UserError(
                f"Block {tap.depth} is in the head, whose tokens are {self.head_dim} wide and not {self.hidden_dim}: tap one of the "
                f"encoder, 1 to {self.encoder_depth}."
            )
        return tap

    def forward(
        self, state: State, t: Times, condition: Condition, taps: tuple[Tap, ...] = (), keep: Tensor | None = None
    ) -> Output:
        """Predict from the noised state; see `Backbone.forward`. t is in [0, 1], and `keep` is not for this network.

        Raises:
            UserError: the state has other shapes, a tap is not a block, or a time per token or tokens to keep are given.
        """
        self.check(state, taps)
        encoded = self.encode(state, self.one_time(t, keep), condition, taps)
        return self.decode(state, encoded, taps)

    def encode(self, state: State, t: Tensor, condition: Condition, taps: tuple[Tap, ...] = ()) -> Encoded:
        """The first half of `forward`, without its checks."""
        time, label = self.t_embedder(t), self.y_embedder(condition.labels)  # (N, D) each
        # The residual stream stays in float32 under autocast; in DiT the positions see to that.
        tokens = at_least_float32(self.s_embedder(state["x"]))  # (N, T, D)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        # Each pass puts its tokens in front, so those of the class end up before those of the time.
        for vector, copies in ((time, self.time_tokens), (label, self.class_tokens)):
            if copies is not None:
                tokens = torch.cat([vector[:, None] + copies, tokens], dim=1)  # (N, S + T, D)
        rotation = None if self.rotation is None else self.rotation(self.front)
        # Blocks without adaLN are given it too, and leave it unread.
        modulation = self._modulation(F.silu(time + label))
        seen: dict[Tap, Tensor] = {}
        heads: dict[int, Tensor] = {}
        for depth in range(1, self.encoder_depth + 1):
            (tokens,) = self.run(depth, tokens, modulation, None, rotation, taps=taps, seen=seen, front=self.front)
            if str(depth) in self.heads:
                base = F.silu(time[:, None] + tokens[:, self.front :])  # (N, T, D)
                out = self.heads[str(depth)](base, self._modulation(base))
                heads[depth] = unpatchify(out, self.grid, self.patch_size)
        # The tokens in front have done their part: the head is modulated place by place, and they have no place.
        return Encoded(F.silu(time[:, None] + tokens[:, self.front :]), seen, heads)

    def decode(self, state: State, encoded: Encoded, taps: tuple[Tap, ...] = ()) -> Output:
        """The second half of `forward`: the head on the noised latents, modulated by what an encoder found."""
        modulation = self._modulation(self.s_projector(encoded.self_condition))  # (N, T, E)
        tokens = at_least_float32(self.x_embedder(state["x"]))  # (N, T, E)
        rotation = None if self.head_rotation is None else self.head_rotation()
        seen = dict(encoded.taps)
        for depth in range(self.encoder_depth + 1, self.depth + 1):
            (tokens,) = self.run(depth, tokens, modulation, None, rotation, taps=taps, seen=seen)
        out = self.final_layer(tokens, modulation)  # (N, T, p * p * C)
        return Output({"x": unpatchify(out, self.grid, self.patch_size)}, seen, encoded.heads)

    def _modulation(self, vector: Tensor) -> Tensor:
        """What the linear layers of adaLN are given."""
        # RAE's modulations begin with a SiLU, and its code hands them what went through one already: its weights expect both.
        return F.silu(vector) if self.silu_twice else vector


class FourierTimes(nn.Module):
    """[sin, cos] of 2 pi W t through an MLP, W random and frozen: (N,) -> (N, D). In float32, also under autocast."""

    W: Tensor

    def __init__(self, dim: int, num_features: int = 512):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))
        # In checkpoints, unlike the frequencies of the sinusoid: no formula gives random numbers again.
        self.register_buffer("W", torch.randn(num_features // 2))

    def forward(self, t: Tensor) -> Tensor:
        with no_autocast(t.device):
            angles = 2 * torch.pi * t[..., None] * self.W  # (..., 256)
            features = torch.cat([angles.sin(), angles.cos()], dim=-1)
            return self.mlp(features.to(next(self.mlp.parameters()).dtype))  # (..., D)
