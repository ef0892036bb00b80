"""Networks that are used and never trained: what vision encoders, text encoders and autoencoders share, and how a spec becomes one."""

from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import nn

from repa.base.errors import UserError
from repa.base.registry import Registry, parse_spec


class Frozen(nn.Module):
    """Always in eval mode: a target must not change when the model around it starts to train."""

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def round_weights(self, dtype: torch.dtype) -> None:
        """Keep the weights of products (linear, convolution) in `dtype`, for use under an autocast to it.

        Autocast would round them so in every forward: the result is the same bit for bit, the memory is half. T5-XXL is 19 GB in
        float32. Norms and positions stay as they are: they compute in float32 under autocast, and rounded they would differ.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)


Kind = TypeVar("Kind", bound=Frozen)


def load_frozen(
    registry: Registry, kind: type[Kind], spec: str, weights: str | Path | None, device: str | torch.device
) -> Kind:
    """What a spec names, in eval mode and without gradients: an instance of `kind`, or of a function (name, weights) -> `kind`.

    Raises:
        UserError: an unknown name, weights that are not taken, or a function that gives something else.
    """
    made = registry.build(spec)
    if not isinstance(made, kind):
        made = made(parse_spec(spec)[0], weights)
    elif weights is not None:
        raise UserError(f"The {registry.kind} {spec!r} takes no weights, but got {weights}: leave them out.")
    if not isinstance(made, kind):
        room = kind.__module__.rpartition(".")[0]
        raise UserError(
            f"The {registry.kind} {spec!r} must be a {room}.{kind.__name__}, but {type(made).__name__} came back: return one from it."
        )
    return made.to(device).requires_grad_(False).eval()


def given_weights(weights: str | Path | None, what: str) -> Path | None:
    """The path that a user gave, checked; UserError where there is nothing."""
    # A shell does not expand the ~ of ENCODER=~/folder.
    path = Path(weights).expanduser() if weights else None
    if path is not None and not path.exists():
        raise UserError(f"weights={path} for the {what} does not exist: give a file or folder that does.")
    return path
