"""WebDataset: tar shards. Adjacent files of one name (0001.jpg, 0001.cls, 0001.txt, 0001.json) are a sample."""

import collections
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import PositiveFloat

from repa.base import faults, files
from repa.base.arrays import load_npz, save_npz
from repa.base.errors import UserError, printable
from repa.data.remote import fetch_shard
from repa.data.sources.archives import Slices, tar_samples
from repa.data.sources.contract import (
    EXTENSIONS,
    Classes,
    Source,
    Strings,
    caption_lines,
    caption_values,
    json_object,
    one_class,
    text_of,
)
from repa.data.sources.label_files import from_file
from repa.data.sources.labels import classes_by_name, classes_of, from_folders, like_labels
from repa.data.sources.names import (
    JUNK_KIND,
    counted_through,
    is_remote,
    most_common,
    require_one_split,
    split_folders,
    stem_of,
)

INDEX_VERSION = 7  # part of the cache key, so that files of another format are computed again
MAX_TEXT = 1 << 24  # bytes of a label, a caption or a .json
OTHERS = "other files of samples"
ABSENT = (0, -1)  # a part that a sample lacks
MAX_OPEN_SHARDS = 16  # at a time; rows are read in order, so few are enough
IMAGE, TEXT, JSON, LABEL = range(4)  # parts of a sample; the first three are the second axis of `Index.parts`

Part = tuple[int, int]  # offset and size of a file in its shard


class WebDataset(Source):
    """Samples in the order of the shards. Remote shards (URLs, `pipe:`) are copied to the cache on demand.

    When the source is first opened, each shard is read once for an index, which stays in the cache folder. The label of
    a sample is its .cls, or `label` in its .json; its captions are its .txt, or `caption` in its .json.
    """

    def __init__(
        self,
        shards: Sequence[str],
        labels: str = "",
        *,
        image: str = "",
        label: str = "label",
        caption: str = "caption",
        cache: PositiveFloat = 64,
    ):
        """
        Args:
            shards: paths, URLs, or `pipe:COMMAND`.
            labels: "", "none", "folders" (the first folder of a sample's path; folders:2, folders:last), "tars" (the
                name of its shard), or a file with labels by path.
            image: extension of the image to use; "": the only image of a sample.
            label: key of the label in the .json.
            caption: key of the caption in the .json.
            cache: GiB of remote shards to keep.
        """
        self.shards = list(shards)
        self._caption = caption
        self._cache_limit = int(cache * 2**30)
        indices = [index_of(shard, image, label, self._cache_limit) for shard in self.shards]
        self._sizes = [index.size for index in indices]
        self._ends = np.cumsum([len(index.keys) for index in indices])
        self._parts = np.concatenate([index.parts for index in indices])  # (N, 3, 2)
        self.keys = Strings(key for index in indices for key in index.keys)
        left_out: collections.Counter[str] = collections.Counter()
        for index in indices:
            left_out.update(index.left_out)
        self.left_out = most_common(left_out, OTHERS)
        self.has_captions = bool((self._parts[:, TEXT, 1] >= 0).any() or (self._parts[:, JSON, 1] >= 0).any())
        label_like = list(dict.fromkeys(name for index in indices for name in index.label_like))
        classes = self._classes(labels, [value for index in indices for value in index.labels], label, label_like)
        if labels.partition(":")[0] != "folders" and (splits := split_folders(list(self.keys))):
            classes = classes._replace(
                origin=f"{classes.origin}; the splits {', '.join(map(printable, splits))} are one set"
            )
        self._identify(classes, Path(self.shards[0]).name, num_shards=len(self.shards), sha256=self._digest())
        if not labels and not any(map(is_remote, self.shards)):
            self._require_no_numbers(self.shards[0])
        # closes the shards that were read for the identity: images are read much later
        self.__dict__.pop("_open", None)

    @functools.cached_property
    def _open(self) -> Callable[[int], Slices]:
        return functools.lru_cache(MAX_OPEN_SHARDS)(self._open_shard)

    def name(self, index: int) -> str:
        return f"{printable(self.keys[index])} in {self._shard_name(self._shard_of(index))}"

    def contents(self, index: int) -> bytes:
        return self._read(index, IMAGE)

    def captions(self, index: int) -> tuple[str, ...]:
        if self._parts[index, TEXT, 1] >= 0:
            return caption_lines(self._read(index, TEXT))
        if self._parts[index, JSON, 1] < 0:
            return ()
        value = json_object(self._read(index, JSON), self.name(index)).get(self._caption)
        return caption_values(value)

    def _classes(self, labels: str, written: list[str | None], label: str, label_like: Sequence[str]) -> Classes:
        if labels == "none":
            return one_class(len(self.keys), labels)
        if labels == "tars":
            per_shard = np.diff(self._ends, prepend=0).tolist()
            names = [stem_of(s) for s, num in zip(self.shards, per_shard, strict=True) for _ in range(num)]
            return classes_by_name(names, "the name of each tar")
        if labels.partition(":")[0] == "folders":
            return from_folders(self._shard_name(0), self.keys, labels)
        if labels:
            return from_file(labels, self.keys)
        require_one_split(self.shards)
        if any(value is not None for value in written):
            return classes_of(written, self.name, f"its shard (.cls, or {label!r} in the .json)")
        self._require_nothing_label_like(label_like)
        return one_class(len(self.keys))

    def _require_nothing_label_like(self, label_like: Sequence[str]) -> None:
        """Raises UserError with the choices if anything besides .cls and `label` of a .json looks like labels."""
        where = Path(self.shards[0]).parent
        if label_like:
            raise UserError(
                f"The samples of {self._shard_name(0)} have no .cls and no 'label' in a .json, but "
                f"{', '.join(label_like[:5])}: give {self.shards[0]}:label={label_like[0]}, or --labels none."
            )
        folders = {key.rpartition("/")[0] for key in self.keys if "/" in key}
        if len(folders) > 1:
            shown = ", ".join(printable(name) for name in sorted(folders)[:3])
            raise UserError(
                f"The samples of {self._shard_name(0)} have no labels, but are in folders such as {shown}: give "
                "--labels folders if the first folders are the classes, folders:2 or folders:last for inner folders, "
                "or --labels none for one class."
            )
        if len(self.shards) > 1 and not counted_through(self.shards):
            raise UserError(
                f"The tars in {where} have no labels, but names such as {self._shard_name(0)} and "
                f"{self._shard_name(1)}: give --labels tars if each tar is a class, or --labels none for one class."
            )

    def _digest(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self._parts[:, IMAGE, 1]).tobytes())
        if not any(map(is_remote, self.shards)):  # reading remote contents would need a download
            digest.update(self._sampled_digest(len(self.keys), strict=True).encode())
        digest.update("\n".join(self.keys).encode(errors="surrogatepass"))
        return digest.hexdigest()

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _shard_name(self, shard: int) -> str:
        return Path(self.shards[shard]).name

    def _read(self, index: int, part: int) -> bytes:
        offset, size = self._parts[index, part].tolist()
        try:
            return self._open(self._shard_of(index)).read(offset, size)
        except (OSError, EOFError) as error:
            raise UserError(f"{self.name(index)} cannot be read: {error}.") from error

    def _open_shard(self, shard: int) -> Slices:
        where = self.shards[shard]
        path = fetch_shard(where, self._cache_limit) if is_remote(where) else Path(where)
        # the offsets of an index in another file would give arbitrary bytes
        if (size := os.path.getsize(path)) != self._sizes[shard]:
            raise UserError(
                f"{where} changed: it has {size:,} bytes, but had {self._sizes[shard]:,} when its index was computed. "
                "Run the command again; if the shard is remote, delete the folder sources/ of the cache first."
            )
        return Slices(path)


