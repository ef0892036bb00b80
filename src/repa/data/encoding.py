"""The models of a preparation: they turn a batch of images or captions into fields of shards."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repa.autoencoders import load_autoencoder
from repa.base import lock
from repa.base.arrays import load_npy, save_npy
from repa.base.device import DTYPES, HALF, autocast
from repa.base.errors import UserError
from repa.base.files import sha256
from repa.conditions import load_text_encoder
from repa.data.config import BASE, FP16, TEXT, PrepareConfig, split_format
from repa.data.manifest import PARTS
from repa.data.packing import pack, principal_basis, to_float16
from repa.data.progress import FinishedParts, Piece, PlannedShard
from repa.data.reading import DecodedImages, Read, sample_pieces
from repa.data.records import basis_name
from repa.data.sources.reference_layout import require_same_moments
from repa.encoders import load_encoder
from repa.encoders.contract import Features

COMPARED = 4  # images whose moments are computed again, to verify that the source's moments are from this autoencoder
SAMPLE = 1024  # images that principal components are computed from: 262,144 tokens of a 16 x 16 grid


class BaseFields:
    """The part base: labels, and images, moments, or both.

    Attributes:
        identity: the model.
        sizes: field -> bytes an image takes on disk.
    """

    def __init__(self, config: PrepareConfig, device: torch.device):
        self.config, self.device, self._compared = config, device, False
        self.model = model = load_autoencoder(
            config.autoencoder, weights=config.autoencoder_weights or None, device=device
        )
        model.check_resolution(config.resolution, config.resolution)
        if not (config.store_images or model.stores_moments):
            raise UserError(
                f"store_images is off, but {config.autoencoder} stores no moments: set store_images to true."
            )
        self.identity: dict[str, Any] = {"spec": config.autoencoder, **model.identity}
        self.sizes = {"labels": 8}
        if config.store_images:
            self.sizes["images"] = 3 * config.resolution**2
        if model.stores_moments:
            self.sizes["moments"] = 2 * model.stored_channels * (config.resolution // model.factor) ** 2

    def encode(self, images: DecodedImages) -> dict[str, np.ndarray]:
        """Field -> rows (n, ...)."""
        fields = {"labels": images.labels}
        if self.config.store_images:
            fields["images"] = images.pixels
        if self.model.stores_moments:
            fields["moments"] = to_float16(self._moments(images), self.config.autoencoder).cpu().numpy()
        return fields

    def _moments(self, images: DecodedImages) -> Tensor:
        """Moments (n, M, h, w): computed, or from the source, whose first moments are compared with computed ones."""
        if images.moments is None:
            return self._encode(images.pixels)
        if not self._compared:
            ours = self._encode(images.pixels[:COMPARED]).float().cpu().numpy()
            require_same_moments(images.moments[:COMPARED], ours, self.config.autoencoder)
            self._compared = True
        return torch.from_numpy(images.moments)

    def _encode(self, pixels: np.ndarray) -> Tensor:
        return self.model.encode(torch.from_numpy(pixels).to(self.device), dtype=DTYPES[self.config.precision])


class FeatureFields:
    """Tokens and pooled features of one encoder.

    Attributes:
        identity, sizes: as above.
        num_directions: K of the forms with pca, which need `use_basis` before `encode`; else 0.
    """

    def __init__(self, spec: str, config: PrepareConfig, device: torch.device):
        self.spec, self.config, self.device = spec, config, device
        self.model = load_encoder(spec, weights=config.feature_weights.get(spec), device=device)
        self.grid = config.grid or self.model.grid_for(config.resolution)
        self.form = config.feature_forms.get(spec, FP16)
        self.num_directions, dtype = split_format(self.form)
        if self.num_directions > self.model.dim:
            raise UserError(
                f"{spec} has tokens of width {self.model.dim}, smaller than the {self.num_directions} directions of "
                f"{self.form}: choose fewer."
            )
        self.basis: Tensor | None = None
        self.identity: dict[str, Any] = {"spec": spec, "grid": self.grid, **self.model.identity}
        num, width = self.grid**2, self.num_directions or self.model.dim
        self.sizes = {
            f"features.{spec}": num * width * (1 if dtype == "int8" else 2),
            **({f"scale.{spec}": 4 * num} if dtype == "int8" else {}),
            f"pooled.{spec}": 2 * self.model.dim,  # if it has them
        }

    def features(self, pixels: np.ndarray) -> Features:
        """The encoder's features of uint8 images (n, 3, R, R), in the configured precision."""
        with autocast(self.device, self.config.precision):
            return self.model(torch.from_numpy(pixels).to(self.device), self.grid)

    def use_basis(self, basis: np.ndarray, checksum: str) -> None:
        """The mean and the principal directions (1 + K, D) for stored coordinates."""
        self.basis = torch.from_numpy(basis).to(self.device)
        self.identity["basis"] = checksum

    def use_stored_basis(self, out: Path, read: Read, shards: Sequence[PlannedShard]) -> None:
        """Load the basis in `out`; the first process that needs it computes and stores it."""
        path = out / basis_name(self.spec)
        # all processes need bit-identical directions, so the others wait for the file of the first
        with lock.held(out / PARTS / f"{path.name}.lock"):
            if not path.is_file():
                save_npy(path, principal_basis(self._sample(read, shards), self.num_directions))
        self.use_basis(load_npy(path, "a basis of tokens", "Delete it; it will be computed again."), sha256(path))

    def _sample(self, read: Read, shards: Sequence[PlannedShard]) -> Iterable[Tensor]:
        """Tokens (n, T, D) of images that are evenly spaced over the source."""
        images = (images.pixels for _, images in read(sample_pieces(shards, SAMPLE)) if len(images.labels))
        for batch in iter(lambda: list(itertools.islice(images, self.config.batch_size)), []):
            yield self.features(np.concatenate(batch)).patches

    def encode(self, images: DecodedImages) -> dict[str, np.ndarray]:
        """Field -> rows (n, ...)."""
        features = self.features(images.pixels)
        stored = pack(features.patches, self.form, self.basis, made_by=self.spec)  # (n, T, D or K), (n, T)
        fields = {f"{name}.{self.spec}": x.cpu().numpy() for name, x in stored.items()}
        if features.pooled is not None:
            fields[f"pooled.{self.spec}"] = to_float16(features.pooled, self.spec).cpu().numpy()  # (n, D)
        return fields


