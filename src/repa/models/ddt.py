"""DDT: an encoder, and a head that also reads the noised latents and is modulated per token by the encoder's output.

Three networks of papers are configurations of it: DDT (arXiv 2504.05741), with the last blocks as head; DiT^DH of RAE (arXiv
2510.11690), with a head of two wide blocks; and that of RAEv2 (arXiv 2605.18324), with time and class as tokens in front of
the encoder. N batch, C channels, T tokens of the grid, S tokens in front, D width of the encoder, E of the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from repa.base.device import at_least_float32, no_autocast
from repa.base.errors import UserError
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

FREQUENCIES = 256  # of the random features of a time


@dataclass(frozen=True)
class DDTOptions:
    """The backbone `ddt`: options of a DDT in addition to the sizes, layers and heads of the configuration.

    DDT: head_depth=6,final_norm=layer,extent=16,max_period=10 with norm rms, mlp swiglu, qk_norm rms, bias false, rotary.
    RAE: head_depth=2,head_dim=2048,head_heads=16,positions=true,times=fourier,silu_twice=true with norm rms, mlp swiglu, rotary.

    Attributes:
        head_depth, head_dim, head_heads: blocks of the head, their width and attention heads; 0: as in the encoder.
        final_norm: norm of the final layers; empty: that of the blocks.
        positions: add the fixed positions to the encoder's tokens.
        extent: rotary positions are from 0 to this; 0: they are the indices of rows and columns.
        times: "sinusoid", with the longest period max_period, or "fourier": 256 frozen random frequencies.
        silu_twice: apply SiLU a second time in each modulation, as in RAE's code.
        time_tokens, class_tokens: number of time and class tokens in front of an encoder without modulation; 0 and 0: with modulation.
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
    """The encoder's output: `self_condition` (N, T, D) modulates the head; taps and heads are as in Output."""

    self_condition: Tensor
    taps: dict[Tap, Tensor]
    heads: dict[int, Tensor]