class Index(NamedTuple):
    """The samples of one shard, in its order."""

    keys: list[str]
    labels: list[str | None]
    """From .cls, else from the .json; None without both."""
    parts: np.ndarray
    """(n, 3, 2) int64: offset and size of the image, the .txt and the .json; size -1 if absent."""
    size: int
    """Bytes of the shard."""
    left_out: dict[str, int]
    """Kind -> number of files that are neither image nor label nor caption of a sample."""
    label_like: list[str]
    """Other candidates for the label: endings of files, and keys of a .json."""


def index_of(shard: str, image: str, label: str, cache_limit: int) -> Index:
    """The index of a shard, from the cache if possible.

    Args:
        shard: a path or URL.
        image: extension of the image in each sample; "": any.
        label: key of the label in the .json of a sample.
        cache_limit: bytes of remote shards to keep.

    Raises:
        UserError: the shard is not a tar file, truncated or unsafe, or a sample does not have exactly one image.
    """
    path, version = Path(shard), shard
    if not is_remote(shard):
        if not path.is_file():
            raise UserError(f"There is no shard {shard!r}: give its path.")
        # not a checksum: it would read the whole shard, which the index avoids
        stat = path.stat()
        # ctime: copies that keep the time of change (cp -p, rsync -t) may replace a shard by another of the same size
        version = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    key = files.json_sha256([INDEX_VERSION, version, image, label])[:32]
    cached = files.cache_folder() / "sources" / "indices" / f"{key}.npz"
    # indices are enough to open a source: a remote shard is copied only when one of its images is read
    if cached.is_file():
        again = "Delete it; it will be computed again."
        arrays = load_npz(cached, "the index of a shard", remedy=again)
        with faults.reading(cached, "the index of a shard", again):
            keys, labels, left_out, label_like = json.loads(arrays["text"].tobytes())
            left_out = {str(kind): int(num) for kind, num in left_out.items()}
            return Index(
                keys, labels, arrays["parts"], int(arrays["size"]), left_out, [str(name) for name in label_like]
            )
    index = _scan(fetch_shard(shard, cache_limit) if is_remote(shard) else path, shard, image, label)
    text = np.frombuffer(json.dumps([index.keys, index.labels, index.left_out, index.label_like]).encode(), np.uint8)
    save_npz(cached, {"text": text, "parts": index.parts, "size": np.array(index.size)})
    return index


