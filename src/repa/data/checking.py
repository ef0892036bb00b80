"""Checks of a prepared folder: its bytes against their checksums, its stored tokens and moments against the models."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.base.arrays import evenly_spaced, load_npy, load_npz
from repa.base.errors import UserError
from repa.data.config import BASE, TEXT, PrepareConfig
from repa.data.dataset import DataSet, open_data
from repa.data.encoding import FeatureFields, load_model
from repa.data.packing import read_basis, unpack
from repa.data.reading import DecodedImages

# relative: the same weights on other devices and kernels stay below, other weights exceed it
TOLERANCE = {"fp32": 0.01, "bf16": 0.05, "fp16": 0.02}

HASHED = 256  # images in memory at a time


class Finding(NamedTuple):
    """Comparison of one model's output for a sample of the images with the stored values."""

    field: str
    error: float | None
    """Root mean square of the difference relative to that of the stored values; None if not computed."""
    trouble: str
    """The problem, or why nothing was compared; empty if all is well."""
    is_compared: bool = True
    """False if the model's weights are missing, which is not a fault of the data."""


def check_bytes(folder: str | Path, report: Callable[[int, int, str], None] | None = None) -> int:
    """`DataSet.check` of a folder, of the references in it, and of the counts of its labels.

    Returns the number of bytes read; raises UserError for missing or changed files.
    """
    data = open_data(folder)
    done = data.check(report)
    for path in sorted(Path(folder).glob("reference/*.npz")):  # a zip has a checksum of each array
        load_npz(path, "a reference", remedy="Delete it; it will be computed again.")
    _ = data.small_labels  # compared with the manifest, whose checksum may have been removed by hand
    return done


def count_duplicates(data: DataSet, report: Callable[[int, int, str], None] | None = None) -> int:
    """Number of stored images, mirrored copies aside, whose pixels equal those of an earlier one.

    Images are compared by 64 bits of a hash: a set of 1.3 million images has a chance of 1 in 20 million to hold two different
    images with the same hash.
    """
    hashes, rows = np.empty(len(data.originals), np.uint64), np.arange(len(data.originals))
    for some in np.split(rows, rows[::HASHED][1:]):
        for row, pixels in zip(some, data.gather("images", some), strict=True):
            hashes[row] = int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little")
        if report is not None:
            report(int(some[-1]) + 1, len(rows), "")
    return len(hashes) - len(np.unique(hashes))


def check_models(
    folder: str | Path,
    *,
    num: int = 64,
    autoencoder_weights: str | None = None,
    feature_weights: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
) -> list[Finding]:
    """Encode some stored images again and compare, with the autoencoder and every encoder whose weights are available.

    Args:
        folder: a complete data folder with stored images.
        num: number of images, evenly spaced.
        autoencoder_weights: path; None: the path that `prepare` used.
        feature_weights: encoder -> path; for others the path that `prepare` used.
        device: where the models run.

    Raises:
        UserError: the folder holds no images.
    """
    data, device = open_data(folder), torch.device(device)
    manifest = data.manifest
    if not data.has_images:
        raise UserError(f"{folder} stores no images, so nothing can be encoded again: check its bytes alone.")
    rows = evenly_spaced(len(data), num)
    captions = [texts[:1] or ("",) for texts in data.captions(rows)] if data.text else []  # the first of each
    images = DecodedImages(data.gather("images", rows), data.gather("labels", rows), captions, [])
    config = manifest.config.override(
        **({} if autoencoder_weights is None else {"autoencoder_weights": autoencoder_weights}),
        feature_weights={**manifest.config.feature_weights, **(feature_weights or {})},
    )
    names = [*([BASE] if data.has_moments else []), *manifest.features, *([TEXT] if data.text else [])]
    return [_compare(data, rows, images, name, config, device) for name in names]


def _compare(
    data: DataSet, rows: np.ndarray, images: DecodedImages, name: str, config: PrepareConfig, device: torch.device
) -> Finding:
    manifest = data.manifest
    field = {BASE: "moments", TEXT: "text"}.get(name, f"features.{name}")
    tokens = manifest.features.get(name)
    facts = {BASE: None, TEXT: data.text}.get(name, tokens)
    try:
        model = load_model(name, config, device)
        if isinstance(model, FeatureFields) and tokens and (stated := tokens.basis):
            model.use_basis(load_npy(Path(data.folder, stated.file), "a basis of tokens"), stated.sha256)
    except UserError as error:
        return Finding(field, None, f"not encoded again: {error}", is_compared=False)
    # before any image: with other weights the difference is meaningless, and the reason is known
    for key, value in (facts.identity if facts else manifest.autoencoder).items():
        if model.identity.get(key) != value:
            return Finding(
                field, None, f"made with {key} {value!r}, but the weights here have {model.identity.get(key)!r}"
            )
    made = list(map(model.encode, _batches(images, config.batch_size)))
    fresh = {key: np.concatenate([batch[key] for batch in made if key in batch]) for key in made[0]}
    if name == TEXT:
        text = data.texts.gather(rows)
        stored, again = unpack(text.tokens, text.scale), _unpacked(fresh, "text", "text_scale")[1:]  # row 0: no text
    else:
        basis = read_basis(data.folder, tokens) if tokens else None
        before = {key: data.gather(key, rows) for key in (field, f"scale.{name}") if key in fresh}
        stored, again = (_unpacked(fields, field, f"scale.{name}", basis) for fields in (before, fresh))
    # tokens alone: pooled features come from the same pass, and only the same weights give the same tokens
    distance = float((stored - again).norm() / stored.norm().clamp_min(torch.finfo(torch.float32).tiny))
    limit = TOLERANCE[config.precision]
    trouble = "" if distance <= limit else f"differs by {distance:.2g} from the stored values, more than {limit:g}"
    return Finding(field, distance, trouble)


def _batches(images: DecodedImages, size: int) -> Iterator[DecodedImages]:
    for at in range(0, len(images.labels), size):
        part, texts = slice(at, at + size), images.captions[at : at + size]
        before = sum(map(len, images.captions[:at])) + (at > 0)
        yield DecodedImages(images.pixels[part], images.labels[part], texts, [], texts_before=before)


def _unpacked(fields: dict[str, np.ndarray], field: str, scale: str, basis: Tensor | None = None) -> Tensor:
    return unpack(torch.from_numpy(fields[field]), torch.from_numpy(fields[scale]) if scale in fields else None, basis)
