"""The interface of frozen vision encoders: uint8 images in, a row-major grid of tokens out."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repa.base import files
from repa.base.errors import UserError, require_type
from repa.base.pretrained import Frozen


class Features(NamedTuple):
    """The output of an encoder for a batch of images."""

    patches: Tensor
    """(N, G*G, D) tokens, row-major (token i is row i // G, column i % G); never class or register tokens."""
    pooled: Tensor | None
    """(N, D), one vector per image; None if the encoder has none."""
    attention: dict[int, Tensor] | None = None
    """Block, counted from 1 -> logits (N, h, G*G, G*G) of its attention between patches; only for the requested blocks."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """Apply a function to every tensor, such as indexing, a move to a device, or a copy."""
        attention = self.attention and {layer: change(logits) for layer, logits in self.attention.items()}
        return Features(change(self.patches), None if self.pooled is None else change(self.pooled), attention)


class VisionEncoder(Frozen):
    """A frozen encoder, always in eval mode and without gradients. Subclasses implement `prepare` and `extract`.

    Computes in the dtype of its weights (float32 when loaded) or of the caller's autocast, which is also the dtype of the
    features.

    Attributes:
        name: the name in the registry.
        dim: D, the width of patches and pooled.
        patch_size: pixels per token side after resizing; a grid of G needs images of side G * patch_size.
    """

    def __init__(
        self, net: nn.Module, *, name: str, dim: int, patch_size: int, preprocessing: str, weights_file: Path | None
    ):
        super().__init__()
        # Frozen here and not by the caller: a forgotten eval mode would silently change the targets.
        self.net = net.requires_grad_(False).eval()
        self.name, self.dim, self.patch_size = name, dim, patch_size
        self.preprocessing, self.weights_file = preprocessing, weights_file
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, grid: int, attention: tuple[int, ...] = ()) -> Features:
        """Features of `images`, uint8 (N, 3, S, S) of any side S, on a grid of `grid` x `grid` tokens.

        `attention`: blocks, counted from 1, of which to return the attention logits.

        Raises:
            UserError: images of another type or shape, a grid below 1, an encoder without attention logits, or patches of
                another shape than declared.
        """
        check_images(images, self.name)
        require_type(grid, int, f"The token grid of the encoder {self.name} is its side, a whole number")
        if grid < 1:
            raise UserError(f"The token grid of the encoder {self.name} must be at least 1, but got {grid}.")
        weights = next(self.net.parameters())
        # Images are moved as uint8, a quarter of the bytes of float32, and converted on the device.
        pixels = self.prepare(images.to(weights.device).float() / 255, grid * self.patch_size)
        # Prepared in float32 and rounded once: resizing in half precision would round at every step.
        pixels = pixels.to(weights.dtype)
        features = self.extract_attention(pixels, grid, attention) if attention else self.extract(pixels, grid)
        wanted = (len(images), grid * grid, self.dim)
        given = tuple(features.patches.shape) if isinstance(features, Features) else type(features).__name__
        if given != wanted:
            raise UserError(
                f"The encoder {self.name} must return patches of shape (N, G * G, D) = {wanted}, but returned {given}: return one token "
                "per position of the grid, row-major, without class or register tokens."
            )
        return features

    def grid_for(self, resolution: int) -> int:
        """Side of the token grid for images of `resolution` pixels: 16 per full 256, as in the paper; below 256, one token per patch."""
        return 16 * (resolution // 256) or max(1, resolution // self.patch_size)

    def prepare(self, pixels: Tensor, side: int) -> Tensor:
        """Float images in [0, 1] -> (N, 3, side, side), resized and normalised for the network."""
        raise NotImplementedError

    def extract(self, pixels: Tensor, grid: int) -> Features:
        """Prepared images (N, 3, grid * patch_size, grid * patch_size) -> features."""
        raise NotImplementedError

    def extract_attention(self, pixels: Tensor, grid: int, layers: tuple[int, ...]) -> Features:
        """Like `extract`, also with the attention logits of these blocks."""
        raise UserError(
            f"The encoder {self.name} has no attention logits: choose a vision transformer such as dinov2-b."
        )

    @functools.cached_property
    def identity(self) -> dict[str, str | None]:
        """The identity of cached features, for their manifest: name, SHA-256 of the weights, preprocessing."""
        checksum = files.sha256(self.weights_file) if self.weights_file else None
        return {"name": self.name, "weights_sha256": checksum, "preprocessing": self.preprocessing}


def check_images(images: Tensor, name: str) -> None:
    """Raises UserError unless the images are uint8 (N, 3, S, S)."""
    require_type(images, Tensor, f"The encoder {name} needs a tensor of uint8 images (N, 3, S, S)")
    if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]:
        return
    raise UserError(
        f"The encoder {name} needs square uint8 images (N, 3, S, S), but got {images.dtype} "
        f"{tuple(images.shape)}: crop and convert the images first; the encoder resizes and normalises them."
    )


def resize(images: Tensor, side: int, antialias: bool) -> Tensor:
    """(N, C, S, S) -> (N, C, side, side), bicubic with align_corners=False; values may overshoot [0, 1]."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bicubic", align_corners=False, antialias=antialias)
