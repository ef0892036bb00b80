"""Trainable maps from the transformer's width D to the encoder's width F: (N, T, D) -> (N, T, F).

They are trained with the model and have no use afterwards. An impossible setting raises UserError.
"""

from collections.abc import Callable
from typing import Annotated, TypeVar

import torch.nn as nn
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from repa.base.errors import UserError
from repa.models.jit import MaskedAdapter
from repa.models.layers import TokenConvolution, xavier_layers

Module = TypeVar("Module", bound=nn.Module)
Grid = tuple[int, int] | None  # (rows, columns) of the tokens; None: a square


def sees_condition(projector: Callable) -> Callable:
    """Declare that a projector needs time and condition. A private projector sets `projector.sees_condition = True`.

    It is built as f(hidden_dim, feature_dim, grid, num_classes, **settings), and its module is called with (hidden, t, condition,
    visible). If the module has an attribute `masked`, visible (N, T) bool is sampled in training, False for that share of
    the tokens; otherwise it is None.
    """
    projector.sees_condition = True  # type: ignore[attr-defined]  # a function may have any
    return projector


def mlp(hidden_dim: int, feature_dim: int, grid: Grid = None, *, width: PositiveInt = 2048) -> nn.Sequential:
    """The paper's projector: three linear layers with SiLU between.

    Its state-dict keys (0, 2, 4) are those of the published checkpoints.
    """
    layers = nn.Sequential(
        nn.Linear(hidden_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, feature_dim)
    )
    return _initialise(layers)


def mlp2(hidden_dim: int, feature_dim: int, grid: Grid = None, *, ratio: PositiveFloat = 2) -> nn.Sequential:
    """SRA's projector (arXiv 2505.02831): two linear layers with SiLU between, `ratio` times as wide as the tap."""
    width = max(1, int(ratio * hidden_dim))
    return _initialise(nn.Sequential(nn.Linear(hidden_dim, width), nn.SiLU(), nn.Linear(width, feature_dim)))


def linear(hidden_dim: int, feature_dim: int, grid: Grid = None) -> nn.Linear:
    """One linear layer."""
    return _initialise(nn.Linear(hidden_dim, feature_dim))


def none(hidden_dim: int, feature_dim: int, grid: Grid = None) -> nn.Identity:
    """No projector, for targets as wide as the tap (another block) and losses without one."""
    if feature_dim != hidden_dim:
        raise UserError(
            f"The projector 'none' needs a target as wide as the tap, but the tap has {hidden_dim} channels and the target "
            f"{feature_dim}: use linear or mlp."
        )
    return nn.Identity()


def conv(hidden_dim: int, feature_dim: int, grid: Grid = None, *, kernel: PositiveInt = 3) -> nn.Module:
    """iREPA's projector (arXiv 2512.10794): one convolution over the token grid, which keeps the grid's size."""
    if kernel % 2 == 0:
        raise UserError(
            f"The projector 'conv' needs an odd kernel size, which keeps the grid, but got {kernel}: use 3 or 5."
        )
    return _initialise(TokenConvolution(hidden_dim, feature_dim, kernel, grid))


@sees_condition
def adapter(
    hidden_dim: int,
    feature_dim: int,
    grid: Grid,
    num_classes: int,
    *,
    masked: Annotated[float, Field(ge=0, lt=1)] = 0.2,
    depth: PositiveInt = 2,
    heads: NonNegativeInt = 0,
    class_tokens: PositiveInt = 32,
) -> nn.Module:
    """PixelREPA's projector (arXiv 2603.14366): some tokens masked, then blocks of JiT with the condition of the network.

    Args:
        masked: share of the tokens that are masked in training.
        depth: blocks.
        heads: number of attention heads; 0: as many as have a width of 64.
        class_tokens: copies of the class in front of the grid.
    """
    heads = heads or max(1, hidden_dim // 64)
    if hidden_dim % (4 * heads):
        raise UserError(
            f"The projector 'adapter' needs a head width that is a multiple of 4, but {hidden_dim} channels with {heads!r} heads "
            "do not give one: choose another heads=."
        )
    if grid is None:
        raise UserError("The projector 'adapter' needs the grid of the tokens: pass Alignment grid=(rows, columns).")
    return MaskedAdapter(
        hidden_dim, feature_dim, grid, num_classes=num_classes, num_heads=heads, depth=depth, class_tokens=class_tokens,
        masked=masked,
    )  # fmt: skip


def _initialise(module: Module) -> Module:
    """Xavier-uniform weights and zero biases, as for every linear layer of the transformer."""
    xavier_layers(module, nn.Linear, nn.Conv2d)
    return module
