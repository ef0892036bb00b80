"""CIFAR-10 and CIFAR-100 as their binary version has them: one record of label and pixels after the other."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from repa.base import files
from repa.base.errors import UserError
from repa.data.sources.contract import Source
from repa.data.sources.labels import labels_digest, named, no_classes

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # red, green, blue planes, rows from the top
TEN = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
HUNDRED = {"train": ("train.bin",), "test": ("test.bin",)}
NAMES = {"ten": "batches.meta.txt", "fine": "fine_label_names.txt", "coarse": "coarse_label_names.txt"}
NUM_CLASSES = {"ten": 10, "fine": 100, "coarse": 20}


def is_cifar(folder: Path) -> bool:
    """Whether a folder holds a binary version; raises UserError for the pickles of the Python version."""
    if (folder / "batches.meta").is_file() or ((folder / "meta").is_file() and (folder / "train").is_file()):
        raise UserError(
            f"{folder} is CIFAR's Python version, whose pickles can run any program when they are read: "
            "take the binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz), and unpack it."
        )
    return any((folder / name).is_file() for names in (*TEN.values(), *HUNDRED.values()) for name in names)


class CifarSource(Source):
    """A folder such as cifar-10-batches-bin or cifar-100-binary."""

    def __init__(self, folder: Path, labels: str = "", *, split: str = "train", label: str = "fine"):
        """
        Args:
            folder: where the .bin files lie.
            labels: "" for CIFAR's, or "none".
            split: train or test.
            label: of CIFAR-100, the 100 fine or the 20 coarse classes.
        """
        for key, value, allowed in (("split", split, TEN), ("label", label, ("fine", "coarse"))):
            if value not in allowed:
                raise UserError(f"{folder}:{key} was given {value!r}: allowed are {', '.join(allowed)}.")
        ten = any((folder / name).is_file() for names in TEN.values() for name in names)
        if ten and label != "fine":
            raise UserError(f"{folder} is CIFAR-10, which has one kind of label: leave out label={label}.")
        kind = "ten" if ten else label
        self.paths = [folder / name for name in (TEN if ten else HUNDRED)[split]]
        self._head = 1 if ten else 2  # CIFAR-100: coarse, then fine
        self._records = [self._map(path) for path in self.paths]
        self._ends = np.cumsum([len(records) for records in self._records])
        column = 1 if kind == "fine" else 0
        numbers = np.concatenate([records[:, column] for records in self._records]).astype(np.int64)
        if labels == "none":
            classes, self.labels_from = no_classes(len(numbers)), "--labels none: one class"
        else:
            classes = named(numbers, _names(folder, kind), self._name, str(folder))
            self.labels_from = (
                f"the {kind} classes of CIFAR-100" if kind in ("fine", "coarse") else "the classes of CIFAR-10"
            )
        self.labels, self.class_names = classes
        self.identity = {
            "name": folder.name,
            "num_images": len(numbers),
            "split": split,
            "sha256": [files.sha256(path) for path in self.paths],
            "labels_sha256": labels_digest(classes),
        }

    def name(self, index: int) -> str:
        return self._name(index)

    def decode(self, index: int) -> Image.Image:
        file, record = self._find(index)
        pixels = self._records[file][record, self._head :].reshape(3, SIDE, SIDE)
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    def _name(self, index: int) -> str:
        file, record = self._find(index)
        return f"{self.paths[file].name}[{record}]"

    def _find(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, int(index - (self._ends[file - 1] if file else 0))

    def _map(self, path: Path) -> np.ndarray:
        """(n, head + 3072) uint8."""
        length = self._head + PIXELS
        if not path.is_file():
            raise UserError(f"{path} is missing: unpack the whole archive of CIFAR's binary version.")
        if not (size := path.stat().st_size) or size % length:
            raise UserError(
                f"{path} has {size:,} bytes, which is no multiple of a record ({length:,}): fetch it again."
            )
        return np.memmap(path, np.uint8, "r").reshape(-1, length)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._records = [self._map(path) for path in self.paths]


def _names(folder: Path, kind: str) -> list[str]:
    """The names of the classes; their numbers where the file of names is missing."""
    path = folder / NAMES[kind]
    if not path.is_file():
        return [str(number) for number in range(NUM_CLASSES[kind])]
    names = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if len(names) != NUM_CLASSES[kind]:
        raise UserError(f"{path} holds {len(names)} names, but there are {NUM_CLASSES[kind]} classes: fetch it again.")
    return names
