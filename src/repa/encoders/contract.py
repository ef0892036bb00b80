"""What every frozen vision encoder promises: uint8 images in, a row-major grid of tokens out."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repa.base import files
from repa.base.errors import UserError
from repa.base.frozen import Frozen


class Features(NamedTuple):
    """What an encoder sees in a batch of images."""

    patches: Tensor
    """(N, G*G, D) tokens, row-major (token i is row i // G, column i % G); never class or register tokens."""
    pooled: Tensor | None
    """(N, D), one vector for the whole image; None where the encoder has none."""
    attention: dict[int, Tensor] | None = None
    """Block, counted from 1 -> logits (N, h, G*G, G*G) of its attention between patches; those that were asked for."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """The same change to every tensor: rows, a device, a copy."""
        attention = self.attention and {layer: change(logits) for layer, logits in self.attention.items()}
        return Features(change(self.patches), None if self.pooled is None else change(self.pooled), attention)


class VisionEncoder(Frozen):
    """Always in eval mode, never with gradients. Families implement `extract`.

    Computes in the dtype of its weights (float32 as loaded) or of the caller's autocast; the features come in the dtype
    that this gives.

    Attributes:
        name: the name in the registry.
        dim: D, the width of patches and pooled.
        patch_size: pixels per token side after resizing; a grid of G wants images of side G * patch_size.
    """

    def __init__(
        self, net: nn.Module, *, name: str, dim: int, patch_size: int, preprocessing: str, weights_file: Path | None
    ):
        super().__init__()
        # Frozen here and not by the caller: a forgotten eval mode changes targets silently.
        self.net = net.requires_grad_(False).eval()
        self.name, self.dim, self.patch_size = name, dim, patch_size
        self.preprocessing, self.weights_file = preprocessing, weights_file
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, grid: int, attention: tuple[int, ...] = ()) -> Features:
        """Features of `images`, uint8 (N, 3, S, S) of any side S, on a grid of `grid` x `grid` tokens.

        `attention`: blocks, counted from 1, whose attention logits are wanted too.

        Raises:
            UserError: images of another type or shape, a grid below 1, attention of an encoder that shows none, or patches of
                another shape than the encoder promises.
        """
        check_images(images, self.name)
        if grid < 1:
            raise UserError(f"The encoder {self.name} was asked for a token grid of {grid}: it must be at least 1.")
        weights = next(self.net.parameters())
        # Images travel as uint8, a quarter of the bytes of float32, and become floats on the device.
        pixels = self.prepare(images.to(weights.device).float() / 255, grid * self.patch_size)
        # Prepared in float32 and rounded once: resizing in half precision would round every step of it.
        pixels = pixels.to(weights.dtype)
        features = self.extract_attention(pixels, grid, attention) if attention else self.extract(pixels, grid)
        wanted = (len(images), grid * grid, self.dim)
        given = tuple(features.patches.shape) if isinstance(features, Features) else type(features).__name__
        if given != wanted:
            raise UserError(
                f"The encoder {self.name} must give Features whose patches are (N, G * G, D) = {wanted}, but gave {given}: a token for "
                "each place of the grid, row by row, without class or register tokens."
            )
        return features

    def grid_for(self, resolution: int) -> int:
        """Side of the token grid for images of `resolution` pixels: 16 per full 256, as in the paper; below, one a patch."""
        return 16 * (resolution // 256) or max(1, resolution // self.patch_size)

    def prepare(self, pixels: Tensor, side: int) -> Tensor:
        """Float images in [0, 1] -> (N, 3, side, side) for the network, resized and normalised in its order."""
        raise NotImplementedError

    def extract(self, pixels: Tensor, grid: int) -> Features:
        """Prepared images (N, 3, grid * patch_size, grid * patch_size) -> features."""
        raise NotImplementedError

    def extract_attention(self, pixels: Tensor, grid: int, layers: tuple[int, ...]) -> Features:
        """As `extract`, with the attention logits of these blocks."""
        raise UserError(
            f"The encoder {self.name} does not show its attention: choose a vision transformer, as dinov2-b."
        )

    @functools.cached_property
    def identity(self) -> dict[str, str | None]:
        """What cached features depend on, for their manifest: name, sha256 of the weights' file, preprocessing."""
        checksum = files.sha256(self.weights_file) if self.weights_file else None
        return {"name": self.name, "weights_sha256": checksum, "preprocessing": self.preprocessing}


def check_images(images: Tensor, name: str) -> None:
    """Refuse anything but uint8 (N, 3, S, S), naming what arrived."""
    if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]:
        return
    raise UserError(
        f"The encoder {name} takes square uint8 images (N, 3, S, S), but got {images.dtype} "
        f"{tuple(images.shape)}: crop and convert the images first; resizing and normalisation happen inside."
    )


def resize(images: Tensor, side: int, antialias: bool) -> Tensor:
    """(N, C, S, S) -> (N, C, side, side), bicubic on pixels as areas (align_corners False), overshoot kept."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bicubic", align_corners=False, antialias=antialias)
