"""What samplers integrate is one tensor; what networks take may have several parts, such as latents and a class vector."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from repa.base.errors import UserError


class Layout:
    """How the parts of a state lie in one tensor.

    Args:
        shapes: of each part without N, as `Backbone.state_shapes`: {"x": (C, H, W)}, or with vectors {"x": ..., "class": (F,)}.

    Attributes:
        shape: of the one tensor, without N: that of the part where there is one, else (C H W + F,).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        if not shapes:
            raise UserError("A layout needs at least one part.")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.shape = next(iter(self.shapes.values())) if len(sizes) == 1 else (sum(sizes),)
        self._sizes = sizes

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Parts (N, *shape) as one tensor (N, *self.shape), in the order of the shapes."""
        for name, shape in self.shapes.items():
            if name not in parts or tuple(parts[name].shape[1:]) != shape:
                found = tuple(parts[name].shape) if name in parts else "nothing"
                raise UserError(
                    f"The part {name!r} of a state has shape (N, {', '.join(map(str, shape))}), but got {found}."
                )
        # Latents alone keep their shape, so that samplers and callbacks see images and not flat vectors.
        if len(self.shapes) == 1:
            return parts[next(iter(self.shapes))]
        return torch.cat([parts[name].flatten(1) for name in self.shapes], dim=1)

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts (N, *shape) of one tensor (N, *self.shape); views where that is possible."""
        if tuple(flat.shape[1:]) != self.shape:
            raise UserError(
                f"A state of {', '.join(self.shapes)} has shape (N, {', '.join(map(str, self.shape))}), but got {tuple(flat.shape)}."
            )
        if len(self.shapes) == 1:
            return {next(iter(self.shapes)): flat}
        pieces = flat.split(self._sizes, dim=1)
        return {
            name: piece.unflatten(1, shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
