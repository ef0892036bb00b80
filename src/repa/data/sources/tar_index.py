"""The index of a tar shard: the offsets of its samples, read once and kept in the cache folder."""

import collections
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from repa.base import faults, files
from repa.base.arrays import load_npz
from repa.base.errors import UserError
from repa.data.sources.archives import Slices
from repa.data.sources.contract import EXTENSIONS, is_hidden, json_object, require_safe_member

INDEX_VERSION = 4  # a part of the key in the cache: files of another format are made again
MAX_TEXT = 1 << 24  # bytes of a label, caption or json
ABSENT = (0, -1)  # a part that a sample does not have


class Index(NamedTuple):
    """The samples of one shard, in its order."""

    keys: list[str]
    labels: list[str | None]
    """From .cls, else from the .json; None for neither."""
    parts: np.ndarray
    """(n, 3, 2) int64: offset and size of the image, the .txt and the .json; size -1 for none."""
    size: int
    """Bytes of the shard."""
    others: dict[str, int]
    """Ending -> how many files are no part of a sample's image, label, captions."""


def index_of(path: Path, name: str, *, version: str, image: str, label: str) -> Index:
    """The index of a shard, from the cache when it was made before.

    Args:
        path: the shard on this machine.
        name: what to call it in messages.
        version: changes when the shard does.
        image: extension of the images in each sample; any image when empty.
        label: key of the label in the .json of a sample.

    Raises:
        UserError: no tar file, cut short, unsafe, or its samples are not one image each.
    """
    cached = cached_path(version, image, label)
    if not cached.is_file():
        index = _scan(path, name, image, label)
        # a file that is open, as np.savez gives a path the ending .npz
        with files.atomic_path(cached) as temporary, open(temporary, "wb") as file:
            text = json.dumps([index.keys, index.labels, index.others]).encode()
            np.savez(file, text=np.frombuffer(text, np.uint8), parts=index.parts, size=index.size)
        return index
    return load_index(cached)


def cached_path(version: str, image: str, label: str) -> Path:
    """Where the index of a shard is kept."""
    key = hashlib.sha256(json.dumps([INDEX_VERSION, version, image, label]).encode()).hexdigest()[:32]
    return files.cache_folder() / "sources" / "indices" / f"{key}.npz"


def load_index(path: Path) -> Index:
    """An index from the cache; UserError for one that is damaged."""
    again = "Delete it, and it is made again."
    arrays = load_npz(path, "the index of a shard", remedy=again)
    with faults.reading(path, "the index of a shard", again):
        keys, labels, others = json.loads(arrays["text"].tobytes())
        return Index(
            keys, labels, arrays["parts"], int(arrays["size"]), {str(end): int(num) for end, num in others.items()}
        )


def _scan(path: Path, name: str, image: str, label: str) -> Index:
    size = os.path.getsize(path)
    keys, labels, parts = [], [], []
    others: collections.Counter[str] = collections.Counter()
    slices = Slices(path)
    for key, members in _samples(path, name, size):
        found = _image_of(key, members, name, image)
        # of 0001.v2.png the others are 0001.v2.cls and so on: names are one sample up to their first dot
        dotted = next((end for end, part in members.items() if part == found), "").rpartition(".")[0]
        names = {what: f"{dotted}.{what}" for what in ("txt", "json", "cls")} if dotted else {}
        text, meta, cls = (
            members.get(names.get(what, what), members.get(what, ABSENT)) for what in ("txt", "json", "cls")
        )
        cls = members.get(label.lower(), ABSENT) if cls is ABSENT else cls  # some call the file 0001.label
        others.update(end for end, part in members.items() if part not in (found, text, meta, cls))
        for part, what in ((text, "txt"), (meta, "json"), (cls, "cls")):
            if part[1] > MAX_TEXT:
                raise UserError(f"{key}.{what} in {name} has {files.size(part[1])}, too much for a text: remove it.")
        value = told = None
        if cls is not ABSENT:
            value = _text(slices.read(*cls), f"{key}.cls in {name}").strip() or None
        if meta is not ABSENT:
            where = f"{key}.json in {name}"
            told = json_object(slices.read(*meta), where).get(label)
            # The name of a class may stand in the one and its number in the other.
            if value is None:
                value = _label(told, where)
            elif type(told) is int and value.isdecimal() and len(value) < 20 and int(value) != told:
                raise UserError(
                    f"The label of {key} in {name} is {value[:20]} in its .cls, but {str(told)[:20]} in its .json: correct one."
                )
        labels.append(value)
        keys.append(key)
        parts.append((found, text, meta))
    if not keys:
        raise UserError(f"{name} holds no images: files named {' '.join(EXTENSIONS)} are looked for.")
    return Index(keys, labels, np.array(parts, np.int64), size, dict(others.most_common(20)))


