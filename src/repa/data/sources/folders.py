"""Images as files: what folders and zips share, and folders."""

import collections
import csv
import hashlib
import io
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from repa.base import faults, files
from repa.base.errors import UserError
from repa.base.images import decode_image, image_endings
from repa.data.sources.contract import Source, Strings, plain_text, printable, sampled_digest
from repa.data.sources.labels import (
    TABLES,
    Classes,
    by_name,
    from_file,
    from_listing,
    in_order,
    label_columns,
    labels_digest,
    no_classes,
    rows_of_lines,
    table_columns,
)
from repa.data.sources.splits import MEANINGS, splits_among

EXTENSIONS = image_endings()
"""Endings of the formats that `base.images` decodes; other files are counted and left out."""
AROUND = (
    "images",
    "image",
    "imgs",
    "img",
    "data",
    "dataset",
    "photos",
    "pictures",
    "jpg",
    "png",
    "classes",
    "set",
    "all",
)
"""Names of a folder around the folders of classes, which is no class."""
JUNK = (
    "__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "desktop.ini", "__pycache__",
)  # fmt: skip
JUNK_KIND = "hidden files and folders of the system"
METADATA = ("metadata.csv", "metadata.jsonl")  # of the `imagefolder` convention: a row for each image
MAX_FILE_SIZE = 1 << 28  # bytes of one image file, unpacked
LISTING = "dataset.json"  # of EDM2 and REPA: labels of images whose folders are no classes
CAPTIONS = ("caption", "captions", "text")  # columns of texts
CAPTION = ".txt"  # a text beside an image, of the same name


