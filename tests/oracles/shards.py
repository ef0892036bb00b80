"""Data folders without models, where every field of image i is a known function of i."""

import math

import numpy as np

from repa.data import DataSet, Manifest, PrepareConfig, open_data
from repa.data.config import array_name
from repa.data.records import ArrayFile, Shard
from repa.data.writing import ShardWriter

SIDE, CHANNELS = 4, 2


def label(i: int) -> int:
    return i % 3


def moments(i: int) -> np.ndarray:
    """Moments (2C, h, w) that differ between all images."""
    return (i % 2000 + np.arange(2 * CHANNELS * SIDE**2).reshape(2 * CHANNELS, SIDE, SIDE) / 128).astype(np.float16)


def images(i: int) -> np.ndarray:
    return np.full((3, 8, 8), i % 251, np.uint8)


def write_data(folder, sizes, *, fields=("labels", "moments", "images"), extra=None, features=None) -> Manifest:
    """Write shards of the given sizes. `extra`: field -> function of i; `features`: encoder -> FeatureField."""
    makers = {"labels": lambda i: np.int64(label(i)), "moments": moments, "images": images, **(extra or {})}
    shards, start = [], 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        with ShardWriter(folder, number) as writer:
            for field in dict.fromkeys((*fields, *(extra or {}))) if size else ():
                writer.append({field: np.stack([makers[field](i) for i in range(start, start + size)])})
        shards.append(Shard(num=size, files=writer.records() if size else {}))
        start += size
    counts = np.bincount([label(i) for i in range(start)], minlength=3)
    manifest = _manifest(start, shards, counts, features or {})
    manifest.save(folder)
    return manifest


def sparse_data(folder, num: int, shape=(4, 2, 2), shard_size=1 << 18) -> DataSet:
    """Write labels and moments of `num` images, all zero, in sparse files that take no space on disk."""
    folder.mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, num, shard_size)):
        size, records = min(shard_size, num - start), {}
        for field, dtype, row in (("labels", "int64", ()), ("moments", "float16", shape)):
            path = folder / array_name(field, number)
            with open(path, "wb") as file:
                descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
                np.lib.format.write_array_header_1_0(
                    file, {"descr": descr, "fortran_order": False, "shape": (size, *row)}
                )
                file.truncate(file.tell() + size * math.prod(row) * np.dtype(dtype).itemsize)
            records[field] = ArrayFile(
                file=path.name, dtype=dtype, shape=(size, *row), size=path.stat().st_size, sha256="0" * 64
            )
        shards.append(Shard(num=size, files=records))
    _manifest(num, shards, (num, 0, 0), {}).save(folder)
    return open_data(folder)


def _manifest(num: int, shards, counts, features) -> Manifest:
    return Manifest(
        source={"name": "numbers", "num_images": num},
        config=PrepareConfig(resolution=8, autoencoder="kl:hub=a/b"),
        num_images=num,
        class_names=("a", "b", "c"),
        class_counts=tuple(int(count) for count in counts),
        autoencoder={"name": "numbers"},
        features=features,
        shards=tuple(shards),
    )