def _samples(path: Path, name: str, size: int) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Neighbouring files whose names are equal up to the first dot: key, extension -> (offset, size)."""
    key: str | None = None
    members: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()
    for member in _members(path, name, size):
        folder, slash, base = _plain(member.name).rpartition("/")
        stem, _, extension = base.partition(".")
        this, extension = f"{folder}{slash}{stem}", extension.lower()
        if this != key:
            if key is not None:
                yield key, members
            # `tar` without --sort=name may part the files of a sample, whose image would lose its label
            if this in seen:
                raise UserError(f"{name} holds the sample {this!r} twice: pack it again with every sample once.")
            key, members = this, {}
            seen.add(this)
        if extension in members:
            raise UserError(f"{name} holds {member.name!r} twice: pack it again with every file once.")
        members[extension] = (member.offset_data, member.size)
    if key is not None:
        yield key, members


def _members(path: Path, name: str, size: int) -> Iterator[tarfile.TarInfo]:
    """The files of a shard; anything made to do harm, or that cannot be read in place, is refused."""
    with faults.reading(name, "an uncompressed tar file"), tarfile.open(path, "r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # not in typeshed: the module would keep every header
            require_safe_member(name, member.name, member.size)
            if member.isdir() or any(is_hidden(part) for part in _plain(member.name).split("/")):
                continue
            # a link could lead to any file of this machine; the bytes of a sparse file do not lie in one piece
            if not member.isreg() or member.issparse():
                raise UserError(
                    f"{member.name} in {name} is not a plain file (but a link, a device or a sparse file): pack the shard "
                    "again with the files themselves (tar --dereference)."
                )
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("unexpected end of data")
            yield member
        _require_end(path, archive.offset)


def _require_end(path: Path, offset: int) -> None:
    """The module takes a damaged header, or the end of a shard that was cut, for the end of the archive."""
    with open(path, "rb") as file:
        file.seek(offset)
        found = 0
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"damaged at byte {offset:,}, or several archives one after the other")
            found += len(block)
    if found < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")


def _plain(name: str) -> str:
    """'./a/b.png' -> 'a/b.png'."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _image_of(key: str, members: dict[str, tuple[int, int]], name: str, image: str) -> tuple[int, int]:
    endings = [image.lower().lstrip(".")] if image else [end for end in members if f".{end}".endswith(EXTENSIONS)]
    found = [end for end in endings if end in members]
    if len(found) == 1:
        return members[found[0]]
    if found:
        raise UserError(
            f"The sample {key} in {name} holds several images ({', '.join(found)}): say which one as image={found[0]}."
        )
    raise UserError(f"The sample {key} in {name} holds no image, only {', '.join(members)}: every sample needs one.")


def _text(data: bytes, name: str) -> str:
    with faults.reading(name, "UTF-8 text"):
        return data.decode("utf-8-sig")


def _label(value: Any, name: str) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, str, type(None))):
        raise UserError(
            f"The label in {name} is {str(value)[:80]}: it must be a whole number or the name of a class. Another key is "
            "chosen by label=KEY."
        )
    return None if value is None else str(value)
