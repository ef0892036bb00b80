"""Where images come from: a folder or zip of class folders (or of images), or the built-in photographs."""

import hashlib
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from repa.base import files
from repa.base.errors import UserError, nearest
from repa.base.images import adm_centre_crop, decode_image
from repa.base.registry import parse_spec
from repa.data.photographs import PHOTOGRAPHS, load_photographs, photograph_crop

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_FILE_SIZE = 1 << 28  # bytes of one image file, unpacked
ONE_CLASS = "all"
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of which no more is unpacked than asked for


class Source(Protocol):
    """Images in a fixed order, each with a class."""

    class_names: list[str]
    labels: np.ndarray  # (N,) int64
    identity: dict  # what it is and a checksum of the list: equal for equal images, wherever they lie

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        ...

    def image(self, index: int, resolution: int) -> Image.Image:
        """Image `index` as RGB (resolution, resolution); raises UserError if it cannot be read. Thread-safe."""
        ...


def open_source(spec: str | Path) -> Source:
    """A folder, a zip file, or `photographs[:num=10000,seed=0]`.

    Top-level folders are the classes, in sorted order; images without folders make one class. Files are sorted by path.

    Raises:
        UserError: nothing there, no images, loose images beside folders, a damaged or unsafe archive, unknown settings.
    """
    path = Path(spec)
    if str(spec).partition(":")[0] == "photographs":
        _, settings = parse_spec(str(spec))
        for key in settings:
            if key not in ("num", "seed"):
                raise UserError(
                    f"{spec!r} has no setting {key!r}: allowed are num, seed.{nearest(key, ('num', 'seed'))}"
                )
        if path.exists():
            raise UserError(
                f"{str(spec)!r} names the built-in photographs, and here is a folder of that name: write ./{spec} for it."
            )
        return PhotographSource(**settings)
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        return ZipSource(path)
    raise UserError(f"There is no source {str(spec)!r}: give a folder of images, a zip file, or 'photographs'.")


