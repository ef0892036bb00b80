"""Any network with a list of blocks as a backbone; hooks provide its taps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repa.base.errors import UserError
from repa.base.registry import Registry
from repa.models.config import ModelConfig
from repa.models.contract import Backbone, Condition, Output, State, Tap, Times, TwoTimes
from repa.models.image_tokens import image_tokens
from repa.models.taps import Pass, find_blocks, width_of

NETS = Registry("network", {}, takes="config")  # only users' own networks, by dotted name


class Hooked(Backbone):
    """`net`, called through `call`, with the outputs of its `blocks` as hidden taps.

    A block returns a tensor, or a tuple with a tensor first: tokens (N, P + T, D) with P tokens in front of the grid, which
    taps exclude, or a map (N, D, rows, columns). Attention taps and torch.compile are not supported: hooks would break the
    graph.

    Args:
        net: the network; its state dict has the prefix "net.".
        blocks: modules of `net`, in order; each runs once per forward pass.
        call: (net, state, t, condition) -> prediction of x, (N, C, H, W).
        hidden_dim: D.
        grid: (rows, columns) of the tokens.
        null_label: the label of the null class; smaller labels are the classes.
        state_shape: (C, H, W) of x.

    Raises:
        UserError: a block is not part of the network or is listed twice.
    """

    compiles = False

    def __init__(
        self,
        net: nn.Module,
        blocks: Sequence[nn.Module],
        call: Callable[[nn.Module, State, Tensor, Condition], Tensor],
        *,
        hidden_dim: int,
        grid: tuple[int, int],
        null_label: int,
        state_shape: tuple[int, int, int],
    ):
        super().__init__()
        # By identity; a block that is listed twice would record twice in a pass.
        parts = {id(module) for module in net.modules()}
        if not blocks or len({id(block) for block in blocks}) < len(blocks) or any(id(b) not in parts for b in blocks):
            raise UserError(
                "The blocks to hook must be different modules of the network: choose them among its modules."
            )
        self.net, self.blocks, self._call = net, list(blocks), call  # a list: the blocks are already in net
        self.hidden_dim, self.depth, self.grid, self.null_label = hidden_dim, len(blocks), grid, null_label
        self.num_classes = null_label  # 0 ... null_label - 1
        self.state_shapes = {"x": tuple(state_shape)}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        self.require_compiles()

    @property
    def checkpoint_activations(self) -> bool:
        """Always False: a block of another network may have random numbers or side effects, so it cannot run twice."""
        return False

    @checkpoint_activations.setter
    def checkpoint_activations(self, wanted: bool) -> None:
        if wanted:
            raise UserError("A hooked network does not support checkpoint_activations: turn it off.")

    def forward(
        self, state: State, t: Times, condition: Condition, taps: tuple[Tap, ...] = (), keep: Tensor | None = None
    ) -> Output:
        """Predict from the noised state; see `Backbone.forward`.

        Raises:
            UserError: other shapes, an attention tap, tokens to keep, torch.compile, or a tapped block that did not run.
        """
        # torch.compile(network) does not call the method `compile`, so this check is repeated here.
        if torch.compiler.is_compiling():
            self.require_compiles()
        self.check(state, taps)
        if keep is not None or any(tap.kind != "hidden" for tap in taps):
            raise UserError("A hooked network supports neither attention taps nor token routing: turn them off.")
        # Hooks are registered only for this pass, so that a copy of the network, such as its average, has none.
        given: dict[Tap, Any] = {}
        hooks = [self.blocks[tap.depth - 1].register_forward_hook(functools.partial(_keep, given, tap)) for tap in taps]
        try:
            times = t.of_tokens() if isinstance(t, TwoTimes) else t
            prediction = self._call(self.net, state, times, condition)
        finally:
            for hook in hooks:
                hook.remove()
        for tap in taps:
            if tap not in given:
                raise UserError(f"Block {tap} did not run, so it has no output: tap another block.")
        return Output({"x": prediction}, {tap: self._tokens(tap, given[tap]) for tap in taps}, {})

    def _tokens(self, tap: Tap, output: Any) -> Tensor:
        """(N, T, D) of a block's output: the first of several tensors, without the tokens in front of the grid."""
        found = image_tokens(Pass(output, None), None, None, where=str(tap), grid=self.grid, output=0).tokens
        if found.shape[2] != self.hidden_dim:
            raise UserError(
                f"Block {tap} has tokens of width {found.shape[2]}, not {self.hidden_dim}: correct hidden_dim, or tap another block."
            )
        return found


def hooked(config: ModelConfig, *, net: str, blocks: str, hidden_dim: int = 0) -> Hooked:
    """The backbone `hooked`: your own network, with blocks selected by name.

    Args:
        config: configuration of the model; patch_size is the side of a token in latent pixels.
        net: dotted name of a function (config) -> nn.Module, called net(x (N, C, H, W), t (N,), labels (N,)) -> prediction
            (N, C, H, W), a tuple of it, or an object with it as `sample`. The last label is the null class.
        blocks: names of its blocks in order, as for `repa.attach`: "blocks.*".
        hidden_dim: channels of the blocks' outputs; 0: from the network.

    Raises:
        UserError: no such blocks, or a width that cannot be determined.
    """
    config.refuse_dit_options()
    made = NETS.instance(net, NETS.load(net)(config), nn.Module)
    found = find_blocks(made, blocks)
    width = hidden_dim or width_of(made, found[0])
    if not width:
        raise UserError(f"The token width of {found[0].name} is unknown: add ,hidden_dim=... to {config.backbone!r}.")
    side = config.latent_size // config.dims().patch_size
    return Hooked(
        made,
        [block.module for block in found],
        _predict,
        hidden_dim=width,
        grid=(side, side),
        null_label=config.num_classes,
        state_shape=(config.latent_channels, config.latent_size, config.latent_size),
    )


def _predict(net: nn.Module, state: State, t: Tensor, condition: Condition) -> Tensor:
    output = net(state["x"], t, condition.labels)
    output = getattr(output, "sample", output)
    return output[0] if isinstance(output, tuple) else output


def _keep(given: dict[Tap, Any], tap: Tap, block: nn.Module, inputs: tuple, output: Any) -> None:
    """A hook."""
    given[tap] = output
