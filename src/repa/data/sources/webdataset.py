"""WebDataset: tar shards in which neighbouring files of one name (0001.jpg, 0001.cls, 0001.txt, 0001.json) are a sample."""

import collections
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repa.base.errors import UserError, printable
from repa.data.remote import fetch_shard
from repa.data.sources.archives import Slices
from repa.data.sources.contract import (
    Classes,
    Source,
    Strings,
    caption_lines,
    caption_values,
    is_remote,
    json_object,
    no_classes,
    require_one_split,
    stem_of,
)
from repa.data.sources.label_files import from_file
from repa.data.sources.labels import classes_by_name, classes_of, from_folders, label_columns
from repa.data.sources.tar_index import Index, cached_path, index_of, load_index

MAX_OPEN_SHARDS = 16  # shards open at a time: rows are read in order
IMAGE, TEXT, JSON = range(3)  # the second axis of `Index.parts`


class WebDataset(Source):
    """Samples in the order of the shards. Remote shards (URLs, `pipe:`) are copied to the cache when they are needed.

    Every shard is read once when the source is opened first, for an index that is kept in the cache folder. The label
    of a sample is its .cls, or `label` in its .json; its captions are its .txt, or `caption` in its .json.
    """

    opened_here = ("_open",)

    def __init__(
        self,
        shards: Sequence[str],
        labels: str = "",
        *,
        image: str = "",
        label: str = "label",
        caption: str = "caption",
        cache: float = 64,
    ):
        """
        Args:
            shards: paths, URLs, or `pipe:COMMAND`.
            labels: "", "none", "folders" (the first part of a sample's path; folders:2, folders:last), "tars" (the name of
                its shard), or a file with labels by path.
            image: extension of the image of a sample that holds several.
            label: key of the label in the .json.
            caption: key of the caption in the .json.
            cache: GiB of copies of remote shards to keep.
        """
        if isinstance(cache, bool) or not isinstance(cache, (int, float)) or not cache > 0:
            raise UserError(f"cache was given {cache!r}: it is the size of the cache of shards in GiB, more than 0.")
        self.shards = list(shards)
        self._caption = str(caption)
        self._cache_limit = int(cache * 2**30)
        indices = [self._index(shard, str(image), str(label)) for shard in self.shards]
        self._sizes = [index.size for index in indices]
        self._ends = np.cumsum([len(index.keys) for index in indices])
        self._parts = np.concatenate([index.parts for index in indices])  # (N, 3, 2)
        self.keys = Strings(key for index in indices for key in index.keys)
        others: collections.Counter[str] = collections.Counter()
        for index in indices:
            others.update(index.others)
        self.left_out_endings = list(others)
        self.left_out = {f"files .{printable(ending)[:20]} of samples": num for ending, num in others.most_common(20)}
        self.has_captions = bool((self._parts[:, TEXT, 1] >= 0).any() or (self._parts[:, JSON, 1] >= 0).any())
        self._open_here()
        classes = self._classes(labels, [value for index in indices for value in index.labels], str(label))
        self._identify(classes, Path(self.shards[0]).name, num_shards=len(self.shards), sha256=self._digest())
        self._open_here()  # closes what was read for the identity, which is long ago when images are read

    def _open_here(self) -> None:
        self._open = functools.lru_cache(MAX_OPEN_SHARDS)(self._open_shard)

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

    def _classes(self, labels: str, written: list[str | None], label: str) -> Classes:
        if labels == "none":
            return self._one_class(len(self.keys))
        if labels == "tars":
            self.labels_from = "the name of each tar"
            per_shard = np.diff(self._ends, prepend=0).tolist()
            return classes_by_name(
                [stem_of(s) for s, num in zip(self.shards, per_shard, strict=True) for _ in range(num)]
            )
        if labels.partition(":")[0] == "folders":
            classes, self.labels_from = from_folders(self._shard_name(0), self.keys, labels)
            return classes
        if labels:
            self.labels_from = labels
            return from_file(labels, self.keys)
        require_one_split(self.shards)
        if any(value is not None for value in written):
            self.labels_from = f".cls, or {label!r} in the .json of each sample"
            return classes_of(written, self.name, "its shard (.cls, or the label in .json)")
        self._require_nothing_label_like()
        return no_classes(len(self.keys))

    def _require_nothing_label_like(self) -> None:
        """Refuse where something but .cls and .json looks like labels, and name the choice."""
        where = Path(self.shards[0]).parent
        if (self._parts[:, JSON, 1] >= 0).any():
            first = int(np.argmax(self._parts[:, JSON, 1] >= 0))
            if found := label_columns(json_object(self._read(first, JSON), self.name(first))):
                raise UserError(
                    f"The .json of {self.name(first)} has no 'label', but {', '.join(found)}: name the one as "
                    f"{self.shards[0]}:label={found[0]}, or give --labels none for one class."
                )
        if named := label_columns(self.left_out_endings):
            raise UserError(
                f"The samples of {self._shard_name(0)} have no .cls, but .{', .'.join(named)}: name the one as "
                f"{self.shards[0]}:label={named[0]}, or give --labels none for one class."
            )
        folders = {key.rpartition("/")[0] for key in self.keys if "/" in key}
        if len(folders) > 1:
            shown = ", ".join(printable(name) for name in sorted(folders)[:3])
            raise UserError(
                f"The samples of {self._shard_name(0)} have no labels, but lie in folders such as {shown}: give --labels folders if "
                "the first folders are the classes, folders:2 or folders:last for those inside, or --labels none for one class."
            )
        if len(self.shards) > 1 and not _numbered(self.shards):
            raise UserError(
                f"The tars in {where} have no labels, but names such as {self._shard_name(0)} and {self._shard_name(1)}: give "
                "--labels tars if each is a class, or --labels none for one class."
            )

    def _index(self, shard: str, image: str, label: str) -> Index:
        if is_remote(shard):
            # its index is enough to open a source of a terabyte again: a shard is copied when an image of it is read
            cached = cached_path(shard, image, label)
            if cached.is_file():
                return load_index(cached)
            path = fetch_shard(shard, self._cache_limit)
            return index_of(path, shard, version=shard, image=image, label=label)
        path = Path(shard)
        if not path.is_file():
            raise UserError(f"There is no shard {shard!r}: give its path.")
        # a checksum would read the shard, which the index is there to avoid
        stat = path.stat()
        version = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        return index_of(path, shard, version=version, image=image, label=label)

    def _digest(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self._parts[:, IMAGE, 1]).tobytes())
        if not any(map(is_remote, self.shards)):  # contents that would have to be fetched are known by their URLs
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
        # offsets of an index into another file would give parts of images, or of anything else
        if (size := os.path.getsize(path)) != self._sizes[shard]:
            raise UserError(
                f"{where} has {size:,} bytes, but had {self._sizes[shard]:,} when its index was made: it changed. "
                "Start again; for a remote shard, empty the folder sources/ of the cache first."
            )
        return Slices(path)


def _numbered(shards: Sequence[str]) -> bool:
    """Are these the parts of one set, counted through, as train-0000.tar, train-0001.tar?"""
    stems = list(map(stem_of, shards))
    matches = [match for stem in stems if (match := re.search(r"([0-9]+)(?!.*[0-9])", stem))]
    if len(matches) < len(stems):
        return False
    numbers = sorted(int(match[1]) for match in matches)
    others = {stem[: match.start()] + stem[match.end() :] for stem, match in zip(stems, matches, strict=True)}
    return len(others) == 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
