"""What every network that repa trains looks like from outside: state, time and condition in; predictions and taps out.

N batch, C channels, T tokens of the grid, D width, h attention heads, S text tokens, E width of text tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repa.base.errors import UserError
from repa.models.config import Route, check_dimensions

State = dict[str, Tensor]  # what is noised: "x" (N, C, H, W), and a stream by its name, (N, F)


class Tap(NamedTuple):
    """A place in the network that a term reads; hashable, and fixed before torch.compile."""

    depth: int  # block, counted from 1
    kind: Literal["hidden", "attention"] = "hidden"

    def __str__(self) -> str:
        return f"{self.depth}" if self.kind == "hidden" else f"{self.depth}.{self.kind}"


class Condition(NamedTuple):
    """What a sample is conditioned on. First axis N everywhere; a pytree, so that it passes through torch.compile."""

    labels: Tensor  # (N,) int64
    text: Tensor | None = None  # (N, S, E)
    text_mask: Tensor | None = None  # (N, S) bool, True where there is a token

    def where(self, keep: Tensor, other: "Condition") -> "Condition":
        """This condition where `keep` (N,) is true, `other` elsewhere."""
        # By torch.where and not by indexing, whose result has a size that the host would have to wait for.
        return self._with(other, lambda own, others: torch.where(keep.reshape(-1, *[1] * (own.ndim - 1)), own, others))

    def cat(self, other: "Condition") -> "Condition":
        """Both, one behind the other along the batch: (2N, ...)."""
        return self._with(other, lambda own, others: torch.cat([own, others]))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """The same of every part."""
        return Condition._make(None if part is None else function(part) for part in self)

    def _with(self, other: "Condition", function: Callable[[Tensor, Tensor], Tensor]) -> "Condition":
        def both(own: Tensor | None, others: Tensor | None) -> Tensor | None:
            if own is None:
                return None
            assert others is not None  # two conditions of one network have the same parts
            return function(own, others)

        return Condition._make(map(both, self, other))


class TwoTimes(NamedTuple):
    """Two times an image, and which of them each of its tokens has: a modulation is computed twice an image, not for each token."""

    values: Tensor  # (N, 2)
    second: Tensor  # (N, T) bool: has the second time

    @property
    def ndim(self) -> int:
        """As of the times (N, T) that they stand for."""
        return 2

    def of_tokens(self) -> Tensor:
        """(N, T)."""
        return torch.where(self.second, self.values[:, 1:], self.values[:, :1])


Times = Tensor | TwoTimes  # (N,), (N, T), or two an image


class Output(NamedTuple):
    """What one pass of a network gives."""

    prediction: State  # keyed as the state; "x" is (N, 2C, H, W) where the network also answers a variance
    taps: dict[Tap, Tensor]  # hidden: residual stream after the block (N, T, D); attention: logits (N, h, T, T)
    heads: dict[int, Tensor]  # depth -> prediction of x from that block (N, C, H, W)
    kept: Tensor | None = None  # (N, K) ids of the tokens in the taps of the route's blocks; None: all T


class Backbone(nn.Module, ABC):
    """A network that alignment, objectives, samplers and the training loop can use.

    A backbone is a function of its arguments: it drops no labels and draws no random numbers, so that train() and eval()
    agree. Tokens of streams, classes or text that it puts in front of the grid never reach a tap of kind "hidden" unless
    `prefix_tokens` says so.

    Attributes:
        hidden_dim: width D of the taps.
        depth: number of blocks.
        num_classes: labels 0 ... num_classes - 1 are classes.
        null_label: the label that means "none".
        grid: (rows, columns) of image tokens; T is their product.
        state_shapes: name -> shape of one sample, "x": (C, H, W) first.
        blocks: the repeated blocks in order: what FSDP shards, compile compiles and checkpointing recomputes.
        prefix_tokens: tokens in front of the grid that hidden taps include (REG aligns its class token too).
        compiles: can torch.compile take it in one graph?
        checkpoint_activations: keep only what goes into each block, and compute the block again in the backward pass: less
            memory for about a third more work, and the same gradients. Off until it is set.
        route: the blocks that see a share of the tokens in training; None: all see all.
    """

    hidden_dim: int
    depth: int
    num_classes: int
    null_label: int
    grid: tuple[int, int]
    state_shapes: Mapping[str, tuple[int, ...]]
    blocks: nn.ModuleList | Sequence[nn.Module]
    prefix_tokens: int = 0
    compiles: bool = True
    checkpoint_activations: bool = False
    route: Route | None = None

    @abstractmethod
    def forward(
        self, state: State, t: Times, condition: Condition, taps: tuple[Tap, ...] = (), keep: Tensor | None = None
    ) -> Output:
        """Predict from the noised state.

        Args:
            state: keyed and shaped as `state_shapes`, with N in front.
            t: (N,); where tokens of an image have different times TwoTimes, or (N, T) for more of them. Passed on as they are.
            condition: of N samples.
            taps: the places to return.
            keep: (N, K) ids of the tokens that the blocks of `route` see, where there is one; None: all.

        A network with a route takes one argument more, `path_dropped` (N,) bool: the images for which the result of these
        blocks is thrown away.
        """

    @property
    def tapped_depth(self) -> int:
        """Blocks 1 to this one can be tapped."""
        return self.depth

    def null(self, like: Condition) -> Condition:
        """The condition that means "none", shaped as `like`: the null class; a network that reads text adds the empty one."""
        return like._replace(labels=torch.full_like(like.labels, self.null_label))

    def matrices(self) -> list[nn.Parameter]:
        """The weights that Muon takes, those of attention and MLP in the blocks: adaLN starts at zero as gates, and is none."""
        named = (pair for block in self.blocks for pair in block.named_parameters())
        return [p for name, p in named if p.ndim == 2 and "adaLN_modulation" not in name]

    def take_sizes(
        self,
        latent_size: int | Sequence[int],
        channels: int,
        patch_size: int,
        hidden_dim: int,
        depth: int,
        num_heads: int,
    ) -> None:
        """Those of a transformer on square patches; `latent_size` is a side, or (height, width).

        Raises:
            UserError: sizes that do not fit together.
        """
        height, width = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
        for side in (height, width):
            check_dimensions(hidden_dim, depth, num_heads, patch_size, side)
        self.latent_channels, self.patch_size, self.hidden_dim, self.depth = channels, patch_size, hidden_dim, depth
        self.grid, self.state_shapes = (height // patch_size, width // patch_size), {"x": (channels, height, width)}

    def run(
        self, depth: int, *arguments: Any, taps: tuple[Tap, ...], seen: dict[Tap, Tensor], front: int = 0
    ) -> list[Tensor]:
        """What block `depth` gives; what is tapped there is added to `seen`.

        It is called with `arguments` and whether its attention is tapped, and gives tokens, those of the image last, and then
        logits (N, h, S + T, S + T) or None. Of the S = `front` tokens in front of the grid, logits keep none and hidden taps
        the last `prefix_tokens`. Where `checkpoint_activations` is set, the block is computed again in the backward pass.
        """
        block, tapped = self.blocks[depth - 1], Tap(depth, "attention") in taps
        if self.checkpoint_activations and torch.is_grad_enabled():
            # A block draws no random numbers, so their state need not be saved. The non-reentrant form also
            # gives gradients where the input of the first block needs none.
            given = checkpoint(block, *arguments, tapped, use_reentrant=False, preserve_rng_state=False)
        else:
            given = block(*arguments, tapped)
        *tokens, logits = given
        if tapped:
            seen[Tap(depth, "attention")] = logits[:, :, front:, front:]
        if Tap(depth) in taps:
            cut = front - self.prefix_tokens
            # The tokens themselves where none is cut off: their gradients are then summed as those of a hook on the block.
            seen[Tap(depth)] = tokens[-1][:, cut:] if cut else tokens[-1]
        return tokens

    def completed(self, condition: Condition) -> Condition:
        """The condition with everything that the network reads: one that reads text adds the empty one where there is none."""
        return condition

    def take_empty_text(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Keep the encoded empty text (S, E), mask (S,), which then stands for "no text". Networks without text ignore it."""

    def compile_blocks(self) -> None:
        """Compile each block by itself, in place: one graph for all that are alike, made in seconds.

        Raises:
            UserError: the network cannot be compiled.
        """
        self.require_compiles()
        for block in self.blocks:
            # With a route the blocks see two numbers of tokens. Left to itself, torch would compile one graph for
            # any number after the first change, and that graph is slower than two fixed ones.
            block.compile(dynamic=False if self.route else None)

    def require_compiles(self) -> None:
        """Raises UserError unless torch.compile can take the network in one graph."""
        if not self.compiles:
            raise UserError(f"{type(self).__name__} cannot be compiled in one graph: turn compile off.")

    # Shapes alone, which the host knows: a check of values would wait for the device in every step.
    def check(self, state: State, taps: tuple[Tap, ...]) -> None:
        """Raises UserError unless the state has this network's shapes, and every tap is a block, counted from 1."""
        for name, shape in self.state_shapes.items():
            if name not in state or tuple(state[name].shape[1:]) != shape:
                wanted = ", ".join(map(str, shape))
                found = tuple(state[name].shape) if name in state else "nothing"
                raise UserError(f"This model takes {name!r} of shape (N, {wanted}), but got {found}.")
        for tap in taps:
            self.checked(tap)

    def one_time(self, t: Times, keep: Tensor | None) -> Tensor:
        """The times (N,) themselves; raises UserError where tokens have different times, or some are left out."""
        if keep is not None or isinstance(t, TwoTimes) or t.ndim != 1:
            raise UserError(
                f"{type(self).__name__} takes one time per sample and all tokens: leave token times and routing out."
            )
        return t

    def checked(self, tap: Tap) -> Tap:
        """The tap itself; raises UserError when there is no such block."""
        if not 1 <= tap.depth <= self.depth:
            raise UserError(f"There is no block {tap.depth} to tap: this model has blocks 1 to {self.depth}.")
        return tap
