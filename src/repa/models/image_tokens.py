"""The tokens of the image among what a block of any network gave, and their grid."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from repa.base.errors import UserError
from repa.models.taps import Grid, Pass


class Tokens(NamedTuple):
    """Those of the image, and how they lie."""

    tokens: Tensor
    """(N, T, D), row-major."""
    grid: Grid | None
    """Of the T tokens; None where they come packed and nobody gave a grid."""


def image_grid(image: tuple[int, ...] | None, patch: Grid | None, num_tokens: int) -> Grid | None:
    """The grid of the image among `num_tokens` tokens, for an input (N, C, H, W) or (N, C, F, H, W); None where it is unknown.

    The network's patches tell it, when it has so many; else the one patch that gives exactly this number.
    """
    if image is None or len(image) not in (4, 5):
        return None
    size = image[2:]
    if patch is not None:
        # A patch of two numbers in a video covers one frame: the frames are not cut.
        steps = (*(1,) * (len(size) - len(patch)), *patch)[-len(size) :]
        grid = tuple(length // step for length, step in zip(size, steps, strict=True))
        if math.prod(grid) <= num_tokens:
            return grid
    # Without a patch size, a grid is accepted only if it divides the image exactly; the smallest patch with
    # this number of tokens is the only one, as the number falls with the patch.
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
    """The image's tokens among what a block gave.

    A block gives tokens (N, T, D), a map (N, D, H, W) or (N, D, F, H, W), or several of them in a tuple or a dict: then those of
    the image have as many tokens as the image, or the shape of the block's first argument.

    Args:
        seen: of the block.
        image: shape of the network's input; packed tokens (N, T, C) tell their number.
        patch: see `image_grid`.
        where: names the block in messages.
        grid: overrules what the input tells.
        output: which of several.
        text: further tokens stand in "front" of those of the image, or "behind".

    Raises:
        UserError: there is no tensor of such a shape, or it is not clear which.
    """
    options = _tensors(seen.output)
    if output is not None:
        if output not in options:
            raise UserError(f"Block {where} has no output {output!r}: it gives {_described(options)}.")
        options = {output: options[output]}
    if not options:
        raise UserError(f"Block {where} gives no tokens (N, T, D) and no map (N, D, H, W): name another block.")
    if len(options) > 1:
        options = _of_image(options, seen, image, patch, grid)
    if len(options) != 1:
        raise UserError(
            f"Block {where} gives {_described(_tensors(seen.output))}: say which are of the image with output=0 or output=1."
        )
    (tensor,) = options.values()
    if tensor.ndim > 3:
        found = tuple(tensor.shape[2:])
        if grid is not None and grid != found:
            raise UserError(
                f"Block {where} gives a map of {_grid_text(found)}, but grid= says {_grid_text(grid)}: give the grid of the map."
            )
        return Tokens(tensor.flatten(2).transpose(1, 2), found)
    number = tensor.shape[1]
    own = grid or image_grid(image, patch, number)
    # Where nothing tells how many are the image's, all are.
    wanted = math.prod(own) if own else _packed(image) or number
    if wanted > number:
        raise UserError(
            f"Block {where} gives {number} tokens, which are fewer than the {_grid_text(own) if own else wanted} of the image: name "
            "another block, or give the grid."
        )
    if wanted < number:
        tensor = tensor[:, number - wanted :] if text == "front" else tensor[:, :wanted]
    return Tokens(tensor, own)


def _packed(image: tuple[int, ...] | None) -> int | None:
    """How many tokens are the image's, of an input (N, T, C) that is packed already: as many as went in."""
    return image[1] if image is not None and len(image) == 3 else None


def _of_image(options: dict, seen: Pass, image: tuple[int, ...] | None, patch: Grid | None, grid: Grid | None) -> dict:
    """The tensors among several that can be the image's; one, where that is clear."""

    def number(tensor: Tensor) -> int:
        return math.prod(tensor.shape[2:]) if tensor.ndim > 3 else tensor.shape[1]

    def wanted(tensor: Tensor) -> int | None:
        own = grid or image_grid(image, patch, number(tensor))
        return math.prod(own) if own else _packed(image)

    # By their number first. A text may have as many tokens as the image: then the shape that the block was given decides.
    fitting = {key: tensor for key, tensor in options.items() if number(tensor) == wanted(tensor)}
    if len(fitting) == 1:
        return fitting
    return {key: tensor for key, tensor in (fitting or options).items() if tuple(tensor.shape) == seen.shape}


def _tensors(value: Any) -> dict[int | str, Tensor]:
    """The tensors of tokens or maps among what a block gave, by place or name."""
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
