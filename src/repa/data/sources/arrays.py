"""Images in arrays: .npy, .npz with labels, and the binary version of CIFAR-10 and CIFAR-100."""

import functools
import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from repa.base import files
from repa.base.arrays import LIMIT, load_npy, map_npz, require_checksum
from repa.base.errors import UserError
from repa.data.sources.archives import open_zip
from repa.data.sources.contract import Classes, Source, one_class
from repa.data.sources.labels import classes_of, like_labels, named

IMAGE_KEYS = ("images", "image", "arr_0", "x", "x_train", "data")
LABEL_KEYS = ("labels", "label", "arr_1", "y", "y_train", "targets")
MAX_UNPACKED = 1 << 32  # bytes of a compressed array, all of which is kept in memory
CHANNELS = (1, 3)
WHOLE = 1 << 30  # bytes; the checksum covers all of a file up to this size, which takes about a second at every start
PIECES, PIECE = 64, 1 << 20  # sampled from a larger file, because all of it could take minutes
CIFAR_SIDE = 32
CIFAR_PIXELS = 3 * CIFAR_SIDE * CIFAR_SIDE  # red, green, blue planes, rows from the top
CIFAR_10 = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
CIFAR_100 = {"train": ("train.bin",), "test": ("test.bin",)}
CIFAR_NAMES = {"ten": "batches.meta.txt", "fine": "fine_label_names.txt", "coarse": "coarse_label_names.txt"}
CIFAR_CLASSES = {"ten": 10, "fine": 100, "coarse": 20}


class ArraySource(Source):
    """A uint8 array (N, H, W, C), (N, C, H, W) or (N, H, W) with 1 or 3 channels. Pickles are never read.

    Images are read one by one from an .npy, or from an .npz of `np.savez`. Those of `np.savez_compressed` are unpacked
    into memory.
    """

    def __init__(self, path: Path, labels: str = "", *, image: str = "", label: str = ""):
        """
        Args:
            path: an .npy or .npz file.
            labels: "" for the array of labels in the .npz; "none"; or an .npy file.
            image: key of the images in the .npz; "": the first of IMAGE_KEYS that exists.
            label: key of the labels; "": the first of LABEL_KEYS that exists.
        """
        self.path = path
        self._key = image
        if path.suffix.lower() == ".npy" and image:
            raise UserError(f"{path} is a single array without the key {image!r}: leave out the setting 'image'.")
        if path.suffix.lower() != ".npy":
            self._key = _Npz(path).choose(self._key, IMAGE_KEYS, "images")
        self._require_images(self._images)
        # Unpacking compares the checksum already, and more than LIMIT takes minutes.
        if self._key and isinstance(self._images, np.memmap) and self._images.nbytes <= LIMIT:
            require_checksum(path, "an array", self._key)
        self._last = _channels_last(self._images.shape, path)
        self._identify(self._classes(labels, label), path.name, sha256=_fingerprint(path))

    @functools.cached_property
    def _images(self) -> np.ndarray:
        return _Npz(self.path).array(self._key) if self._key else load_npy(self.path, "an array", mapped=True)

    def name(self, index: int) -> str:
        return f"{self.path.name}[{index}]"

    def decode(self, index: int) -> Image.Image:
        pixels = np.asarray(self._images[index])
        if pixels.ndim == 3:
            pixels = pixels if self._last else pixels.transpose(1, 2, 0)  # (H, W, C)
            pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
        return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")

    def _require_images(self, images: np.ndarray) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
            raise UserError(
                f"{self.path} holds {images.dtype} {images.shape}: convert the images to uint8, from 0 to 255, and "
                "save them as (N, H, W, C), (N, C, H, W) or (N, H, W)."
            )

    def _classes(self, labels: str, key: str) -> Classes:
        num = len(self._images)
        if labels == "none":
            return one_class(num, labels)
        if labels.endswith(".npy"):
            return self._checked(load_npy(labels, "an array"), labels)
        if labels:
            raise UserError(f"labels is {labels!r}: leave it out for {self.path.name}, or give 'none' or an .npy file.")
        if self.path.suffix.lower() == ".npy":
            return one_class(num)
        archive = _Npz(self.path)
        if not key and not any(name in archive.names for name in LABEL_KEYS):
            if others := like_labels(archive.names):
                raise UserError(
                    f"{self.path} has no array called {' or '.join(LABEL_KEYS[:3])}, but it has {', '.join(others)}: "
                    f"choose the labels with {self.path}:label={others[0]}, or give --labels none for one class."
                )
            self.left_out = self._others(archive)
            return one_class(num)
        key = archive.choose(key, LABEL_KEYS, "labels")
        self.left_out = self._others(archive, key)
        values = archive.array(key)
        require_checksum(self.path, "an array", key)
        return self._checked(values, f"the array {key!r} of {self.path.name}")

    def _others(self, archive: "_Npz", label: str = "") -> dict[str, int]:
        return {f"array {name!r}": 1 for name in archive.names if name not in (label, self._key)}

    def _checked(self, labels: np.ndarray, where: str) -> Classes:
        num = len(self._images)
        if labels.shape not in ((num,), (num, 1)) or labels.dtype.kind not in "iufU":
            raise UserError(
                f"{where} is {labels.dtype} {labels.shape}: save one integer or text for each of the {num:,} images, "
                f"as an array of shape ({num},)."
            )
        return classes_of(labels.reshape(num).tolist(), self.name, where)


