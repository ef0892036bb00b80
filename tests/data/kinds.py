"""The same images as every kind of source, with image files or with pixels."""

import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.oracles.data import noise_image


class Picture(NamedTuple):
    """The bytes of an image file, its class and its captions."""

    data: bytes
    ending: str
    label: int
    captions: tuple[str, ...] = ()


CLASSES = ("ant", "bee")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pictures(num: int = 5, size: int = 12) -> list[Picture]:
    """Noise images: the first 3 are ants; the second has no caption, the third has two."""
    captions = [("an ant",), (), ("ein Käfer 🐞", "another")]
    return [
        Picture(png(noise_image(i, size, size)), "png", int(i >= 3), captions[i] if i < 3 else ("a bee",))
        for i in range(num)
    ]


def as_folder(root: Path, items: Sequence[Picture]) -> str:
    for i, item in enumerate(items):
        folder = root / "pictures" / CLASSES[item.label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.{item.ending}").write_bytes(item.data)
        if item.captions:
            (folder / f"{i:03d}.txt").write_text("\n".join(item.captions), encoding="utf-8")
    return str(root / "pictures")


def as_zip(root: Path, items: Sequence[Picture]) -> str:
    with zipfile.ZipFile(root / "pictures.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, item in reversed(list(enumerate(items))):
            stem = f"{CLASSES[item.label]}/{i:03d}"
            archive.writestr(f"{stem}.{item.ending}", item.data)
            if item.captions:
                archive.writestr(f"{stem}.txt", "\n".join(item.captions))
    return str(root / "pictures.zip")


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_shard(path: Path, items: Sequence[Picture], first: int = 0, names: bool = True) -> None:
    """Samples with a .cls (class name or number) and a .txt with captions."""
    with tarfile.open(path, "w") as archive:
        for i, item in enumerate(items, start=first):
            add(archive, f"{i:06d}.{item.ending}", item.data)
            add(archive, f"{i:06d}.cls", (CLASSES[item.label] if names else str(item.label)).encode())
            if item.captions:
                add(archive, f"{i:06d}.txt", "\n".join(item.captions).encode())


def as_shards(root: Path, items: Sequence[Picture]) -> str:
    """Two shards, the first with two samples."""
    write_shard(root / "shard-0.tar", items[:2])
    write_shard(root / "shard-1.tar", items[2:], first=2)
    return str(root / "shard-{0..1}.tar")


def as_shards_with_json(root: Path, items: Sequence[Picture]) -> str:
    with tarfile.open(root / "json.tar", "w") as archive:
        for i, item in enumerate(items):
            meta = {"label": CLASSES[item.label], "caption": list(item.captions)}
            add(archive, f"{i:06d}.json", json.dumps(meta).encode())
            add(archive, f"{i:06d}.{item.ending}", item.data)
    return str(root / "json.tar")


def as_pipe(root: Path, items: Sequence[Picture]) -> str:
    write_shard(root / "away.tar", items)
    return f"pipe:cat '{root / 'away.tar'}'"


def as_url(root: Path, items: Sequence[Picture]) -> str:
    write_shard(root / "away.tar", items)
    return f"file://{root / 'away.tar'}"


def _table(items: Sequence[Picture]):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(CLASSES)),
            "caption": datasets.List(datasets.Value("string")),
        }
    )
    rows = {
        "image": [{"bytes": item.data, "path": None} for item in items],
        "label": [item.label for item in items],
        "caption": [list(item.captions) for item in items],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def as_parquet(root: Path, items: Sequence[Picture]) -> str:
    """Two files with row groups of two."""
    from pyarrow import parquet

    table = _table(items).with_format("arrow")[:]
    parquet.write_table(table.slice(0, 3), root / "part-0.parquet", row_group_size=2)
    parquet.write_table(table.slice(3), root / "part-1.parquet", row_group_size=2)
    return str(root / "part-*.parquet")


def as_remote_parquet(root: Path, items: Sequence[Picture]) -> str:
    as_parquet(root, items)
    return f"file://{root}/part-{{0..1}}.parquet"


def as_saved(root: Path, items: Sequence[Picture]) -> str:
    _table(items).save_to_disk(str(root / "saved"))
    return str(root / "saved")


def as_arrow(root: Path, items: Sequence[Picture]) -> str:
    return f"{as_saved(root, items)}/data-00000-of-00001.arrow"


FILES = {  # sources with image files
    "folder": as_folder,
    "zip": as_zip,
    "webdataset": as_shards,
    "webdataset json": as_shards_with_json,
    "webdataset pipe": as_pipe,
    "webdataset url": as_url,
    "parquet": as_parquet,
    "parquet url": as_remote_parquet,
    "save_to_disk": as_saved,
    "arrow": as_arrow,
}


def pixels(items: Sequence[Picture]) -> np.ndarray:
    """(n, H, W, 3) uint8."""
    return np.stack([np.asarray(Image.open(io.BytesIO(item.data)).convert("RGB")) for item in items])


def labels(items: Sequence[Picture]) -> np.ndarray:
    return np.array([item.label for item in items])


def as_npy(root: Path, items: Sequence[Picture]) -> str:
    np.save(root / "images.npy", pixels(items))
    return str(root / "images.npy")


def as_npz(root: Path, items: Sequence[Picture]) -> str:
    np.savez(root / "stored.npz", images=pixels(items), labels=labels(items))
    return str(root / "stored.npz")


def as_packed_npz(root: Path, items: Sequence[Picture]) -> str:
    np.savez_compressed(root / "packed.npz", arr_0=pixels(items).transpose(0, 3, 1, 2), arr_1=labels(items)[:, None])
    return str(root / "packed.npz")


def cifar_record(image: np.ndarray, *numbers: int) -> bytes:
    return bytes(numbers) + image.transpose(2, 0, 1).tobytes()


def as_cifar(root: Path, items: Sequence[Picture]) -> str:
    """CIFAR-10's layout: five batches with one image each; the test batch repeats the last."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    images = [np.asarray(Image.fromarray(image).resize((32, 32))) for image in pixels(items)]
    for number in range(5):
        (folder / f"data_batch_{number + 1}.bin").write_bytes(cifar_record(images[number], items[number].label))
    (folder / "test_batch.bin").write_bytes(cifar_record(images[-1], 1))
    (folder / "batches.meta.txt").write_text("\n".join([*CLASSES, *"cdefghij", ""]))
    return str(folder)


ARRAYS = {"npy": as_npy, "npz": as_npz, "compressed npz": as_packed_npz, "cifar": as_cifar}
