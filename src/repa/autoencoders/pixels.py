"""No autoencoder: models that work on the pixels themselves."""

from pathlib import Path

import torch
from torch import Tensor

from repa.autoencoders.contract import Autoencoder
from repa.base.errors import UserError


class Pixels(Autoencoder):
    """The identity on images in [-1, 1]; every grey level survives the round trip."""

    stochastic = False
    stores_moments = False

    def __init__(self, name: str):
        super().__init__(name, channels=3, factor=1, scale=1.0, shift=0.0, space="pixels")

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)

    def images(self, z: Tensor) -> Tensor:
        return z


def pixels(weights: str | Path | None) -> Pixels:
    """No autoencoder: the network learns the pixels themselves."""
    if weights is not None:
        raise UserError(f"The autoencoder 'pixels' has no weights, but got {weights}: leave them out.")
    return Pixels("pixels")