class FileSource(Source):
    """A sorted list of relative paths; the class is a folder of the path, unless labels come from elsewhere."""

    other_files: Sequence[str] = ()
    """Paths of the files that are neither images nor captions, set before the list is read."""

    def __init__(
        self,
        where: str,
        paths: Sequence[str],
        marks: Sequence[int],
        texts: frozenset[str] | set[str],
        labels: str,
        others: Mapping[str, int] = MappingProxyType({}),
    ):
        """
        Args:
            where: the folder or archive, for messages.
            paths: of the images, sorted.
            marks: a number for each that changes when its bytes do: size or checksum.
            texts: paths of text files, which are the captions of images of the same name.
            labels: as `open_source` takes them.
            others: what else lies there, and how often.
        """
        if not paths:
            raise UserError(
                f"{where} holds no images: files named {' '.join(EXTENSIONS)} are looked for, at any depth."
            )
        self.paths = Strings(paths)
        captions = {_stem(path): path for path in texts}
        self._texts = {path: captions[_stem(path)] for path in paths if _stem(path) in captions}
        self.left_out = dict(others)
        self._written = self._captions_of_metadata()
        self.has_captions = bool(self._texts or self._written)
        if unused := len(texts) - len(set(self._texts.values())):
            self.left_out["texts of no image"] = unused
        listing = "\n".join(f"{path} {mark}" for path, mark in zip(paths, marks, strict=True))
        digest = hashlib.sha256(listing.encode(errors="surrogateescape"))
        digest.update(sampled_digest(len(paths), self._contents).encode())
        self.identity = {"name": Path(where).name, "num_images": len(paths), "sha256": digest.hexdigest()}
        if classes := self._given_classes(where, paths, labels):
            self.identity["labels_sha256"] = labels_digest(classes)  # they are not in the list of paths
        else:
            classes, self.labels_from = from_folders(where, paths, labels)
            if len(classes.names) == 1 and not labels and not any("/" in path for path in paths):
                self._require_nothing_label_like(where)
        self.labels, self.class_names = classes

    def _contents(self, index: int) -> bytes:
        """The bytes of an image for the identity; of one that cannot be read, none: reading it says why."""
        try:
            return self.read(self.paths[index], self.name(index))
        except UserError:
            return b""

    def _given_classes(self, where: str, paths: Sequence[str], labels: str) -> Classes | None:
        """Classes that are not the folders; None when the folders are."""
        if labels == "none":
            self.labels_from = "--labels none: one class"
            return no_classes(len(paths))
        if labels.partition(":")[0] == "folders":
            return None
        if labels:
            self.labels_from = labels
            return from_file(labels, paths)
        if (data := self.read_root(LISTING)) is not None:
            with faults.reading(f"{LISTING} of {where}", "JSON"):
                listing = json.loads(data)
            self.labels_from = LISTING
            return from_listing(listing, paths, f"{LISTING} of {where}")
        return self._from_metadata(where, paths)

    def _require_nothing_label_like(self, where: str) -> None:
        """Before all images become one class: refuse where a file at the root looks like their labels, and name the choice."""
        for file in sorted(self.root_files):
            if not (columns := self._columns_of_labels(file)):
                continue
            spec = f"{Path(where) / file}:{columns[0]}" if columns[0] else str(Path(where) / file)
            if Path(where).is_file():
                spec = f"{spec}, unpacked"
            if not file.lower().endswith((*TABLES, ".json")):
                spec = "TABLE.csv:COLUMN with what it says"
            raise UserError(
                f"{where} has no folders of classes, but {printable(file)}, which looks like labels: give --labels {printable(spec)}, "
                "another column or file, or --labels none for one class."
            )

    def _columns_of_labels(self, file: str) -> list[str]:
        """Columns of a file at the root that could be labels; [""] for a file that only its name tells of; [] for none."""
        columns = table_columns(file, self.read_root)
        if found := label_columns(columns):
            return found
        words = re.split("[^a-z]+", file.lower())
        told = any(
            word in words for word in ("label", "labels", "classes", "attr", "identity", "annotations", "targets")
        )
        return [columns[1] if len(columns) > 1 else ""] if told or file == "metadata.parquet" else []

    def _from_metadata(self, where: str, paths: Sequence[str]) -> Classes | None:
        """The labels of metadata.csv or metadata.jsonl at the root (`imagefolder`); None where there are none."""
        for file, rows in self._metadata():
            found = label_columns(rows[0]) if rows else []
            if len(found) > 1:
                raise UserError(
                    f"{file} of {where} has several columns that could be the label ({', '.join(found)}): name the one as "
                    f"--labels {Path(where) / file}:{found[0]}, or give --labels folders or none."
                )
            if found:
                self.labels_from = f"the column {found[0]!r} of {file}"
                table = {str(row.get("file_name", "")): row.get(found[0]) for row in rows}
                return by_name(table, paths, f"{file} of {where}")
        return None

    def _metadata(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The files of METADATA at the root, and their rows."""
        for file in METADATA:
            if (data := self.read_root(file)) is not None:
                yield file, rows_of_csv(data, file) if file.endswith(".csv") else rows_of_lines(data, file)

    def _captions_of_metadata(self) -> dict[str, tuple[str, ...]]:
        """Path -> its texts in metadata.csv or metadata.jsonl; of a file that cannot be read, none: captions block nothing."""
        try:
            return {
                plain_text(str(row.get("file_name", ""))): texts
                for _, rows in self._metadata()
                for row in rows
                if (texts := next((t for key in CAPTIONS if (t := caption_values(row.get(key)))), ()))
            }
        except UserError:
            return {}

    def name(self, index: int) -> str:
        return printable(self.paths[index])

    def decode(self, index: int) -> Image.Image:
        return decode_image(self.read(self.paths[index], self.name(index)), self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        name = self._texts.get(self.paths[index])
        if name is None:
            return self._written.get(plain_text(self.paths[index]), ())
        return caption_lines(self.read(name, printable(name)), printable(name))

    @property
    def root_files(self) -> list[str]:
        """Names of the files at the root that are neither images nor their captions."""
        return [path for path in self.other_files if "/" not in path]

    @abstractmethod
    def read(self, path: str, name: str) -> bytes:
        """The bytes of a file by its path in the source; `name` is for messages."""

    @abstractmethod
    def read_root(self, name: str) -> bytes | None:
        """The bytes of a file at the root, such as dataset.json; None when there is none."""


def from_folders(where: str, paths: Sequence[str], labels: str = "") -> tuple[Classes, str]:
    """The classes that folders are, and a sentence about which.

    "" and "folders" take the first folder of each path, "folders:2" the second, "folders:last" the one that holds the
    image, "folders:path" all of them. Where "" could mean two things, it is refused with the choices.

    Raises:
        UserError: which folders are classes cannot be told, or an image does not lie in one.
    """
    level = _level(labels)
    prefix = ""
    if not labels:
        prefix = _around(where, paths)
        level = 2 if prefix else 1
    depths = {path.count("/") for path in paths}
    if not labels and depths == {0}:
        return no_classes(len(paths)), "no folders: one class"
    folders = []
    for path in paths:
        parts = path.split("/")[:-1]
        if not parts or (level is not None and len(parts) < level):
            raise UserError(
                f"{where} holds folders of images and loose images such as {printable(path)}: move every image into the "
                "folder of its class, or give --labels none for one class."
            )
        folders.append(plain_text("/".join(parts) if level == 0 else parts[-1] if level is None else parts[level - 1]))
    names = in_order(set(folders))
    position = {name: label for label, name in enumerate(names)}
    classes = Classes(np.array([position[folder] for folder in folders], np.int64), [printable(name) for name in names])
    which = (
        "the whole path of each image's folder"
        if level == 0
        else "the folder of each image"
        if level is None
        else "the first folder of each path"
        if level == 1
        else (f"folder {level} of each path" + (f", inside {prefix}/" if prefix else ""))
    )
    deeper = {path.split("/")[level] for path in paths if level and path.count("/") > level}
    if deeper and not labels:
        shown = ", ".join(printable(name) for name in sorted(deeper)[:3])
        which += f"; folders inside them ({shown}) are no classes (--labels folders:last or folders:path takes them)"
    return classes, which


def _level(labels: str) -> int | None:
    """Which folder of a path is its class, counted from 1; None for the last, 0 for the whole path."""
    _, _, level = labels.partition(":")
    if level in ("last", "path"):
        return None if level == "last" else 0
    if level and not re.fullmatch(r"[1-9][0-9]?", level):
        raise UserError(f"labels was given {labels!r}: write folders, folders:2, folders:last or folders:path.")
    return int(level or 1)


def _around(where: str, paths: Sequence[str]) -> str:
    """The one folder around the folders of classes, "" for none; raises UserError where that cannot be told."""
    tops = {path.partition("/")[0] if "/" in path else "" for path in paths}
    splits = splits_among(tops)
    nested = all(path.count("/") > 1 for path in paths)
    if splits and (len(tops) > 1 or not nested):
        deep = {path.count("/") for path in paths} != {2}
        inside = f", or --labels folders:{'last' if deep else 2} for the classes inside all of them" if nested else ""
        raise UserError(
            f"{where} holds what looks like splits ({', '.join(splits)}), which are no classes: give one of them as the source"
            f"{inside}, or --labels folders if they are classes, or none."
        )
    if len(tops) > 1 or not nested or tops == {""}:
        return ""
    (top,) = tops
    if top.lower() in (*MEANINGS, *AROUND, Path(where).stem.lower(), Path(where).name.lower()):
        return top
    inner = sorted({path.split("/")[1] for path in paths})
    raise UserError(
        f"All images of {where} lie in folders inside {printable(top)}/: give --labels folders:2 if {', '.join(inner[:3])} are "
        f"classes, --labels folders if {printable(top)} is one, or --labels none."
    )


def rows_of_csv(data: bytes, name: str) -> list[dict[str, Any]]:
    with faults.reading(name, "a table of comma-separated UTF-8"):
        return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))


def caption_lines(data: bytes, name: str) -> tuple[str, ...]:
    """The captions in a text file, one a line; none of a text that is not UTF-8, which is no reason to lose the image."""
    try:
        return tuple(line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError:
        return ()


def caption_values(value: Any) -> tuple[str, ...]:
    """A caption, or a list of them, as they lie in a .json or a column; none where they are anything but texts."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(text, str) for text in values):
        return ()
    return tuple(text for text in values if text)


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def count_others(paths: Iterable[str], empty_folders: Iterable[str] = (), junk: int = 0) -> dict[str, int]:
    """Files that are no images, by their ending, folders of classes without an image, and how many files and folders are hidden."""
    endings = collections.Counter(
        f"files {Path(path).suffix.lower()[:20]}" if Path(path).suffix else "files without an ending" for path in paths
    )
    empty = sorted(empty_folders)
    named = {f"folder without images: {printable(name)[:60]}": 1 for name in empty[:20]}
    return {
        **dict(endings.most_common(20)),
        **named,
        **({"more folders without images": len(empty) - 20} if empty[20:] else {}),
        **({JUNK_KIND: junk} if junk else {}),
    }


class FolderSource(FileSource):
    """Images in a folder, links followed."""

    def __init__(self, root: Path, labels: str = ""):
        self.root = root
        junk: list[str] = []
        found = scan(root, ("",), junk)
        texts = {path for path in found if path.lower().endswith(CAPTION)}
        paths = sorted(path for path in found if path.lower().endswith(EXTENSIONS))
        known = {*texts, *paths, LISTING, *METADATA}
        tops = {path.partition("/")[0] for path in paths if "/" in path}
        empty = {e.name for e in os.scandir(root) if e.is_dir() and not hidden(e.name)} - tops if tops else set()
        self.other_files = [path for path in found if path not in known]
        stems = set(map(_stem, paths))
        self.other_files += [path for path in texts if _stem(path) not in stems]
        others = count_others((path for path in found if path not in known), empty, len(junk))
        super().__init__(str(root), paths, [found[path] for path in paths], texts, labels, others)

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

    def read_root(self, name: str) -> bytes | None:
        return self.read(name, name) if (self.root / name).is_file() else None


def scan(root: Path, endings: tuple[str, ...], junk: list[str] | None = None) -> dict[str, int]:
    """Paths below a folder and their sizes, -1 for a broken link: reading it says so. Hidden ones are left out, into `junk`."""
    entries = _walk(root, endings, frozenset(), [] if junk is None else junk)
    return {Path(entry.path).relative_to(root).as_posix(): _size(entry) for entry in entries}


def _walk(
    folder: Path | str, endings: tuple[str, ...], above: frozenset[str], junk: list[str]
) -> Iterator[os.DirEntry]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that holds it
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    for entry in entries:
        if hidden(entry.name):
            junk.append(entry.path)
        elif entry.is_dir():
            yield from _walk(entry.path, endings, above | {real}, junk)
        elif entry.name.lower().endswith(endings):
            yield entry


def hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's images."""
    return name.startswith(".") or name.lower() in JUNK


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1
