"""The contract of a source of images, and what file names mean: patterns, splits of a data set, junk of a system."""

import collections
import functools
import glob
import hashlib
import itertools
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image

from repa.base import faults, files
from repa.base.errors import UserError
from repa.base.images import adm_centre_crop, decode_image, encode_png, grid, image_endings, to_tensor
from repa.data.config import PrepareConfig

ONE_CLASS = "all"
EXTENSIONS = image_endings()
"""Endings of the formats that `base.images` decodes; other files are counted and left out."""
# a file is in memory whole while it is decoded, in every worker at a time
MAX_FILE_SIZE = 1 << 28  # bytes of one image file, unpacked
# all images would take a pass over the data at every start; these few notice that pictures were replaced
SAMPLED = 64  # images of a source whose bytes are part of its identity
CAPTION_COLUMNS = ("caption", "captions", "text")  # columns of texts
CAPTION_ENDING = ".txt"  # a text next to an image, with the same name
MAX_FILES = 1_000_000
MAX_FOLDERS = (
    100  # around a file: to look at each folder of a path takes memory that grows with the square of their number
)
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")  # a range of numbers, or words
# of macOS, the disks of Synology, QNAP and NetApp, Windows, ext4 and Python: none of them begins with a dot
JUNK = (
    "__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "desktop.ini", "__pycache__", "#snapshot", "~snapshot", "@tmp", "@sharebin", "recycler", "found.000",
    "network trash folder", "temporary items",
)  # fmt: skip
JUNK_KIND = "hidden files and folders of the system"
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test", "holdout": "test",
}  # fmt: skip
"""Names of splits of a data set, which are not classes -> the split."""


class Classes(NamedTuple):
    """A class for each image."""

    labels: np.ndarray  # (N,) int64
    names: list[str]
    origin: str
    """Where the labels came from, as `repa prepare` reports it."""


def one_class(num: int, labels: str = "", *, why: str = "nothing label-like") -> Classes:
    """One class for all images: because the user asked for it, or because the source says no more."""
    return Classes(np.zeros(num, np.int64), [ONE_CLASS], f"{'--labels none' if labels == 'none' else why}: one class")


