"""Inputs of an aligner call: features of its terms, token grids, video frames, times."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from repa.base.errors import UserError, nearest
from repa.encoders.contract import Features
from repa.models.taps import Grid

Given = Tensor | Features | Mapping[str, Tensor | Features] | None


def features_of(name: str, features: Given, part: Literal["patches", "attention"]) -> Tensor:
    """The features of the term `name` among the inputs of a call."""
    if isinstance(features, Mapping):
        if name not in features:
            raise UserError(
                f"No features for the term {name!r}: the call passed {', '.join(features) or 'none'}."
                f"{nearest(name, features)}"
            )
        features = features[name]
    if isinstance(features, Features):
        if part == "attention":
            if not features.attention or len(features.attention) != 1:
                raise UserError(
                    f"The term {name!r} needs the attention of exactly one block: call encoder(images, grid, attention=(9,))."
                )
            return next(iter(features.attention.values()))
        features = features.patches
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(
            f"The term {name!r} needs features (N, M, F), or (N, frames, M, F) for a video, but got {given}."
        )
    return features


def frames_as_images(
    block: str, student: Tensor, target: Tensor | None, grid: Grid | None
) -> tuple[Tensor, Tensor | None, int]:
    """Each frame of a video becomes an image: (N F, T, D), (N F, M, G) and F; 1 of images."""
    if target is not None and len(target) != len(student):
        raise UserError(
            f"The network saw {len(student)} samples, but got features of {len(target)}: pass the features of the same images."
        )
    if target is not None and target.ndim == 3 and grid is not None and len(grid) == 3 and grid[0] > 1:
        raise UserError(
            f"Block {block} outputs tokens of {grid[0]} frames, so its features must be (N, frames, M, F), but their shape is "
            f"{tuple(target.shape)}."
        )
    if grid is None or len(grid) < 3:
        if target is not None and target.ndim == 4:
            raise UserError(
                f"The features {tuple(target.shape)} are of a video, but block {block} outputs tokens of images: pass "
                "grid=(frames, rows, columns)."
            )
        return student, target, 1
    frames = grid[0]
    if target is not None and target.ndim == 3:
        target = target[:, None]
    # Video autoencoders merge frames, so features are averaged over the frames of each latent frame.
    if target is not None and target.shape[1] != frames:
        num, given, tokens, dim = target.shape
        flat = target.float().permute(0, 2, 3, 1).reshape(num, tokens * dim, given)
        merged = nn.functional.adaptive_avg_pool1d(flat, frames)
        target = merged.reshape(num, tokens, dim, frames).permute(0, 3, 1, 2)
    if target is not None:
        target = target.flatten(0, 1)
    return student.unflatten(1, (frames, -1)).flatten(0, 1), target, frames


def checked_grid(grid: tuple[int, ...]) -> Grid:
    """The grid; raises UserError if it is invalid."""
    grid = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,)
    if len(grid) not in (2, 3) or not all(type(side) is int and side > 0 for side in grid):
        raise UserError(f"A grid must be (rows, columns) or (frames, rows, columns), but got {grid!r}.")
    return grid
