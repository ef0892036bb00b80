"""Feature extractors for metrics: Inception, or the pooled features of an encoder, behind one contract."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.base.device import autocast
from repa.base.errors import UserError
from repa.encoders import load_encoder
from repa.encoders.contract import VisionEncoder
from repa.evaluation.config import INCEPTION, OF_ENCODERS, OF_INCEPTION
from repa.metrics import ImageFeatures, load_inception
from repa.metrics.inception import LoadedInception


class EncoderExtractor:
    """The pooled features of an encoder, at its default grid for the size of the images."""

    metrics = OF_ENCODERS

    def __init__(self, encoder: VisionEncoder, precision: str = "fp32"):
        self.encoder, self.name, self.dim, self.precision = encoder, encoder.name, encoder.dim, precision

    @property
    def identity(self) -> dict[str, Any]:
        """The encoder, the checksum of its weights, and the precision if it is not float32."""
        return {**self.encoder.identity, **_rounded(self.precision)}

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> ImageFeatures:
        """uint8 (N, 3, S, S) -> features."""
        with autocast(self.device, self.precision):
            pooled = self.encoder(images, self.encoder.grid_for(images.shape[-1])).pooled
        # Known only now: a private encoder shows it by its output.
        if pooled is None:
            raise UserError(
                f"The encoder {self.name} has no pooled features, which metrics need: choose another encoder."
            )
        return ImageFeatures(pooled.float())


class InceptionExtractor:
    """Inception-v3, as FID, sFID and the inception score are defined by."""

    metrics = OF_INCEPTION
    name = INCEPTION
    dim = 2048

    def __init__(self, loaded: LoadedInception, precision: str = "fp32"):
        self.net, self.checksum, self.is_published = loaded.net, loaded.weights_sha256, loaded.is_published
        self.precision = precision

    @property
    def identity(self) -> dict[str, Any]:
        """The extractor, the checksum of its weights, whether they are the published ones, and the precision if it is not float32."""
        known = {"name": self.name, "weights_sha256": self.checksum, "published": self.is_published}
        return {**known, **_rounded(self.precision)}

    @property
    def device(self) -> torch.device:
        return self.net.fc.weight.device

    def __call__(self, images: Tensor) -> ImageFeatures:
        """uint8 (N, 3, H, W) -> features."""
        return self.net(images, self.precision)


Extractor = EncoderExtractor | InceptionExtractor


def _rounded(precision: str) -> dict[str, str]:
    return {} if precision == "fp32" else {"precision": precision}


def load_extractor(
    features: str, *, weights: str | Path | None = None, precision: str = "fp32", device: torch.device | str = "cpu"
) -> Extractor:
    """ "inception" or an encoder's spec; raises UserError when there are no weights."""
    if features == INCEPTION:
        return InceptionExtractor(load_inception(weights, device), precision)
    return EncoderExtractor(load_encoder(features, weights=weights, device=device), precision)


def as_extractor(extractor: Extractor | VisionEncoder) -> Extractor:
    """An encoder extracts its pooled features."""
    if isinstance(extractor, str):
        raise UserError(f"The name {extractor!r} extracts no features: load it with load_extractor({extractor!r}).")
    return EncoderExtractor(extractor) if isinstance(extractor, VisionEncoder) else extractor