class _Npz:
    """The arrays of an untrusted .npz, by name."""

    def __init__(self, path: Path):
        self.path = path
        with open_zip(path) as archive:
            self.names = sorted(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))

    def choose(self, key: str, usual: tuple[str, ...], content: str) -> str:
        """This key, or without one the first usual name that exists; raises UserError if there is none."""
        keys = [name for name in ((key,) if key else usual) if name in self.names]
        if not keys:
            raise UserError(
                f"{self.path} has no array {key or ' or '.join(usual)!r}: it has {', '.join(self.names) or 'none'}. "
                f"Choose the {content} with {self.path}:{content.removesuffix('s')}=NAME."
            )
        return keys[0]

    def array(self, name: str) -> np.ndarray:
        return map_npz(self.path, "an array", name, remedy="Save it with np.savez, or as .npy.", limit=MAX_UNPACKED)


def _fingerprint(path: Path) -> str:
    """A checksum of the file; above WHOLE bytes, of its size and of PIECES evenly spaced slices."""
    size = path.stat().st_size
    if size <= WHOLE:
        return files.sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for place in np.linspace(0, max(size - PIECE, 0), PIECES).astype(np.int64).tolist():
            file.seek(place)
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def _channels_last(shape: tuple[int, ...], path: Path) -> bool:
    """Whether the last axis has the channels, judged by its length."""
    if len(shape) == 3:
        # three axes are (N, H, W) of grey images, but also (H, W, C) or (C, H, W) of a single colour image
        if shape[2] in (3, 4) or shape[0] == 3:
            raise UserError(
                f"{path} holds an array of shape {shape}, which is either a single colour image or {shape[0]} grey "
                f"images of {shape[1]} x {shape[2]} pixels: save images as (N, H, W, C), with C = 1 for grey."
            )
        return True
    # a wrong guess would turn images of 3 x H x 3 on their sides, and nothing later would notice
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first == last:
        raise UserError(
            f"{path} holds images of shape {shape[1:]}, whose colour axis is ambiguous or missing: save them as (N, H, "
            f"W, C), with C one of {', '.join(map(str, CHANNELS))} and sides of more than {max(CHANNELS)} pixels."
        )
    return last


def is_cifar(folder: Path) -> bool:
    """Whether a folder holds a binary version; raises UserError for the pickles of the Python version."""
    if (folder / "batches.meta").is_file() or ((folder / "meta").is_file() and (folder / "train").is_file()):
        raise UserError(
            f"{folder} is CIFAR's Python version, whose pickles can run any program when they are read: "
            "download the binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz) and unpack it."
        )
    return any((folder / name).is_file() for names in (*CIFAR_10.values(), *CIFAR_100.values()) for name in names)


class CifarSource(Source):
    """A folder such as cifar-10-batches-bin or cifar-100-binary."""

    def __init__(self, folder: Path, labels: str = "", *, split: Literal["train", "test"] = "train",
        label: Literal["fine", "coarse"] = "fine",
    ):  # fmt: skip
        """
        Args:
            folder: the folder of the .bin files.
            labels: "" for CIFAR's own, or "none".
            split: train or test.
            label: the 100 fine or the 20 coarse classes of CIFAR-100.
        """
        ten = any((folder / name).is_file() for names in CIFAR_10.values() for name in names)
        if ten and label != "fine":
            raise UserError(f"{folder} is CIFAR-10, which has only one kind of label: leave out label={label}.")
        kind = "ten" if ten else label
        self.paths = [folder / name for name in (CIFAR_10 if ten else CIFAR_100)[split]]
        self._head = 1 if ten else 2  # label bytes; in CIFAR-100 coarse, then fine
        self._ends = np.cumsum([len(records) for records in self._records])
        column = 1 if kind == "fine" else 0
        numbers = np.concatenate([records[:, column] for records in self._records]).tolist()
        if labels == "none":
            classes = one_class(len(numbers), labels)
        else:
            classes = named(numbers, _class_names(folder, kind), self.name, str(folder))
            classes = classes._replace(origin="the classes of CIFAR-10" if ten else f"the {kind} classes of CIFAR-100")
        self._identify(classes, folder.name, split=split, sha256=[files.sha256(path) for path in self.paths])

    @functools.cached_property
    def _records(self) -> list[np.ndarray]:
        return [self._map(path) for path in self.paths]

    def name(self, index: int) -> str:
        file, record = self._find(index)
        return f"{self.paths[file].name}[{record}]"

    def decode(self, index: int) -> Image.Image:
        file, record = self._find(index)
        pixels = self._records[file][record, self._head :].reshape(3, CIFAR_SIDE, CIFAR_SIDE)
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    def _find(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, int(index - (self._ends[file - 1] if file else 0))

    def _map(self, path: Path) -> np.ndarray:
        """(n, head + 3072) uint8."""
        length = self._head + CIFAR_PIXELS
        if not path.is_file():
            raise UserError(f"{path} is missing: unpack the complete archive of CIFAR's binary version.")
        if not (size := path.stat().st_size) or size % length:
            raise UserError(
                f"{path} has {size:,} bytes, not a multiple of the {length:,} of a record: download it again."
            )
        return np.memmap(path, np.uint8, "r").reshape(-1, length)


def _class_names(folder: Path, kind: str) -> list[str]:
    """The names of the classes, or their numbers if the file of names is missing."""
    path = folder / CIFAR_NAMES[kind]
    if not path.is_file():
        return [str(number) for number in range(CIFAR_CLASSES[kind])]
    names = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if len(names) != CIFAR_CLASSES[kind]:
        raise UserError(
            f"{path} holds {len(names)} names, but there are {CIFAR_CLASSES[kind]} classes: download it again."
        )
    return names
