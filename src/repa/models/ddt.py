"""DDT: an encoder whose tokens modulate, place by place, a head of further blocks that reads the noised latents again.

Three networks of papers are settings of it: DDT (arXiv 2504.05741), whose head is the last blocks; DiT^DH of RAE (arXiv
2510.11690), whose head is two wide blocks; and that of RAEv2 (arXiv 2605.18324), where time and class are tokens in front of
the encoder. N batch, C channels, T tokens of the grid, S tokens in front, D width of the encoder, E of the head.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa.base.errors import UserError, choices
from repa.models.config import ModelConfig, check_dimensions
from repa.models.contract import Backbone, Condition, Output, State, Tap, Times
from repa.models.layers import (
    INIT_STD,
    Block,
    BlockOptions,
    FinalLayer,
    FourierTimes,
    LabelEmbedding,
    PatchEmbedding,
    Rotation,
    TimestepEmbedding,
    adaln_zero,
    normal_matrices,
    sincos_positions,
    unpatchify,
    xavier_linears,
    xavier_patches,
)


class Encoded(NamedTuple):
    """What the encoder found: `guide` (N, T, D) modulates the head; taps and heads are as in Output."""

    guide: Tensor
    taps: dict[Tap, Tensor]
    heads: dict[int, Tensor]


class DDT(Backbone):
    """Blocks 1 ... depth - head_depth are the encoder, the others the head.

    The encoder's tokens h and the time give s = SiLU(time + h), which modulates each token of the head's blocks and of the
    final layer. `encode` and `decode` are the two halves: s changes slowly over the steps of a sampler, which may keep it.

    Args:
        latent_size: side of the latent, or (height, width); multiples of patch_size.
        depth: of encoder and head together.
        head_depth, head_dim, head_heads: blocks of the head, their width and attention heads; 0: as in the encoder.
        norm, mlp, qk_norm, bias, rotary: what blocks are made of, as in DiT.
        final_norm: of the final layers, "layer" or "rms"; None: as `norm`.
        positions: the fixed positions are added to the encoder's tokens.
        extent: rotary positions run from 0 to it; 0: they are the indices of rows and columns.
        times: "sinusoid", with the longest period max_period, or "fourier": 256 frozen random frequencies.
        silu_twice: SiLU is applied once more in each modulation, as the code of RAE does.
        time_tokens, class_tokens: tokens of time and class in front of an encoder without modulation; 0 and 0: it is modulated.
        heads: depths of encoder blocks that also predict x, by a final layer each, on SiLU(time + tokens).

    Hidden taps are of the grid alone, and so are attention taps, (N, h, T, T).

    Raises:
        UserError: sizes that do not fit together.
    """

    pos_embed: Tensor | None

    def __init__(
        self,
        *,
        latent_size: int | Sequence[int],
        latent_channels: int = 4,
        patch_size: int = 2,
        hidden_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        head_depth: int,
        head_dim: int = 0,
        head_heads: int = 0,
        mlp_ratio: float = 4.0,
        norm: Literal["layer", "rms"] = "rms",
        mlp: Literal["gelu", "swiglu"] = "swiglu",
        qk_norm: Literal["none", "layer", "rms"] = "none",
        bias: bool = True,
        rotary: bool = True,
        final_norm: str | None = None,
        positions: bool = False,
        extent: float = 0.0,
        times: Literal["sinusoid", "fourier"] = "sinusoid",
        max_period: float = 10_000.0,
        silu_twice: bool = False,
        time_tokens: int = 0,
        class_tokens: int = 0,
        heads: Sequence[int] = (),
    ):
        super().__init__()
        head_dim, head_heads = head_dim or hidden_dim, head_heads or num_heads
        self.take_sizes(latent_size, latent_channels, patch_size, hidden_dim, depth, num_heads)
        check_dimensions(head_dim, depth, head_heads, patch_size, 0)
        self.encoder_depth = depth - head_depth
        if not 0 < head_depth < depth:
            raise UserError(
                f"The head must be some of the {depth} blocks, but head_depth is {head_depth}: choose fewer."
            )
        if outside := [head for head in heads if not 1 <= head <= self.encoder_depth]:
            raise UserError(
                f"heads names block {outside[0]}, but the encoder has blocks 1 to {self.encoder_depth}: choose one of them."
            )
        if times not in ("sinusoid", "fourier"):
            raise UserError(f"Unknown embedding of the time {times!r}{choices(times, ('sinusoid', 'fourier'))}")
        self.head_dim, self.num_classes, self.null_label = head_dim, num_classes, num_classes
        self.silu_twice, self.front = silu_twice, time_tokens + class_tokens
        options, final_norm = BlockOptions(norm, mlp, qk_norm, bias), final_norm or norm
        patch_features = patch_size**2 * latent_channels

        # A buffer and no parameter: the positions are fixed, but checkpoints of the papers hold them.
        self.register_buffer("pos_embed", sincos_positions(hidden_dim, self.grid) if positions else None)  # (1, T, D)
        self.rotation = Rotation(hidden_dim // num_heads, self.grid, extent) if rotary else None
        self.head_rotation = Rotation(head_dim // head_heads, self.grid, extent) if rotary else None
        self.t_embedder = (
            FourierTimes(hidden_dim) if times == "fourier" else TimestepEmbedding(hidden_dim, max_period=max_period)
        )
        self.y_embedder = LabelEmbedding(num_classes, hidden_dim)
        self.time_tokens = nn.Parameter(torch.zeros(1, time_tokens, hidden_dim)) if time_tokens else None
        self.class_tokens = nn.Parameter(torch.zeros(1, class_tokens, hidden_dim)) if class_tokens else None
        self.s_embedder = PatchEmbedding(latent_channels, hidden_dim, patch_size)
        self.x_embedder = PatchEmbedding(latent_channels, head_dim, patch_size)
        self.s_projector = nn.Linear(hidden_dim, head_dim) if head_dim != hidden_dim else nn.Identity()
        # RAEv2 gives time and class to the encoder as tokens; it then has no adaLN, which would give them twice.
        modulated = not self.front
        encoder = [Block(hidden_dim, num_heads, mlp_ratio, options, modulated) for _ in range(self.encoder_depth)]
        head = [Block(head_dim, head_heads, mlp_ratio, options) for _ in range(head_depth)]
        self.blocks = nn.ModuleList(encoder + head)
        self.final_layer = FinalLayer(head_dim, patch_features, final_norm)
        self.heads = nn.ModuleDict(
            {str(tap): FinalLayer(hidden_dim, patch_features, final_norm) for tap in sorted(heads)}
        )
        self.initialise()

    def initialise(self) -> None:
        """As DiT: blocks start as the identity and every prediction as zero (adaLN-Zero)."""
        xavier_linears(self)
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
        tokens = _wide(self.s_embedder(state["x"]))  # (N, T, D)
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
        modulation = self._modulation(self.s_projector(encoded.guide))  # (N, T, E)
        tokens = _wide(self.x_embedder(state["x"]))  # (N, T, E)
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


def _wide(tokens: Tensor) -> Tensor:
    """The residual stream stays in float32 under autocast; in DiT the positions see to that."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def ddt(
    config: ModelConfig,
    *,
    head_depth: int,
    head_dim: int = 0,
    head_heads: int = 0,
    final_norm: str = "",
    positions: bool = False,
    extent: float = 0.0,
    times: Literal["sinusoid", "fourier"] = "sinusoid",
    max_period: float = 10_000.0,
    silu_twice: bool = False,
    time_tokens: int = 0,
    class_tokens: int = 0,
) -> DDT:
    """The backbone `ddt` with the sizes, layers and heads of the configuration.

    DDT: head_depth=6,final_norm=layer,extent=16,max_period=10 with norm rms, mlp swiglu, qk_norm rms, bias false, rotary.
    RAE: head_depth=2,head_dim=2048,head_heads=16,positions=true,times=fourier,silu_twice=true with norm rms, mlp swiglu, rotary.
    """
    config.require_plain(allowed=("heads", *BlockOptions._fields, "rotary"))
    return DDT(
        **config.sizes(), **config.given("num_classes", *BlockOptions._fields, "rotary", "heads"),
        head_depth=head_depth, head_dim=head_dim, head_heads=head_heads, final_norm=final_norm or None, positions=positions,
        extent=extent, times=times, max_period=max_period, silu_twice=silu_twice, time_tokens=time_tokens,
        class_tokens=class_tokens,
    )  # fmt: skip
