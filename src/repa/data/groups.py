"""What the models make of a batch of images: the fields of shards."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from repa.autoencoders import load_autoencoder
from repa.base.errors import UserError
from repa.data.config import PrepareConfig, split_format
from repa.data.packing import pack
from repa.data.reading import Images
from repa.data.sources.reference_layout import require_same_moments
from repa.encoders import load_encoder
from repa.encoders.contract import Features

BASE = "base"
TEXT = "text"
COMPARED = 4  # images whose moments are made again, to see that what comes with a source is of this autoencoder
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fields_of(group: str) -> tuple[str, ...]:
    """The fields that a group may have."""
    if group == BASE:
        return ("labels", "images", "moments", "captions")
    if group == TEXT:
        return ("text", "text_mask", "text_scale", "text_rows")
    return (f"features.{group}", f"scale.{group}", f"pooled.{group}")


class BaseGroup:
    """Labels, and what the network learns to make: images, moments, or both.

    Attributes:
        identity: the model that makes them.
        sizes: field -> bytes an image takes on disk.
    """

    num_directions = 0

    def __init__(self, config: PrepareConfig, device: torch.device | str):
        self.config, self.device, self._compared = config, device, False
        self.model = model = load_autoencoder(
            config.autoencoder, weights=config.autoencoder_weights or None, device=device
        )
        if config.resolution % model.factor:
            raise UserError(
                f"resolution is {config.resolution}, but {config.autoencoder} shrinks images {model.factor} times: "
                "choose a multiple of that."
            )
        model.check_resolution(config.resolution, config.resolution)
        if not (config.store_images or model.stores_moments):
            raise UserError(
                f"store_images is off, but {config.autoencoder} stores no moments, so nothing would be left: leave it on."
            )
        self.identity: dict[str, Any] = {"spec": config.autoencoder, **model.identity}
        self.sizes = {"labels": 8}
        if config.store_images:
            self.sizes["images"] = 3 * config.resolution**2
        if model.stores_moments:
            self.sizes["moments"] = 2 * model.stored_channels * (config.resolution // model.factor) ** 2

    def encode(self, images: Images) -> dict[str, np.ndarray]:
        """Field -> rows (n, ...)."""
        fields = {"labels": images.labels}
        if self.config.store_images:
            fields["images"] = images.pixels
        if self.model.stores_moments:
            fields["moments"] = _half(self._moments(images), self.config.autoencoder)
        return fields

    def _moments(self, images: Images) -> Tensor:
        """(n, M, h, w): made now, or those that come with the images, of which the first are compared."""
        if images.moments is None:
            return self._encode(images.pixels)
        if not self._compared:
            ours = self._encode(images.pixels[:COMPARED]).float().cpu().numpy()
            require_same_moments(images.moments[:COMPARED], ours, self.config.autoencoder)
            self._compared = True
        return torch.from_numpy(images.moments)

    def _encode(self, pixels: np.ndarray) -> Tensor:
        return self.model.encode(torch.from_numpy(pixels).to(self.device), dtype=DTYPES[self.config.precision])


class FeatureGroup:
    """Tokens and pooled features of one encoder.

    Attributes:
        identity, sizes: as above.
        num_directions: K of the forms with pca, which want `use_basis` before `encode`; else 0.
    """

    def __init__(self, spec: str, weights: str | None, config: PrepareConfig, device: torch.device | str):
        self.spec, self.config, self.device = spec, config, torch.device(device)
        self.model = load_encoder(spec, weights=weights, device=device)
        self.grid = config.grid or self.model.grid_for(config.resolution)
        self.form = config.form_of(spec)
        self.num_directions, dtype = split_format(self.form)
        if self.num_directions > self.model.dim:
            raise UserError(
                f"{spec} has tokens of {self.model.dim} numbers, fewer than the {self.num_directions} directions of "
                f"{self.form}: ask for fewer."
            )
        self.basis: Tensor | None = None
        self.identity: dict[str, Any] = {"spec": spec, "grid": self.grid, **self.model.identity}
        num, width = self.grid**2, self.num_directions or self.model.dim
        self.sizes = {
            f"features.{spec}": num * width * (1 if dtype == "int8" else 2),
            **({f"scale.{spec}": 4 * num} if dtype == "int8" else {}),
            f"pooled.{spec}": 2 * self.model.dim,  # where it has one
        }

    def features(self, pixels: np.ndarray) -> Features:
        """What the encoder sees, in the precision asked for."""
        half = self.config.precision != "fp32"
        with torch.autocast(self.device.type, dtype=DTYPES[self.config.precision], enabled=half):
            return self.model(torch.from_numpy(pixels).to(self.device), self.grid)

    def use_basis(self, basis: np.ndarray, checksum: str) -> None:
        """The mean and the directions (1 + K, D) that tokens are stored by."""
        self.basis = torch.from_numpy(basis).to(self.device)
        self.identity["basis"] = checksum

    def encode(self, images: Images) -> dict[str, np.ndarray]:
        """Field -> rows (n, ...)."""
        features = self.features(images.pixels)
        try:
            stored = pack(features.patches, self.form, self.basis)  # (n, T, D or K), (n, T)
        except UserError as error:
            raise UserError(f"{self.spec} gave tokens that cannot be stored: {error}") from error
        fields = {f"{name}.{self.spec}": x.cpu().numpy() for name, x in stored.items()}
        if features.pooled is not None:
            fields[f"pooled.{self.spec}"] = _half(features.pooled, self.spec)  # (n, D)
        return fields


Group = BaseGroup | FeatureGroup


def _half(x: Tensor, made_by: str) -> np.ndarray:
    half = x.half()
    if not torch.isfinite(half).all():
        raise UserError(
            f"{made_by} gave values that float16 cannot hold: leave it out here, it can run while training."
        )
    return half.cpu().numpy()
