"""The interface of all networks: state, time and condition in; predictions and taps out.

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

State = dict[str, Tensor]  # "x" (N, C, H, W), and streams by name, (N, F)


class Tap(NamedTuple):
    """A place in the network that an alignment term reads; hashable, and fixed before torch.compile."""

    depth: int  # block, counted from 1
    kind: Literal["hidden", "attention"] = "hidden"

    def __str__(self) -> str:
        return f"{self.depth}" if self.kind == "hidden" else f"{self.depth}.{self.kind}"


class Condition(NamedTuple):
    """The condition of N samples. The first axis is always N; a pytree, so that it works with torch.compile."""

    labels: Tensor  # (N,) int64
    text: Tensor | None = None  # (N, S, E)
    text_mask: Tensor | None = None  # (N, S) bool, True for tokens, False for padding

    def where(self, keep: Tensor, other: "Condition") -> "Condition":
        """This condition where `keep` (N,) is true, `other` elsewhere."""
        # torch.where instead of indexing, because the host would have to wait for the size of an indexed result.
        return self._with(other, lambda own, others: torch.where(keep.reshape(-1, *[1] * (own.ndim - 1)), own, others))

    def cat(self, other: "Condition") -> "Condition":
        """Both, concatenated along the batch: (2N, ...)."""
        return self._with(other, lambda own, others: torch.cat([own, others]))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """Apply a function to every part."""
        return Condition._make(None if part is None else function(part) for part in self)

    def _with(self, other: "Condition", function: Callable[[Tensor, Tensor], Tensor]) -> "Condition":
        def both(own: Tensor | None, others: Tensor | None) -> Tensor | None:
            if own is None:
                return None
            assert others is not None  # two conditions of one network have the same parts
            return function(own, others)

        return Condition._make(map(both, self, other))


class TwoTimes(NamedTuple):
    """Two times per image, and the choice for each token, so that modulations are computed twice per image and not per token."""

    values: Tensor  # (N, 2)
    second: Tensor  # (N, T) bool, True for tokens with the second time

    @property
    def ndim(self) -> int:
        """2, as for times (N, T)."""
        return 2

    def of_tokens(self) -> Tensor:
        """The time of each token, (N, T)."""
        return torch.where(self.second, self.values[:, 1:], self.values[:, :1])


Times = Tensor | TwoTimes  # (N,), (N, T), or two per image


class Output(NamedTuple):
    """The output of a forward pass."""

    prediction: State  # same keys as the state; "x" is (N, 2C, H, W) if the network also predicts a variance
    taps: dict[Tap, Tensor]  # hidden: residual stream after the block (N, T, D); attention: logits (N, h, T, T)
    heads: dict[int, Tensor]  # depth -> prediction of x from that block (N, C, H, W)
    kept: Tensor | None = None  # (N, K) indices of the tokens in the taps of routed blocks; None: all T


class Backbone(nn.Module, ABC):
    """The interface of networks for alignment, objectives, samplers and the training loop.

    A backbone is a function of its arguments: it drops no labels and uses no random numbers, so train() and eval() agree.
    Taps of kind "hidden" exclude the tokens of streams, classes or text in front of the grid, except the last
    `prefix_tokens`.

    Attributes:
        hidden_dim: width D of the taps.
        depth: number of blocks.
        num_classes: labels 0 ... num_classes - 1 are classes.
        null_label: the label of the null class.
        grid: (rows, columns) of image tokens; T is their product.
        state_shapes: name -> shape of one sample, "x": (C, H, W) first.
        blocks: the repeated blocks in order, the units of FSDP, compilation and activation checkpointing.
        prefix_tokens: number of tokens in front of the grid that hidden taps include (REG aligns its class token too).
        compiles: whether torch.compile supports it in one graph.
        checkpoint_activations: store only the input of each block and recompute the block in the backward pass: less
            memory, about a third more FLOPs, the same gradients. Off by default.
        route: token routing in training; None: no routing.
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
            state: tensors with the keys and shapes of `state_shapes`, preceded by N.
            t: (N,); for tokens with different times TwoTimes, or (N, T). Not scaled.
            condition: condition of N samples.
            taps: the taps to return.
            keep: (N, K) indices of the tokens in the blocks of `route`; None: all.

        A network with a route has another argument, `path_dropped` (N,) bool: the images for which the output of the routed
        blocks is discarded.
        """

    @property
    def tapped_depth(self) -> int:
        """The deepest block that can be tapped."""
        return self.depth

    def null(self, like: Condition) -> Condition:
        """The null condition with the shapes of `like`: the null class, and the empty text for a network that reads text."""
        return like._replace(labels=torch.full_like(like.labels, self.null_label))

    def matrices(self) -> list[nn.Parameter]:
        """The weights for Muon: those of attention and MLP in the blocks, without adaLN, which starts at zero and acts as gates."""
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
        """Set the sizes of a transformer with square patches; `latent_size` is a side, or (height, width).

        Raises:
            UserError: incompatible sizes.
        """
        height, width = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
        for side in (height, width):
            check_dimensions(hidden_dim, depth, num_heads, patch_size, side)
        self.latent_channels, self.patch_size, self.hidden_dim, self.depth = channels, patch_size, hidden_dim, depth
        self.grid, self.state_shapes = (height // patch_size, width // patch_size), {"x": (channels, height, width)}

    def run(
        self, depth: int, *arguments: Any, taps: tuple[Tap, ...], seen: dict[Tap, Tensor], front: int = 0
    ) -> list[Tensor]:
        """The output of block `depth`; its taps are added to `seen`.

        The block is called with `arguments` and whether its attention is tapped. It returns tokens, those of the image last,
        and then logits (N, h, S + T, S + T) or None. Of the S = `front` tokens in front of the grid, attention taps have none
        and hidden taps the last `prefix_tokens`. With `checkpoint_activations` the backward pass recomputes the block.
        """
        block, tapped = self.blocks[depth - 1], Tap(depth, "attention") in taps
        if self.checkpoint_activations and torch.is_grad_enabled():
            # Blocks use no random numbers, so the generator's state need not be saved. The non-reentrant form also
            # computes gradients if the input of the first block needs none.
            given = checkpoint(block, *arguments, tapped, use_reentrant=False, preserve_rng_state=False)
        else:
            given = block(*arguments, tapped)
        *tokens, logits = given
        if tapped:
            seen[Tap(depth, "attention")] = logits[:, :, front:, front:]
        if Tap(depth) in taps:
            cut = front - self.prefix_tokens
            # No slicing if nothing is cut off: the gradients are then summed in the same order as with a hook on the block.
            seen[Tap(depth)] = tokens[-1][:, cut:] if cut else tokens[-1]
        return tokens

    def completed(self, condition: Condition) -> Condition:
        """The condition with all parts that the network reads; a network that reads text adds the empty text if it is missing."""
        return condition

    def take_empty_text(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Store the encoded empty text (S, E) and its mask (S,) as null text. Networks without text ignore it."""

    def compile_blocks(self) -> None:
        """Compile each block separately, in place: equal blocks share one graph, which takes seconds.

        Raises:
            UserError: the network cannot be compiled.
        """
        self.require_compiles()
        for block in self.blocks:
            # With a route the blocks get two numbers of tokens. By default torch would compile one dynamic graph after the
            # first change, which is slower than two static ones.
            block.compile(dynamic=False if self.route else None)

    def require_compiles(self) -> None:
        """Raises UserError unless torch.compile supports the network in one graph."""
        if not self.compiles:
            raise UserError(f"{type(self).__name__} cannot be compiled in one graph: turn compile off.")

    # Only shapes, which the host knows: checking values would wait for the device in every step.
    def check(self, state: State, taps: tuple[Tap, ...]) -> None:
        """Raises UserError unless the state has this network's shapes and every tap is at an existing block."""
        if not isinstance(state, Mapping):
            given = type(state).__name__
            raise UserError(f"A network takes its state as a dictionary such as {{'x': latents}}, but got a {given}.")
        for name, shape in self.state_shapes.items():
            if name not in state or tuple(state[name].shape[1:]) != shape:
                wanted = ", ".join(map(str, shape))
                found = tuple(state[name].shape) if name in state else "nothing"
                raise UserError(f"This model needs {name!r} of shape (N, {wanted}), but got {found}.")
        for tap in taps:
            self.checked(tap)

    def one_time(self, t: Times, keep: Tensor | None) -> Tensor:
        """The times (N,) unchanged; raises UserError for token times or `keep`."""
        if keep is not None or isinstance(t, TwoTimes) or t.ndim != 1:
            raise UserError(f"{type(self).__name__} supports neither token times nor token routing: turn them off.")
        return t

    def checked(self, tap: Tap) -> Tap:
        """The tap unchanged; raises UserError if there is no such block."""
        if not 1 <= tap.depth <= self.depth:
            raise UserError(f"There is no block {tap.depth} to tap: choose one of 1 to {self.depth}.")
        return tap