class Source(ABC):
    """Images in a fixed order, each with a class; read by index, from several threads and, pickled or forked, from
    several processes. A source over shards (tar, parquet) is read fastest in order."""

    class_names: list[str]
    """Names of the classes, in the order of the labels."""
    labels: np.ndarray
    """(N,) int64."""
    identity: dict[str, Any]
    """What it is and a checksum of its list: equal for equal images, wherever they lie."""
    has_captions: bool = False
    """Whether any image may have one."""
    labels_from: str = ""
    """Where the labels came from, as `repa prepare` reports it."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """What of the source is not taken, and how often: "files .txt2" -> 3."""
    moments_shape: tuple[int, ...] | None = None
    """(2C, h, w) of the moments that an autoencoder made of the images before; None where there are none."""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        classes = "1 class" if len(self.class_names) == 1 else f"{len(self.class_names)} classes"
        return f"{type(self).__name__}: {len(self)} images of {classes}; labels from {self.labels_from}"

    def _repr_png_(self) -> bytes:
        """For notebooks: up to 16 images at equal distances, at 64 pixels."""
        number = min(16, len(self))
        shown = [to_tensor(self.image(place * len(self) // number, 64)) for place in range(number)]
        return encode_png(grid(torch.stack(shown), columns=8, padding=0))

    def require_fit(self, config: PrepareConfig) -> None:  # noqa: B027 (most images fit any)
        """Raises UserError for settings that these images cannot be prepared with.

        Moments are kept only under the name of the autoencoder that made them, at the size they were made for.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message."""

    def contents(self, index: int) -> bytes:
        """The bytes of image `index` as a file, of a source of files; raises UserError, which names it, if it cannot be read."""
        raise NotImplementedError

    def decode(self, index: int) -> Image.Image:
        """Image `index` as it is, RGB; raises UserError, which names it, if it cannot be read."""
        return decode_image(self.contents(index), self.name(index))

    def image(self, index: int, resolution: int) -> Image.Image:
        """Image `index` as RGB (resolution, resolution), by ADM's centre crop; raises UserError if it cannot be read."""
        image = self.decode(index)
        try:
            return adm_centre_crop(image, resolution)
        except UserError as error:
            raise UserError(f"{self.name(index)}: {error}") from error

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image: none, one, or several that describe it in turn."""
        return ()

    def moments(self, index: int) -> np.ndarray | None:
        """The moments that come with an image: float32 `moments_shape`, mean and standard deviation, unscaled."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        """All but cached properties: open files and memory maps, which no other process can use, are opened again in each."""
        kept = functools.cached_property
        return {
            key: value for key, value in self.__dict__.items() if not isinstance(getattr(type(self), key, None), kept)
        }

    def _identify(self, classes: Classes, name: str, *, with_labels: bool = True, **facts: Any) -> None:
        """Set the classes, and the identity from facts such as checksums of contents."""
        self.labels, self.class_names, self.labels_from = classes
        if alike := names_alike(self.class_names):
            self.labels_from += f"; separate classes of similar names: {', '.join(alike[:6])}"
        if with_labels:
            names = "\n".join(self.class_names).encode()
            facts["labels_sha256"] = hashlib.sha256(self.labels.tobytes() + names).hexdigest()
        self.identity = {"name": name, "num_images": len(self), **facts}

    def _sampled_digest(self, num: int, *, strict: bool = False) -> str:
        """A checksum of the contents of SAMPLED images at equal distances: names and sizes may stay when pictures change.

        One that cannot be read raises UserError if `strict`; else it counts as empty, and decoding it raises the error.
        """
        digest = hashlib.sha256()
        for index in sorted({round(k * (num - 1) / (SAMPLED - 1)) for k in range(SAMPLED)}):
            try:
                data = self.contents(index)
            except UserError:
                if strict:
                    raise
                data = b""
            digest.update(hashlib.sha256(data).digest())
        return digest.hexdigest()


def plain_text(text: str) -> str:
    """A name as people see it: no spaces or marks without a width around it, and one form of each accented letter."""
    return unicodedata.normalize("NFC", text.strip().strip("\u200b\u200e\u200f\u2060\ufeff").strip())


def names_alike(names: Iterable[str]) -> list[str]:
    """Names that people may mean one class by: they differ in letter case, spaces and the like, or write the same number."""
    groups = collections.defaultdict(list)
    for name in names:
        folded = re.sub(r"[\s_]", "", unicodedata.normalize("NFKC", name).casefold())
        groups[float(folded) if re.fullmatch(r"[+-]?[0-9]{1,15}(\.[0-9]*)?", folded) else folded].append(name)
    return [name for group in groups.values() if len(group) > 1 for name in group]


class Strings(Sequence[str]):
    """Many short texts in two arrays: 8 bytes and its letters for each, where a list of str takes 50 more."""

    def __init__(self, texts: Iterable[str]):
        # Python gives a file name that is not UTF-8 as halves of surrogate pairs, which must come back as they were
        encoded = [text.encode(errors="surrogatepass") for text in texts]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._letters = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends.tolist():
            yield self._letters[start:end].decode(errors="surrogatepass")
            start = end

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = int(self._ends[index])
        start = int(self._ends[index - 1]) if index % len(self) else 0
        return self._letters[start:end].decode(errors="surrogatepass")


def read_image_file(path: Path, name: str = "") -> bytes:
    """The bytes of an image file of bounded size; raises UserError, which calls it `name`."""
    name = name or str(path)
    faults.require_plain(path)
    try:
        require_image_size(path.stat().st_size, name)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error


def require_image_size(size: int, name: str) -> None:
    """Raises UserError for a file larger than MAX_FILE_SIZE."""
    if size > MAX_FILE_SIZE:
        limit = files.size(MAX_FILE_SIZE)
        raise UserError(f"{name} has {files.size(size)}, more than an image may have ({limit}): remove it.")


def caption_lines(data: bytes) -> tuple[str, ...]:
    """The captions in a text file, one a line; none of a text that is not UTF-8, which does not lose the image."""
    try:
        # editors of Windows begin a text with a byte order mark, which would be a part of the first caption
        return tuple(line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError:
        return ()


def caption_values(value: Any) -> tuple[str, ...]:
    """The captions in a value of a .json or a column, a text or a list of texts; () for anything else."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(text, str) for text in values):
        return ()
    return tuple(text for text in values if text)


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """The object that a JSON file holds; raises UserError when it holds something else."""
    with faults.reading(name, "JSON"):
        value = json.loads(data, object_pairs_hook=files.unique_keys)
    if not isinstance(value, dict):
        raise UserError(f"{name} holds {type(value).__name__}: it must be an object.")
    return value


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or made by the system, and so not the user's."""
    return name.startswith(".") or name.lower() in JUNK


