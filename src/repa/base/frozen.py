"""Frozen networks: the common base of vision encoders, text encoders and autoencoders, and loading one from a spec."""

from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import nn

from repa.base.errors import UserError
from repa.base.registry import Registry, parse_spec


class Frozen(nn.Module):
    """A module that is always in eval mode: a target must not change when the model around it trains."""

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def round_weights(self, dtype: torch.dtype) -> None:
        """Store the weights of linear layers and convolutions in `dtype`, for use under an autocast to it.

        Autocast would round them in every forward pass: results are bit-identical with half the memory (T5-XXL has 19 GB
        in float32). Norms and positions keep float32, in which they compute under autocast.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)


Kind = TypeVar("Kind", bound=Frozen)


def load_frozen(
    registry: Registry, kind: type[Kind], spec: str, weights: str | Path | None, device: str | torch.device
) -> Kind:
    """The network of a spec, in eval mode and without gradients; a spec names a `kind`, or a function (name, weights)
    -> `kind`.

    Raises:
        UserError: unknown name, unused weights, weights that are not finite, or a function that returns something else.
    """
    made = registry.build(spec)
    if not isinstance(made, kind):
        made = made(parse_spec(spec)[0], weights)
    elif weights is not None:
        raise UserError(f"The {registry.kind} {spec!r} needs no weights, but got {weights}: leave them out.")
    made = registry.instance(spec, made, kind).to(device).requires_grad_(False).eval()
    # A sum is the cheapest test: it reads every number once and stores none.
    if spoilt := next((name for name, p in made.named_parameters() if not p.sum(dtype=torch.float32).isfinite()), None):
        raise UserError(
            f"The weights of the {registry.kind} {spec!r} have numbers that are not finite, in {spoilt}: download or copy them again."
        )
    return made


def given_weights(weights: str | Path | None, what: str) -> Path | None:
    """The path that a user gave; UserError if it does not exist."""
    # A shell does not expand the ~ of ENCODER=~/folder.
    path = Path(weights).expanduser() if weights else None
    if path is not None and not path.exists():
        raise UserError(f"weights={path} for the {what} does not exist: give an existing file or folder.")
    return path