class TextFields:
    """Tokens of captions. Row 0 of a shard is the empty text, for images without captions; the captions follow.

    Attributes:
        identity: the text encoder.
    """

    sizes: Mapping[str, int] = {}  # unknown before the captions are read

    def __init__(self, config: PrepareConfig, device: torch.device):
        self.config, self.device = config, device
        self.model = load_text_encoder(config.text, weights=config.text_weights or None, device=device)
        if config.precision in HALF:
            self.model.round_weights(DTYPES[config.precision])
        self.identity: dict[str, Any] = self.model.identity

    def encode(self, images: DecodedImages) -> dict[str, np.ndarray]:
        """Field -> rows, one per text; `text_rows` (n, 2) has the first row and the number of each image's captions."""
        # the empty text is row 0 of every shard, so that each shard is self-contained
        is_first = images.texts_before == 0
        counts = np.array([len(captions) for captions in images.captions], np.int64)
        first = images.texts_before + is_first + counts.cumsum() - counts
        texts = [*([""] if is_first else []), *itertools.chain(*images.captions)]
        size = self.config.batch_size
        batches = [self._encode(texts[at : at + size]) for at in range(0, len(texts), size)]
        fields = {name: np.concatenate([batch[name] for batch in batches]) for name in (batches[0] if batches else ())}
        return {**fields, "text_rows": np.stack([np.where(counts, first, 0), np.maximum(counts, 1)], 1)}

    def _encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        with autocast(self.device, self.config.precision):
            text = self.model(texts)
        stored = pack(text.tokens, self.config.text_form, made_by=self.config.text)  # (n, S, E), (n, S)
        names = {"features": "text", "scale": "text_scale"}
        mask = {} if text.mask is None else {"text_mask": text.mask.to(torch.uint8).cpu().numpy()}
        return {names[name]: x.cpu().numpy() for name, x in stored.items()} | mask


Fields = BaseFields | FeatureFields | TextFields


def load_model(part: str, config: PrepareConfig, device: torch.device) -> Fields:
    """The model of a part."""
    if part in (BASE, TEXT):
        return (BaseFields if part == BASE else TextFields)(config, device)
    return FeatureFields(part, config, device)


def load_models(finished: FinishedParts, parts: Iterable[str], device: torch.device) -> dict[str, Fields]:
    """The models of these parts; refused if finished parts are from others."""
    models = {name: load_model(name, finished.settings.config, device) for name in parts}
    for name, model in models.items():
        require_same_model(finished, name, model.identity)
    return models


def require_same_model(finished: FinishedParts, name: str, identity: dict[str, Any]) -> None:
    """Raises UserError if finished parts are from another model than `identity`."""
    for part in (there[name] for there in finished.parts if name in there):
        if changed := [key for key, value in identity.items() if part.identity.get(key) != value]:
            raise UserError(
                f"The finished shards in {finished.out} were made by another {identity.get('spec', name)} "
                f"(different: {', '.join(changed)}): give the same weights, or choose another folder."
            )


def encode(
    item: tuple[Piece, DecodedImages], models: Mapping[str, Fields], skip_bad: bool
) -> tuple[Piece, DecodedImages, dict[str, np.ndarray]]:
    """A batch with field -> rows, for the parts that this process makes."""
    piece, images = item
    fields: dict[str, np.ndarray] = {}
    # a shard with an unreadable image is refused at its end, so encoding the rest of it is useless
    if len(images.labels) and (skip_bad or not images.bad):
        for name in piece.parts:
            fields |= models[name].encode(images)
    return piece, images, fields