class FileSource(ABC):
    """What folders and zips share: a sorted list of relative paths, classes from their first part.

    One folder around everything (`train/cat/...`) is no class and is left out of the paths.
    """

    def __init__(self, where: str, paths: Sequence[str], marks: Sequence[int]):
        if not paths:
            raise UserError(
                f"{where} holds no images: files named {' '.join(EXTENSIONS)} are looked for, at any depth."
            )
        order = sorted(range(len(paths)), key=paths.__getitem__)
        tops = {path.partition("/")[0] for path in paths}
        around = len(tops) == 1 and any(path.count("/") > 1 for path in paths)  # one folder around the class folders
        self._prefix = f"{tops.pop()}/" if around else ""
        paths = [path.removeprefix(self._prefix) for path in paths]
        self.paths = [paths[i] for i in order]
        nested = ["/" in path for path in self.paths]
        if any(nested) and not all(nested):
            loose = self.paths[nested.index(False)]
            raise UserError(
                f"{where} holds folders of images and loose images such as {loose}: "
                "move every image into the folder of its class."
            )
        classes = [path.partition("/")[0] if "/" in path else ONE_CLASS for path in self.paths]
        self.class_names = sorted(set(classes))
        index = {name: label for label, name in enumerate(self.class_names)}
        self.labels = np.array([index[name] for name in classes], np.int64)
        self.class_names = [_printable(name) for name in self.class_names]
        listing = "\n".join(f"{paths[i]} {marks[i]}" for i in order)
        digest = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
        self.identity = {"name": Path(where).name, "num_images": len(paths), "sha256": digest}

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return _printable(self.paths[index])

    def image(self, index: int, resolution: int) -> Image.Image:
        image = decode_image(self.read(index), self.name(index))
        try:
            return adm_centre_crop(image, resolution)
        except UserError as error:
            raise UserError(f"{self.name(index)}: {error}") from error

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of a file."""


class FolderSource(FileSource):
    """Images in a folder, links followed."""

    def __init__(self, root: Path):
        self.root = root
        found = list(_walk(root, frozenset()))
        relative = [Path(entry.path).relative_to(root).as_posix() for entry in found]
        super().__init__(str(root), relative, [_size(entry) for entry in found])

    def read(self, index: int) -> bytes:
        path = self.root / (self._prefix + self.paths[index])
        try:
            if (size := path.stat().st_size) <= MAX_FILE_SIZE:
                return path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.name(index)} cannot be read: {error.strerror}.") from error
        raise UserError(
            f"{self.name(index)} has {files.size(size)}, more than an image may have "
            f"({files.size(MAX_FILE_SIZE)}): remove it."
        )


def _walk(folder: Path | str, above: frozenset[str]) -> Iterator[os.DirEntry]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that holds it
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    for entry in entries:
        if _hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, above | {real})
        elif entry.name.lower().endswith(EXTENSIONS):
            yield entry


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a broken link: reading it says so
        return -1


class ZipSource(FileSource):
    """Images in a zip file. Nothing is ever unpacked to disk."""

    def __init__(self, path: Path):
        self.path = path
        self._archives: dict[int, zipfile.ZipFile] = {}  # by process: a handle must not be shared over a fork
        for member in self._archive().infolist():
            self._require_safe(member)
        members = {m.filename: m for m in self._archive().infolist() if _is_image(m)}
        super().__init__(str(path), list(members), [member.CRC for member in members.values()])

    def read(self, index: int) -> bytes:
        name = self._prefix + self.paths[index]
        try:
            with self._archive().open(
                name
            ) as member:  # asked for its declared size: a bare read() unpacks all there is
                return member.read(self._archive().getinfo(name).file_size)
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.name(index)} in {self.path} cannot be read: {error}.") from error

    def _archive(self) -> zipfile.ZipFile:
        if os.getpid() not in self._archives:
            try:
                self._archives[os.getpid()] = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"{self.path} is not a folder and cannot be read as a zip file: {error}.") from error
        return self._archives[os.getpid()]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_archives": {}}

    def _require_safe(self, member: zipfile.ZipInfo) -> None:
        """Refuse archives made to do harm, before anything of them is read."""
        name = member.orig_filename.replace("\\", "/")
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
            raise UserError(
                f"{self.path} holds {member.orig_filename!r}, a path that leads out of the archive: "
                "it is refused, pack it again without that path."
            )
        if member.file_size > MAX_FILE_SIZE:
            raise UserError(
                f"{name} in {self.path} unpacks to {files.size(member.file_size)}, more than an image may "
                f"({files.size(MAX_FILE_SIZE)}): the archive is refused, pack it again without that file."
            )
        if member.flag_bits & 1:
            raise UserError(f"{name} in {self.path} is encrypted: pack the archive again without a password.")
        if member.compress_type not in METHODS:
            raise UserError(f"{name} in {self.path} is not compressed by Deflate: pack the archive again by plain zip.")


class PhotographSource:
    """Random crops of the built-in photographs, one class for each photograph."""

    def __init__(self, *, num: int = 10_000, seed: int = 0):
        for key, value, least in (("num", num, 1), ("seed", seed, 0)):
            if type(value) is not int or value < least:
                raise UserError(f"photographs:{key} was given {value!r}: it is an integer of at least {least}.")
        load_photographs()
        self.seed = seed
        self.class_names = list(PHOTOGRAPHS)
        self.labels = np.arange(num, dtype=np.int64) % len(PHOTOGRAPHS)
        self.identity = {"name": "photographs", "num_images": num, "seed": seed}

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"photograph {index}"

    def image(self, index: int, resolution: int) -> Image.Image:
        return photograph_crop(index, resolution, self.seed)


def _printable(name: str) -> str:
    """File names that are not UTF-8 cannot be written into a manifest as they are."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(member: zipfile.ZipInfo) -> bool:
    hidden = any(_hidden(part) for part in member.filename.split("/"))
    return not hidden and not member.is_dir() and member.filename.lower().endswith(EXTENSIONS)
