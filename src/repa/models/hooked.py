"""Any network with a list of blocks as a backbone: hooks provide its taps, and their image tokens are found in the outputs."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repa.base.errors import UserError
from repa.base.registry import Registry
from repa.models.config import ModelConfig
from repa.models.contract import Backbone, Condition, Output, State, Tap, Times, TwoTimes
from repa.models.taps import Grid, Pass, find_blocks, width_of

NETS = Registry("network", {}, takes=("config",))  # only users' own networks, by dotted name


class Tokens(NamedTuple):
    """The image tokens, and their grid."""

    tokens: Tensor
    """(N, T, D), row-major."""
    grid: Grid | None
    """Grid of the T tokens; None if they are packed and no grid is given."""


def image_grid(image: tuple[int, ...] | None, patch: Grid | None, num_tokens: int) -> Grid | None:
    """The grid of the image among `num_tokens` tokens, for an input (N, C, H, W) or (N, C, F, H, W); None if unknown.

    The grid follows from the network's patch size if the number of tokens agrees, else from the only patch size that gives it.
    """
    if image is None or len(image) not in (4, 5):
        return None
    size = image[2:]
    if patch is not None:
        # For a video, a patch of two numbers covers one frame.
        steps = (*(1,) * (len(size) - len(patch)), *patch)[-len(size) :]
        grid = tuple(length // step for length, step in zip(size, steps, strict=True))
        if math.prod(grid) <= num_tokens:
            return grid
    # Without a patch size, a grid must divide the image exactly. At most one patch size has this number of tokens, because
    # the number decreases with the size.
    for step in range(1, min(size[-2:]) + 1):
        rows, columns = size[-2] // step, size[-1] // step
        if math.prod(size[:-2]) * rows * columns == num_tokens and not (size[-2] % step or size[-1] % step):
            return (*size[:-2], rows, columns)
    return None


def image_tokens(
    seen: Pass,
    image: tuple[int, ...] | None,
    patch: Grid | None,
    *,
    where: str,
    grid: Grid | None = None,
    output: int | str | None = None,
    text: str = "front",
) -> Tokens:
    """The image tokens in a block's output.

    A block returns tokens (N, T, D), a map (N, D, H, W) or (N, D, F, H, W), or several of these in a tuple or a dict. In the
    latter case the image's have the image's number of tokens, or the shape of the block's first argument.

    Args:
        seen: input and output of the block.
        image: shape of the network's input; packed tokens (N, T, C) determine the number of tokens.
        patch: see `image_grid`.
        where: name of the block in messages.
        grid: overrides the grid of the input.
        output: the index or key of the output.
        text: other tokens are in "front" of the image tokens or "behind" them.

    Raises:
        UserError: no output of such a shape, or more than one.
    """
    options = _tensors(seen.output)
    if output is not None:
        if output not in options:
            raise UserError(f"Block {where} has no output {output!r}: choose one of {_described(options)}.")
        options = {output: options[output]}
    if not options:
        raise UserError(f"Block {where} returns no tokens (N, T, D) and no map (N, D, H, W): choose another block.")
    if len(options) > 1:
        options = _of_image(options, seen, image, patch, grid)
    if len(options) != 1:
        raise UserError(
            f"Block {where} returns {_described(_tensors(seen.output))}: choose the image's with output=0 or output=1."
        )
    (tensor,) = options.values()
    if tensor.ndim > 3:
        shape = tuple(tensor.shape[2:])
        if grid is not None and grid != shape:
            raise UserError(
                f"Block {where} returns a map of {_grid_text(shape)}, but the grid is {_grid_text(grid)}: give grid={shape}, or for the "
                "backbone hooked --model.patch-size, the side of a token in latent pixels."
            )
        return Tokens(tensor.flatten(2).transpose(1, 2), shape)
    number = tensor.shape[1]
    own = grid or image_grid(image, patch, number)
    # If the number of image tokens is unknown, all tokens are the image's.
    wanted = math.prod(own) if own else _packed(image) or number
    if wanted > number:
        raise UserError(
            f"Block {where} returns {number} tokens, fewer than the {_grid_text(own) if own else wanted} of the image: choose "
            "another block, or give the grid."
        )
    if wanted < number:
        tensor = tensor[:, number - wanted :] if text == "front" else tensor[:, :wanted]
    return Tokens(tensor, own)


def _packed(image: tuple[int, ...] | None) -> int | None:
    """The number of image tokens for a packed input (N, T, C)."""
    return image[1] if image is not None and len(image) == 3 else None


def _of_image(options: dict, seen: Pass, image: tuple[int, ...] | None, patch: Grid | None, grid: Grid | None) -> dict:
    """The outputs that can be the image's; one if it is unambiguous."""

    def number(tensor: Tensor) -> int:
        return math.prod(tensor.shape[2:]) if tensor.ndim > 3 else tensor.shape[1]

    def wanted(tensor: Tensor) -> int | None:
        own = grid or image_grid(image, patch, number(tensor))
        return math.prod(own) if own else _packed(image)

    # By number of tokens first. A text may have the same number; then the shape of the block's input decides.
    fitting = {key: tensor for key, tensor in options.items() if number(tensor) == wanted(tensor)}
    if len(fitting) == 1:
        return fitting
    return {key: tensor for key, tensor in (fitting or options).items() if tuple(tensor.shape) == seen.shape}


def _tensors(value: Any) -> dict[int | str, Tensor]:
    """The tensors of tokens or maps in a block's output, by index or key."""
    if isinstance(value, Tensor):
        items: Iterable = [(0, value)]
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    else:
        items = []
    return {k: v for k, v in items if isinstance(v, Tensor) and v.is_floating_point() and 3 <= v.ndim <= 5}


def _described(options: dict[int | str, Tensor]) -> str:
    return ", ".join(f"{key}: {tuple(tensor.shape)}" for key, tensor in options.items()) or "no tensor"


def _grid_text(grid: Grid) -> str:
    return " x ".join(map(str, grid))


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
        tokens = image_tokens(Pass(output, None), None, None, where=str(tap), grid=self.grid, output=0).tokens
        if tokens.shape[2] != self.hidden_dim:
            raise UserError(
                f"Block {tap} has tokens of width {tokens.shape[2]}, not {self.hidden_dim}: correct hidden_dim, or tap another block."
            )
        return tokens


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
    named = find_blocks(made, blocks)
    width = hidden_dim or width_of(made, named[0])
    if not width:
        raise UserError(f"The token width of {named[0].name} is unknown: add ,hidden_dim=... to {config.backbone!r}.")
    side = config.latent_size // config.dims().patch_size
    return Hooked(
        made,
        [block.module for block in named],
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
