"""Is a prepared folder what its manifest says: the bytes that were written, and what its models make of its images."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.base import files
from repa.base.arrays import load_npy
from repa.base.errors import UserError
from repa.conditions import load_text_encoder
from repa.data.dataset import open_data
from repa.data.encode import load_later
from repa.data.groups import BASE, FeatureGroup, Group
from repa.data.manifest import Manifest
from repa.data.packing import read_basis, unpack
from repa.data.reader import ShardReader
from repa.data.reading import Images

TOLERANCE = {
    "fp32": 0.01,
    "bf16": 0.05,
    "fp16": 0.02,
}  # relative error: other devices and kernels stay below, other weights do not


TOLERANCE_INT8 = 0.05  # of tokens stored as int8 against those before they were rounded


class Finding(NamedTuple):
    """What one model makes of a sample of the images, against what is stored of it."""

    field: str
    error: float | None
    """Root mean square of the difference over that of the stored values; None when it could not be found."""
    trouble: str
    """Why not, or what is wrong; empty when all is well."""


def check_bytes(folder: str | Path, report: Callable[[int, int, str], None] | None = None) -> int:
    """Compare every file with its checksum; returns how many bytes were read.

    Args:
        folder: a finished folder.
        report: called with (bytes done, bytes in all, file).

    Raises:
        UserError: names every file that is missing, of another size or of other bytes, the first five of them.
    """
    folder = Path(folder)
    records = Manifest.open(folder).records
    total, done, damaged = sum(record.size for record in records), 0, []
    for record in records:
        if not record.intact(folder) or files.sha256(folder / record.file) != record.sha256:
            damaged.append(record.file)
        done += record.size
        if report:
            report(done, total, record.file)
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(records)} files in {folder} are not as they were written ({', '.join(damaged[:5])}): "
            "delete them and run the same `repa prepare` again, which makes them anew."
        )
    return done


def check_models(
    folder: str | Path,
    *,
    num: int = 64,
    autoencoder_weights: str | None = None,
    feature_weights: tuple[str, ...] = (),
    device: torch.device | str = "cpu",
) -> list[Finding]:
    """Encode some stored images again and compare, for the autoencoder and every encoder whose weights can be had.

    Args:
        folder: a finished folder that holds images.
        num: how many images, at equal distances.
        autoencoder_weights: where they lie now; None looks where `prepare` found them.
        feature_weights: where they lie now; () looks where `prepare` found them.
        device: where the models run.

    Raises:
        UserError: the folder holds no images.
    """
    folder = Path(folder)
    manifest = Manifest.open(folder)
    if "images" not in manifest.fields:
        raise UserError(
            f"{folder} holds no images, so there is nothing to encode again: only its bytes can be checked."
        )
    reader = ShardReader(folder, manifest)
    rows = np.unique(np.linspace(0, manifest.num_images - 1, min(num, manifest.num_images)).astype(np.int64))
    images = Images(reader.gather("images", rows), reader.gather("labels", rows), [], [])
    config = manifest.config.override(
        **({} if autoencoder_weights is None else {"autoencoder_weights": autoencoder_weights}),
        feature_weights=(*feature_weights, *manifest.config.feature_weights),
    )
    names = [*([BASE] if "moments" in manifest.fields else []), *manifest.features]
    findings = [
        _compare(reader, rows, images, name, load, torch.device(device))
        for name, load in load_later(config, torch.device(device), names).items()
    ]
    return [*findings, *([_compare_text(folder, rows, torch.device(device))] if manifest.text else [])]


def _compare(
    reader: ShardReader, rows: np.ndarray, images: Images, name: str, load: Callable[[], Group], device: torch.device
) -> Finding:
    manifest = reader.manifest
    field = "moments" if name == BASE else f"features.{name}"
    try:
        group = load()
        if isinstance(group, FeatureGroup) and (basis := manifest.features[name].basis):
            group.use_basis(load_npy(Path(reader.folder, basis.file), "a basis of tokens"), basis.sha256)
    except UserError as error:
        return Finding(field, None, f"not encoded again: {error}")
    identity = manifest.autoencoder if name == BASE else manifest.features[name].identity
    for key, value in identity.items():
        if group.identity.get(key) != value:
            return Finding(field, None, f"made by {key} {value!r}, but here is {group.identity.get(key)!r}")
    size, stored = manifest.config.batch_size, reader.gather(field, rows)
    made: list[dict[str, np.ndarray]] = []
    for at in range(0, len(rows), size):
        made.append(group.encode(Images(images.pixels[at : at + size], images.labels[at : at + size], [], [])))
    fresh = {key: np.concatenate([batch[key] for batch in made]) for key in made[0]}
    if name == BASE:
        a, b = torch.from_numpy(stored).float(), torch.from_numpy(fresh[field]).float()
    else:
        scale = f"scale.{name}"
        before = {field: stored, **({scale: reader.gather(scale, rows)} if scale in fresh else {})}
        basis = read_basis(reader.folder, manifest.features[name])
        a, b = (_tokens(fields, name, basis) for fields in (before, fresh))
    error = float((a - b).norm() / a.norm().clamp_min(torch.finfo(torch.float32).tiny))
    limit = TOLERANCE[manifest.config.precision]
    trouble = "" if error <= limit else f"differs by {error:.2g} from what is stored, more than {limit:g}"
    return Finding(field, error, trouble)


def _compare_text(folder: Path, rows: np.ndarray, device: torch.device) -> Finding:
    """The first caption of images `rows`, encoded again."""
    data = open_data(folder)
    config, identity = data.manifest.config, data.text.identity
    try:
        encoder = load_text_encoder(config.text, weights=config.text_weights or None, device=device)
    except UserError as error:
        return Finding("text", None, f"not encoded again: {error}")
    for key, value in identity.items():
        if encoder.identity.get(key) != value:
            return Finding("text", None, f"made by {key} {value!r}, but here is {encoder.identity.get(key)!r}")
    stored = data.texts.gather(rows).text().tokens
    fresh = encoder([next(iter(texts), "") for texts in data.captions(rows)]).tokens.cpu()
    error = float((stored - fresh).norm() / stored.norm().clamp_min(torch.finfo(torch.float32).tiny))
    limit = TOLERANCE[config.precision] if config.text_form == "fp16" else TOLERANCE_INT8
    return Finding(
        "text", error, "" if error <= limit else f"differs by {error:.2g} from what is stored, more than {limit:g}"
    )


def _tokens(fields: dict[str, np.ndarray], name: str, basis: Tensor | None) -> Tensor:
    scale = fields.get(f"scale.{name}")
    features = torch.from_numpy(fields[f"features.{name}"])
    return unpack(features, None if scale is None else torch.from_numpy(scale), basis)
