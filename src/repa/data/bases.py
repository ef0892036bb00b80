"""What the tokens of a folder are coordinates of: found once, stored once, for each encoder."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from repa.base import files, lock
from repa.base.arrays import load_npy, save_npy
from repa.data.groups import FeatureGroup
from repa.data.manifest import PARTS, Manifest
from repa.data.packing import principal_basis
from repa.data.reading import Planned, Read, spread
from repa.data.shards import plain_name

SAMPLE = 1024  # images that directions are found on: 262,144 tokens of a 16 x 16 grid


def basis_name(spec: str) -> str:
    """Where the mean and the directions of an encoder's tokens lie."""
    return f"{plain_name(f'basis.{spec}')}.npy"


def basis_of(out: Path, spec: str, find: Callable[[], np.ndarray]) -> tuple[np.ndarray, str]:
    """The stored basis of an encoder and its checksum; found and stored by the first process that wants it."""
    path = out / basis_name(spec)
    with lock.held(out / PARTS / f"{basis_name(spec)}.lock"):
        if not path.is_file():
            basis = find()
            save_npy(path, basis)
    return load_npy(path, "a basis of tokens", "Delete it, and it is found again."), files.sha256(path)


def find_basis(group: FeatureGroup, read: Read, shards: Sequence[Planned]) -> np.ndarray:
    """Mean and directions (1 + K, D) of an encoder's tokens of images from all over the source."""
    size = group.config.batch_size
    images = (images.pixels for _, images in read(spread(shards, SAMPLE)) if len(images.labels))
    batches = iter(lambda: list(itertools.islice(images, size)), [])
    tokens = (group.features(np.concatenate(batch)).patches for batch in batches)
    return principal_basis(tokens, group.num_directions)


def lost_bases(out: Path, manifest: Manifest | None, names: Iterable[str]) -> list[str]:
    """Encoders whose tokens are there, but not what they are coordinates of; it is found again."""
    stored = manifest.features if manifest else {}
    return [name for name in names if name in stored and (b := stored[name].basis) and not b.intact(out)]
