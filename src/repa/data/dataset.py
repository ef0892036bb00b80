"""A prepared folder, local or on an object store: its facts, its arrays, and the weights that made them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repa.base.errors import UserError
from repa.base.files import sha256
from repa.data.manifest import Manifest
from repa.data.packing import read_basis
from repa.data.reader import Captions, ShardReader, TextReader
from repa.data.remote import RemoteFiles, is_url
from repa.encoders import canonical, load_encoder
from repa.encoders.contract import VisionEncoder

# one byte per image in memory instead of a read of 8 bytes per image and batch
LABELS_IN_MEMORY = 64 << 20  # bytes of all labels; if they take more, each batch reads its labels
LABELS_CHUNK = 1 << 16  # labels read at a time
CHECKED_AT_START = 4 << 30  # bytes of data whose checksums take seconds


class DataSet:
    """A prepared folder: its facts and its arrays.

    Attributes:
        folder, manifest: as given.
        stream: the files of remote data; None for a local folder.
        originals: indices that are not mirrored copies; metrics use only these.
        autoencoder: the spec of the autoencoder.
        features: encoder -> facts of its stored tokens.
        text: facts of the stored text tokens, or None.
        has_captions: whether any image may have a caption.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, stream: RemoteFiles | None = None):
        self.folder, self.manifest, self.stream = folder, manifest, stream
        if not stream:
            manifest.require_intact(folder)
        self.reader = ShardReader(folder, manifest.shards, stream.path if stream else None)
        self._captions = Captions(self.reader)
        self.num_images, self.originals = manifest.num_images, manifest.originals
        self.class_names, self.num_classes = manifest.class_names, len(manifest.class_names)
        self.resolution, self.autoencoder = manifest.resolution, manifest.config.autoencoder
        self.features, self.text = manifest.features, manifest.text
        self.has_images, self.has_moments = "images" in self.reader.fields, "moments" in self.reader.fields
        self.has_captions = any(shard.captions for shard in manifest.shards)

    def __len__(self) -> int:
        return self.num_images

    def __repr__(self) -> str:
        stored = ", ".join(self.manifest.fields)
        return f"DataSet({str(self.folder)!r}): {len(self)} images of {self.resolution} pixels, {self.num_classes} classes; {stored}"

    def require_images(self, why: str = "") -> None:
        """Raises UserError with the reason `why`, unless the images are stored."""
        if not self.has_images:
            raise UserError(f"{self.folder} stores no images{why}: prepare the data with --store-images true.")

    @property
    def latent_channels(self) -> int:
        """Channels C of the network's input: half of the moments (mean and deviation), all of them if there are only
        means, or those of the pixels without moments."""
        _, shape = self.reader.fields["moments" if self.has_moments else "images"]
        has_deviations = self.has_moments and self.manifest.autoencoder.get("stochastic", True)
        return shape[0] // 2 if has_deviations else shape[0]

    @property
    def latent_size(self) -> int:
        """Side of the network's input."""
        return self.reader.fields["moments" if self.has_moments else "images"][1][-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(record.size for shard in self.manifest.shards for record in shard.files.values())

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64, read from the files at each call."""
        return self.gather("labels", np.arange(self.num_images))

    @functools.cached_property
    def small_labels(self) -> np.ndarray | None:
        """(N,) in the smallest integer type; None for remote data, and for labels that take more than LABELS_IN_MEMORY.

        Raises UserError if they do not match the counts in the manifest.
        """
        dtype = np.min_scalar_type(self.num_classes - 1)
        if self.stream or self.num_images * dtype.itemsize > LABELS_IN_MEMORY:
            return None
        labels, counts = np.empty(self.num_images, dtype), np.zeros(self.num_classes, np.int64)
        copies, done = self.num_images // len(self.originals), 0
        for rows in self.reader.batches("labels", LABELS_CHUNK):
            # before the conversion: 256 becomes 0 in a byte, and bincount ends at a negative number with another error
            if rows.min() < 0 or rows.max() >= self.num_classes:
                break
            labels[done : done + len(rows)] = rows
            counts += np.bincount(rows, minlength=self.num_classes)
            done += len(rows)
        if counts.tolist() != [copies * count for count in self.manifest.class_counts]:
            raise UserError(
                f"The labels in {self.folder} do not match the counts in its manifest: `repa check {self.folder} --full` names the files "
                "that changed. If it names none, manifest.json changed: restore it from a copy, or prepare the data again."
            )
        return labels

    def gather(self, field: str, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Stored values of a field (images, labels, moments, features.NAME, scale.NAME, pooled.NAME) in the order of
        `indices` (n,); into `out`, if given.

        Raises UserError when there is no such field.
        """
        return self.reader.gather(field, indices, out)

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[tuple[str, ...]]:
        """The captions of the images `indices` (n,), in that order; () for an image without captions."""
        return self._captions.gather(indices)

    @functools.cached_property
    def texts(self) -> TextReader:
        """The stored tokens of the captions."""
        return TextReader(self.folder, self.manifest, self.stream.path if self.stream else None)

    def basis(self, encoder: str, device: torch.device | str) -> Tensor | None:
        """The basis for `packing.unpack` of tokens stored as coordinates, (1 + K, D); None for other forms."""
        facts = self.features[encoder]
        if facts.basis is None:
            return None
        return read_basis(self.reader.path(facts.basis).parent, facts, device)

    def check(self, report: Callable[[int, int, str], None] | None = None) -> int:
        """Compare every file with its checksum; returns the number of bytes read.

        Args:
            report: called with (bytes done, total bytes, file).

        Raises:
            UserError: some files changed; the message names the first five.
        """
        records, changed, done = self.manifest.records, [], 0
        total = sum(record.size for record in records)
        for record in records:
            if sha256(self.reader.path(record)) != record.sha256:
                changed.append(record.file)
            done += record.size
            if report:
                report(done, total, record.file)
        if changed:
            raise UserError(
                f"{len(changed)} of {len(records)} files in {self.folder} do not match their checksums "
                f"({', '.join(changed[:5])}): delete them and run the same `repa prepare` again."
            )
        return done

    def summary(self) -> dict[str, Any]:
        """What identifies the data of a run; features may be added later without changing it."""
        return {
            "source": self.manifest.source,
            "num_images": self.num_images,
            "resolution": self.resolution,
            "class_names": list(self.class_names),
            "class_counts": list(self.manifest.class_counts),
            "autoencoder": self.manifest.autoencoder,
        }


def open_data(path: str | Path) -> DataSet:
    """Open a folder of `prepare`, or a copy of one at an fsspec URL such as s3://bucket/data.

    Raises UserError if it is missing, unfinished, damaged or unreachable.
    """
    if is_url(path):
        stream = RemoteFiles(str(path))
        return DataSet(str(path), stream.manifest(), stream)
    return DataSet(Path(path), Manifest.open(path))


def open_checked(path: str | Path) -> DataSet:
    """`open_data`, with the checksums of all files of a small set, for commands whose results changed bytes would spoil.

    Files of a URL are checked when they arrive; `repa check DATA --full` checks any folder.
    """
    data = open_data(path)
    if data.num_bytes <= CHECKED_AT_START and not data.stream:
        data.check()
    return data


# Commands that use a prepared folder reuse the local weights of `prepare`. A folder may be untrusted: a path in it is
# used only if its file has the recorded checksum, and only tensors are read from it, never code.


def autoencoder_weights(data: DataSet, given: str) -> str:
    """Path of the autoencoder's weights: the given path, else that of `prepare` if it exists; "" means the hub's."""
    recorded = data.manifest.config.autoencoder_weights
    return given or (recorded if data.manifest.autoencoder.get("sha256") and Path(recorded).exists() else "")


def feature_weights(data: DataSet, given: Mapping[str, str], encoders: list[str]) -> dict[str, str]:
    """Encoder -> path: the given ones, and for other `encoders` those of `prepare` that still exist."""
    recorded = {spec: path for spec in encoders if (path := encoder_weights(data, spec))}
    return {**recorded, **given}


def encoder_weights(data: DataSet, spec: str) -> str | None:
    """Path of the local weights that made an encoder's stored features, or None."""
    recorded = data.manifest.config.feature_weights.get(canonical(spec))
    return recorded if recorded and _checksum(data, spec) and Path(recorded).exists() else None


def load_encoder_of(
    data: DataSet, spec: str, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> VisionEncoder:
    """Like `load_encoder`; without `weights` it uses those of `prepare`, which must have the recorded checksum."""
    recorded = None if weights else encoder_weights(data, spec)
    encoder = load_encoder(spec, weights=weights or recorded, device=device)
    if recorded:
        require_same_encoder(data, spec, encoder)
    return encoder


def require_same_encoder(data: DataSet, spec: str, encoder: VisionEncoder) -> None:
    """UserError if the stored features are from other weights of this encoder."""
    recorded = _checksum(data, spec)
    if recorded and encoder.identity.get("weights_sha256") != recorded:
        raise UserError(
            f"The features of {spec} in {data.folder} were made by weights with the checksum {str(recorded)[:12]}, but "
            f"{encoder.weights_file} has {str(encoder.identity.get('weights_sha256'))[:12]}: give the same weights as "
            f"--feature-weights {spec}=PATH."
        )


def _checksum(data: DataSet, spec: str) -> str | None:
    facts = data.features.get(canonical(spec))
    return facts.identity.get("weights_sha256") if facts else None