def member_path(name: str) -> str:
    """The path of a member of an archive: some programs of Windows write the wrong slash, others './' and '//'."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def require_safe_member(archive: str | Path, name: str, size: int) -> None:
    """Refuse an archive made to do harm: with a path that leaves the folder it is unpacked to, or a file without end."""
    # checked for every system on each: an archive that is refused here must not be harmful elsewhere
    plain = name.replace("\\", "/")
    if plain.startswith("/") or re.match(r"[A-Za-z]:", plain) or ".." in plain.split("/"):
        raise UserError(
            f"{archive} holds {name!r}, a path that leads out of the archive: it is refused, pack it again without that path."
        )
    if plain.count("/") > MAX_FOLDERS:
        raise UserError(
            f"{archive} holds {plain[:60]!r}..., a path of more than {MAX_FOLDERS} folders: pack it again without them."
        )
    require_image_size(size, f"{plain} in {archive}")


def is_remote(name: str) -> bool:
    """Whether a file is fetched: a URL, or the output of a command (`pipe:`)."""
    return name.startswith("pipe:") or re.match(r"[a-z][a-z0-9+]*://", name) is not None


def expand(spec: str) -> list[str]:
    """The files that a name stands for: braces are expanded first, as in a shell, then * ? [] for files on this machine.

    Raises:
        UserError: a range that goes down, more than MAX_FILES, or a pattern that no file matches.
    """
    names = _braces(spec)
    if is_remote(spec):
        return _each_once(spec, names)
    found: list[str] = []
    for name in names:
        # a file may have a bracket in its name, which glob would not match with itself
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UserError(f"There is no file {name!r}{'' if name == spec else f', of {spec!r}'}: give its path.")
        found += matches
    return _each_once(spec, found)


def _each_once(spec: str, files: list[str]) -> list[str]:
    if len(set(files)) < len(files):
        twice = next(file for file, num in collections.Counter(files).items() if num > 1)
        raise UserError(f"{spec!r} stands for {twice} twice: name every file once.")
    return files


def stem_of(shard: str) -> str:
    """The name of a file without folder and ending; of a URL also without its query."""
    return Path(shard.partition("?")[0]).stem


def counted_through(shards: Sequence[str]) -> bool:
    """Are these the parts of one set, counted through, as train-0000.tar, train-0001.tar, or 00000-of-00002.parquet?"""
    stems = [re.sub("-of-[0-9]+$", "", stem_of(shard)) for shard in shards]
    matches = [match for stem in stems if (match := re.search(r"([0-9]+)(?!.*[0-9])", stem))]
    if len(matches) < len(stems):
        return False
    numbers = sorted(int(match[1]) for match in matches)
    others = {stem[: match.start()] + stem[match.end() :] for stem, match in zip(stems, matches, strict=True)}
    return len(others) == 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def named_by_first(shards: Sequence[str]) -> str:
    """What to call several files in a message."""
    return shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"


def is_pattern(spec: str) -> bool:
    return any(mark in spec for mark in "*?[") or BRACES.search(spec) is not None


def _braces(spec: str) -> list[str]:
    match = BRACES.search(spec)
    if not match:
        return [spec]
    first, last, words = match.groups()
    if words is not None:
        options = words.split(",")
    elif 0 <= int(last) - int(first) < MAX_FILES:
        width = len(first) if first.startswith("0") else 0
        options = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        raise UserError(f"{spec!r} has the range {match.group()}: it goes up, over at most {MAX_FILES:,} files.")
    names = []
    for option in options:
        # counted at every level: a few braces of a thousand names each would fill the memory before they are all known
        names += _braces(spec[: match.start()] + option + spec[match.end() :])
        if len(names) > MAX_FILES:
            raise UserError(f"{spec!r} stands for more than {MAX_FILES:,} files: give fewer at a time.")
    return names


def splits_among(names: Iterable[str]) -> list[str]:
    """Those of the names that look like splits, sorted: the bare words, and where two differ also train2017, trainA and seg_test."""
    found = {name for name in names if _split_of(name)}
    # alone, a class may be called test_tube or dev_board: only the bare word is a split then
    return several_splits(found) or sorted(name for name in found if name.lower() in SPLITS)


def several_splits(names: Iterable[str]) -> list[str]:
    """Those of the names that look like splits, sorted, where there are two different ones."""
    found = {name: meaning for name in names if (meaning := _split_of(name))}
    return sorted(found) if len(set(found.values())) > 1 else []


def split_folders(paths: Sequence[str]) -> list[str]:
    """The folders of files that look like several splits, on the highest level where some do."""
    folders = {path.rpartition("/")[0] for path in paths}
    for level in range(max(folder.count("/") for folder in folders) + 1):
        if splits := several_splits({folder.split("/")[level] for folder in folders if folder.count("/") >= level}):
            return splits
    return []


def _split_of(name: str) -> str:
    words = re.findall("[A-Z]*[a-z]+|[A-Z]+", name)  # of trainA and TestSet too
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), "")


def require_one_split(files: Sequence[str]) -> None:
    """Raises UserError for shards of several splits, by their names or their folders, which would become one set in silence."""
    paths = [re.split(r"[/\\]", file.partition("?")[0]) for file in files]
    # folders that all of them lie in tell nothing
    same = len([*itertools.takewhile(lambda names: len({*names}) == 1, zip(*paths, strict=False))])
    parts = [[*path[same:-1], stem_of(file)] for path, file in zip(paths, files, strict=True)]
    splits = [next(filter(None, map(_split_of, names)), "") for names in parts]
    if len(found := sorted({*splits} - {""})) > 1:
        first, others = files[splits.index(found[0])], ", ".join(sorted({"/".join(names) for names in parts})[:4])
        raise UserError(
            f"The files are of several splits ({', '.join(found)}: {others}): give those of one, such as {first}."
        )
