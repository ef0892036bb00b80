"""Images as files: what folders and zips share, and folders."""

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from repa.base import faults, files
from repa.base.errors import UserError
from repa.base.images import decode_image
from repa.data.sources.contract import Source, Strings, printable
from repa.data.sources.labels import ONE_CLASS, Classes, from_file, from_listing, labels_digest, no_classes

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_FILE_SIZE = 1 << 28  # bytes of one image file, unpacked
LISTING = "dataset.json"  # of EDM2 and REPA: labels of images whose folders are no classes
CAPTION = ".txt"  # a text beside an image, of the same name


class FileSource(Source):
    """A sorted list of relative paths; the class is the first part, unless labels come from elsewhere.

    One folder around everything (`train/cat/...`) is no class and is left out of the names.
    """

    def __init__(
        self, where: str, paths: Sequence[str], marks: Sequence[int], texts: frozenset[str] | set[str], labels: str
    ):
        """
        Args:
            where: the folder or archive, for messages.
            paths: of the images, sorted.
            marks: a number for each that changes when its bytes do: size or checksum.
            texts: paths of text files, which are the captions of images of the same name.
            labels: as `open_source` takes them.
        """
        if not paths:
            raise UserError(
                f"{where} holds no images: files named {' '.join(EXTENSIONS)} are looked for, at any depth."
            )
        tops = {path.partition("/")[0] for path in paths}
        around = len(tops) == 1 and any(path.count("/") > 1 for path in paths)  # one folder around the class folders
        self._prefix = f"{tops.pop()}/" if around else ""
        names = [path.removeprefix(self._prefix) for path in paths]
        self.paths = Strings(names)
        self._captioned = np.array([_caption_of(path) in texts for path in paths])
        self.has_captions = bool(self._captioned.any())
        listing = "\n".join(f"{path} {mark}" for path, mark in zip(names, marks, strict=True))
        digest = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
        self.identity = {"name": Path(where).name, "num_images": len(paths), "sha256": digest}
        if classes := self._given_classes(where, paths, labels):
            self.identity["labels_sha256"] = labels_digest(classes)  # they are not in the list of paths
        self.labels, self.class_names = classes or from_folders(where, names)

    def _given_classes(self, where: str, paths: Sequence[str], labels: str) -> Classes | None:
        """Classes that are not the folders; None when the folders are."""
        if labels == "none":
            return no_classes(len(paths))
        if labels not in ("", "folders"):
            return from_file(labels, paths)
        if labels == "" and (data := self.read_listing()) is not None:
            with faults.reading(f"{LISTING} of {where}", "JSON"):
                listing = json.loads(data)
            return from_listing(listing, paths, f"{LISTING} of {where}")
        return None

    def name(self, index: int) -> str:
        return printable(self.paths[index])

    def decode(self, index: int) -> Image.Image:
        return decode_image(self.read(self._prefix + self.paths[index], self.name(index)), self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        if not self._captioned[index]:
            return ()
        name = _caption_of(self.paths[index])
        return caption_lines(self.read(self._prefix + name, printable(name)), printable(name))

    @abstractmethod
    def read(self, path: str, name: str) -> bytes:
        """The bytes of a file by its path in the source; `name` is for messages."""

    @abstractmethod
    def read_listing(self) -> bytes | None:
        """The bytes of dataset.json at the root; None when there is none."""


def from_folders(where: str, paths: Sequence[str]) -> Classes:
    """The first part of every path is its class; images without folders make one class."""
    nested = ["/" in path for path in paths]
    if any(nested) and not all(nested):
        loose = paths[nested.index(False)]
        raise UserError(
            f"{where} holds folders of images and loose images such as {printable(loose)}: "
            "move every image into the folder of its class, or give --labels none for one class."
        )
    names = sorted({_folder(path) for path in paths})
    position = {name: label for label, name in enumerate(names)}
    labels = np.array([position[_folder(path)] for path in paths], np.int64)
    return Classes(labels, [printable(name) for name in names])


def caption_lines(data: bytes, name: str) -> tuple[str, ...]:
    """The captions in a text file, one a line; raises UserError when it is no UTF-8 text."""
    try:
        return tuple(line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"The caption {name} is not UTF-8 text: {error}.") from error


def _folder(path: str) -> str:
    return path.partition("/")[0] if "/" in path else ONE_CLASS


def _caption_of(path: str) -> str:
    return path.rpartition(".")[0] + CAPTION


class FolderSource(FileSource):
    """Images in a folder, links followed."""

    def __init__(self, root: Path, labels: str = ""):
        self.root = root
        found = scan(root, (*EXTENSIONS, CAPTION))
        texts = {path for path in found if path.endswith(CAPTION)}
        paths = sorted(path for path in found if path.lower().endswith(EXTENSIONS))
        super().__init__(str(root), paths, [found[path] for path in paths], texts, labels)

    def read(self, path: str, name: str) -> bytes:
        faults.require_plain(self.root / path)
        try:
            if (size := (self.root / path).stat().st_size) <= MAX_FILE_SIZE:
                return (self.root / path).read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}.") from error
        raise UserError(
            f"{name} has {files.size(size)}, more than an image may have ({files.size(MAX_FILE_SIZE)}): remove it."
        )

    def read_listing(self) -> bytes | None:
        return self.read(LISTING, LISTING) if (self.root / LISTING).is_file() else None


def scan(root: Path, endings: tuple[str, ...]) -> dict[str, int]:
    """Paths below a folder and their sizes, -1 for a broken link: reading it says so. Hidden ones are left out."""
    return {Path(entry.path).relative_to(root).as_posix(): _size(entry) for entry in _walk(root, endings, frozenset())}


def _walk(folder: Path | str, endings: tuple[str, ...], above: frozenset[str]) -> Iterator[os.DirEntry]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that holds it
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    for entry in entries:
        if hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, endings, above | {real})
        elif entry.name.lower().endswith(endings):
            yield entry


def hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's images."""
    return name.startswith(".") or name == "__MACOSX"


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1