class DDT(Backbone):
    """A network with an encoder, blocks 1 ... depth - head_depth, and a head, the other blocks.

    The encoder's tokens h and the time give s = SiLU(time + h), which modulates each token of the head's blocks and of the
    final layer. `encode` and `decode` are separate because s changes slowly over a sampler's steps, so it can be reused.

    Args:
        options, blocks: options of the DDT and of its blocks.
        latent_size: side of the latent, or (height, width); multiples of patch_size.
        depth: number of blocks of encoder and head together.
        rotary: as in DiT.
        heads: depths of encoder blocks that also predict x, each with a final layer on SiLU(time + tokens).

    Hidden taps and attention taps, (N, h, T, T), are of the grid only.

    Raises:
        UserError: incompatible sizes.
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
                f"The head must be a part of the {depth} blocks, but head_depth is {options.head_depth}: choose fewer."
            )
        if outside := [head for head in heads if not 1 <= head <= self.encoder_depth]:
            raise UserError(
                f"heads has block {outside[0]}, but the encoder has blocks 1 to {self.encoder_depth}: choose one of them."
            )
        self.head_dim, self.num_classes, self.null_label = head_dim, num_classes, num_classes
        time_tokens, class_tokens = options.time_tokens, options.class_tokens
        self.silu_twice, self.front = options.silu_twice, time_tokens + class_tokens

        # A buffer: the positions are fixed, but the papers' checkpoints contain them.
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
        # RAEv2's encoder gets time and class as tokens, so it has no adaLN.
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
        # An aligner has one width. If the head has another width than the encoder, only the encoder can be tapped.
        return self.depth if self.head_dim == self.hidden_dim else self.encoder_depth

    def checked(self, tap: Tap) -> Tap:
        """The tap unchanged; raises UserError if there is no such block, or if it is in a head of another width."""
        super().checked(tap)
        if tap.depth > self.tapped_depth:
            raise UserError(
                f"Block {tap.depth} is in the head, which has the width {self.head_dim} and not {self.hidden_dim}: tap a block of the "
                f"encoder, 1 to {self.encoder_depth}."
            )
        return tap

    def forward(
        self, state: State, t: Times, condition: Condition, taps: tuple[Tap, ...] = (), keep: Tensor | None = None
    ) -> Output:
        """Predict from the noised state; see `Backbone.forward`. t is in [0, 1]; `keep` is not supported.

        Raises:
            UserError: the state has other shapes, a tap is not a block, or a time per token or tokens to keep are given.
        """
        self.check(state, taps)
        encoded = self.encode(state, self.one_time(t, keep), condition, taps)
        return self.decode(state, encoded, taps)

    def encode(self, state: State, t: Tensor, condition: Condition, taps: tuple[Tap, ...] = ()) -> Encoded:
        """The encoder's part of `forward`, without its checks."""
        time, label = self.t_embedder(t), self.y_embedder(condition.labels)  # (N, D) each
        # The residual stream stays in float32 under autocast, as in DiT by adding float32 positions.
        tokens = at_least_float32(self.s_embedder(state["x"]))  # (N, T, D)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        # Each iteration prepends its tokens, so class tokens come before time tokens.
        for vector, copies in ((time, self.time_tokens), (label, self.class_tokens)):
            if copies is not None:
                tokens = torch.cat([vector[:, None] + copies, tokens], dim=1)  # (N, S + T, D)
        rotation = None if self.rotation is None else self.rotation(self.front)
        # Blocks without adaLN ignore it.
        modulation = self._modulation(F.silu(time + label))
        seen: dict[Tap, Tensor] = {}
        heads: dict[int, Tensor] = {}
        for depth in range(1, self.encoder_depth + 1):
            (tokens,) = self.run(depth, tokens, modulation, None, rotation, taps=taps, seen=seen, front=self.front)
            if str(depth) in self.heads:
                base = F.silu(time[:, None] + tokens[:, self.front :])  # (N, T, D)
                out = self.heads[str(depth)](base, self._modulation(base))
                heads[depth] = unpatchify(out, self.grid, self.patch_size)
        # Without the tokens in front: the head is modulated per token of the grid.
        return Encoded(F.silu(time[:, None] + tokens[:, self.front :]), seen, heads)

    def decode(self, state: State, encoded: Encoded, taps: tuple[Tap, ...] = ()) -> Output:
        """The head's part of `forward`: the head on the noised latents, modulated by an encoder's output."""
        modulation = self._modulation(self.s_projector(encoded.self_condition))  # (N, T, E)
        tokens = at_least_float32(self.x_embedder(state["x"]))  # (N, T, E)
        rotation = None if self.head_rotation is None else self.head_rotation()
        seen = dict(encoded.taps)
        for depth in range(self.encoder_depth + 1, self.depth + 1):
            (tokens,) = self.run(depth, tokens, modulation, None, rotation, taps=taps, seen=seen)
        out = self.final_layer(tokens, modulation)  # (N, T, p * p * C)
        return Output({"x": unpatchify(out, self.grid, self.patch_size)}, seen, encoded.heads)

    def _modulation(self, vector: Tensor) -> Tensor:
        """Input of adaLN's linear layers."""
        # RAE's modulations begin with a SiLU, but its code has already applied one to their input; its weights expect both.
        return F.silu(vector) if self.silu_twice else vector


class FourierTimes(nn.Module):
    """[sin, cos] of 2 pi W t through an MLP, W random and frozen: (N,) -> (N, D). In float32, also under autocast."""

    W: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        # Stored in checkpoints, unlike the sinusoid's frequencies, because no formula reproduces random numbers.
        self.register_buffer("W", torch.randn(FREQUENCIES))

    def forward(self, t: Tensor) -> Tensor:
        with no_autocast(t.device):
            angles = 2 * torch.pi * t[..., None] * self.W  # (..., 256)
            features = torch.cat([angles.sin(), angles.cos()], dim=-1)
            return self.mlp(features.to(next(self.mlp.parameters()).dtype))  # (..., D)