def _scan(path: Path, name: str, image: str, label: str) -> Index:
    size, slices = os.path.getsize(path), Slices(path)
    keys, labels, parts = [], [], []
    others: collections.Counter[str] = collections.Counter()
    label_like: dict[str, None] = {}
    junk: list[str] = []
    for key, members in tar_samples(path, name, size, junk):
        used = _parts_of(key, members, name, image, label)
        unused = [end for end, part in members.items() if part not in used]
        others.update(f"files .{printable(end)[:20]} of samples" for end in unused)
        value, keys_like_labels = _label_of(key, used, slices, name, label)
        files_like_labels = (end for end in unused if like_labels(end.split(".")))
        label_like.update(dict.fromkeys((*files_like_labels, *keys_like_labels)))
        keys.append(key)
        labels.append(value)
        parts.append(used[:LABEL])
    if not keys:
        raise UserError(f"{name} holds no images: give a shard with files named {' '.join(EXTENSIONS)}.")
    left_out = most_common(others, OTHERS) | ({JUNK_KIND: len(junk)} if junk else {})
    return Index(keys, labels, np.array(parts, np.int64), size, left_out, list(label_like)[:20])


def _parts_of(key: str, members: dict[str, Part], name: str, image: str, label: str) -> tuple[Part, Part, Part, Part]:
    """The IMAGE, TEXT, JSON and LABEL of a sample, or ABSENT."""
    image_part = _image_of(key, members, name, image)
    # the parts of 0001.v2.png may be called 0001.v2.cls and so on: a sample has one name up to the first dot
    dotted = next((end for end, part in members.items() if part == image_part), "").rpartition(".")[0]
    text, meta, cls, key_file = (
        members.get(f"{dotted}.{ending}", members.get(ending, ABSENT))
        for ending in ("txt", "json", "cls", label.lower())
    )
    cls = key_file if cls is ABSENT else cls  # some name the file 0001.label
    for (_, size), ending in ((text, "txt"), (meta, "json"), (cls, "cls")):
        if size > MAX_TEXT:
            raise UserError(f"{key}.{ending} in {name} has {files.size(size)}, too much for a text: remove it.")
    return image_part, text, meta, cls


def _label_of(
    key: str, parts: Sequence[Part], slices: Slices, name: str, label: str
) -> tuple[str | None, Sequence[str]]:
    """The label of a sample, and the other keys of its .json that look like labels."""
    written = None
    if parts[LABEL] is not ABSENT:
        written = _text(slices.read(*parts[LABEL]), f"{key}.cls in {name}").strip() or None
    if parts[JSON] is ABSENT:
        return written, ()
    where = f"{key}.json in {name}"
    try:
        values = json_object(slices.read(*parts[JSON]), where)
    except UserError:
        if written is None:
            raise
        return written, ()  # beside a .cls, the .json may have other content, such as a list of boxes
    inside = [(key, inner) for key, inner in values.items() if isinstance(inner, dict)]
    values |= {f"{key}.{name}": value for key, inner in inside for name, value in inner.items()}
    others = like_labels(k for k, value in values.items() if value is not None and k != label)
    in_json = values.get(label)
    if written is None:
        return _label(in_json, where), others
    # one of the two may have the name of the class, the other its number
    if type(in_json) is int and written.isdecimal() and len(written) < 20 and int(written) != in_json:
        raise UserError(
            f"The label of {key} in {name} is {written[:20]} in its .cls, but {str(in_json)[:20]} in its .json: "
            "correct one."
        )
    return written, others


def _image_of(key: str, members: dict[str, Part], name: str, image: str) -> Part:
    endings = [image.lower().lstrip(".")] if image else [end for end in members if f".{end}".endswith(EXTENSIONS)]
    images = [end for end in endings if end in members]
    if len(images) == 1:
        return members[images[0]]
    if images:
        raise UserError(
            f"The sample {key} in {name} holds several images ({', '.join(images)}): choose one with image={images[0]}."
        )
    raise UserError(f"The sample {key} in {name} has no image, only {', '.join(members)}: add one, or remove it.")


def _text(data: bytes, name: str) -> str:
    with faults.reading(name, "UTF-8 text", "Write the label as text."):
        return text_of(data)


def _label(value: Any, name: str) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str, type(None))):
        raise UserError(
            f"The label in {name} is {str(value)[:80]}: it must be a whole number or the name of a class. Choose "
            "another key with label=KEY."
        )
    return None if value is None else str(value)
