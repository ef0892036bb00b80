"""The image tokens in a block's output, for any network, and their grid."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from repa.base.errors import UserError
from repa.models.taps import Grid, Pass


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
        found = tuple(tensor.shape[2:])
        if grid is not None and grid != found:
            raise UserError(
                f"Block {where} returns a map of {_grid_text(found)}, but the grid is {_grid_text(grid)}: give grid={found}, or for the "
                "backbone hooked --model.patch-size, the side of a token in latent pixels."
            )
        return Tokens(tensor.flatten(2).transpose(1, 2), found)
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
