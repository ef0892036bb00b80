"""What the models make of a batch of images: the fields of shards."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.autoencoders import load_autoencoder
from repa.base.errors import UserError
from repa.data.config import PrepareConfig
from repa.encoders import load_encoder


class Images(NamedTuple):
    """Consecutive images of a source, without those that cannot be read."""

    pixels: np.ndarray  # (n, 3, R, R) uint8
    labels: np.ndarray  # (n,) int64
    bad: list[tuple[str, str]]  # name, reason


@dataclass(frozen=True)
class Group:
    """Fields that one model makes of a batch."""

    encode: Callable[[Images], dict[str, np.ndarray]]
    identity: dict[str, Any]
    image_size: int  # bytes an image takes on disk


def base_group(config: PrepareConfig, device: torch.device | str) -> Group:
    """Labels, and what the network learns to make: images, moments, or both."""
    autoencoder = load_autoencoder(config.autoencoder, weights=config.autoencoder_weights or None, device=device)
    if config.resolution % autoencoder.factor:
        raise UserError(
            f"resolution is {config.resolution}, but {config.autoencoder} shrinks images {autoencoder.factor} times: "
            "choose a multiple of that."
        )
    if not (config.store_images or autoencoder.stores_moments):
        raise UserError(
            f"store_images is off, but {config.autoencoder} stores no moments, so nothing would be left: leave it on."
        )

    def encode(images: Images) -> dict[str, np.ndarray]:
        fields = {"labels": images.labels}
        if config.store_images:
            fields["images"] = images.pixels
        if autoencoder.stores_moments:
            moments = autoencoder.encode(torch.from_numpy(images.pixels).to(device))  # (n, 2C, h, w)
            fields["moments"] = _half(moments, config.autoencoder)
        return fields

    image_size = 8  # the label
    if config.store_images:
        image_size += 3 * config.resolution**2
    if autoencoder.stores_moments:
        image_size += 2 * 2 * autoencoder.channels * (config.resolution // autoencoder.factor) ** 2
    return Group(encode, {"spec": config.autoencoder, **autoencoder.identity}, image_size)


def feature_group(spec: str, weights: str | None, config: PrepareConfig, device: torch.device | str) -> Group:
    """Tokens and pooled features of one encoder."""
    encoder = load_encoder(spec, weights=weights, device=device)
    grid = config.grid or encoder.grid_for(config.resolution)

    def encode(images: Images) -> dict[str, np.ndarray]:
        features = encoder(torch.from_numpy(images.pixels).to(device), grid)
        fields = {f"features.{spec}": _half(features.patches, spec)}  # (n, T, D)
        if features.pooled is not None:
            fields[f"pooled.{spec}"] = _half(features.pooled, spec)  # (n, D)
        return fields

    return Group(encode, {"spec": spec, "grid": grid, **encoder.identity}, 2 * encoder.dim * (grid**2 + 1))


def _half(x: Tensor, made_by: str) -> np.ndarray:
    half = x.half()
    if not torch.isfinite(half).all():
        raise UserError(
            f"{made_by} gave values that float16 cannot hold: leave it out here, it can run while training."
        )
    return half.cpu().numpy()
