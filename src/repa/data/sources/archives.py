"""The directories of zip and tar files, and images in a zip file. Nothing is unpacked to disk."""

import bisect
import contextlib
import itertools
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from repa.base import faults, files
from repa.base.arrays import data_offset
from repa.base.errors import UserError
from repa.data.sources.contract import CAPTION_ENDING, EXTENSIONS, Strings
from repa.data.sources.folders import FileSource
from repa.data.sources.label_files import TABLES
from repa.data.sources.names import is_hidden, member_path, require_safe_member

# zip programs write only these methods by default; `Members.read` bounds the unpacked size of each
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

WANTED = (*EXTENSIONS, CAPTION_ENDING, *TABLES, ".json")  # endings of the members that may be read
UTF8_FLAG = 0x800  # of a member whose name is UTF-8
MEMBER = np.dtype([("offset", "i8"), ("packed", "i8"), ("size", "i8"), ("crc", "u4"), ("method", "u1")])


class Slices:
    """Reads parts of a file without a shared file position: safe in any thread, after a fork and after pickling."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with the object)
        self.handle = self._file.fileno()

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; raises EOFError if the file ends earlier."""
        return files.read_at(self.handle, offset, size)

    def __reduce__(self) -> tuple:
        return Slices, (self.path,)


class Members:
    """The wanted members of a zip, in a few arrays: the objects of zipfile need many times as much memory."""

    def __init__(self, path: Path, members: list[zipfile.ZipInfo]):
        members = sorted(members, key=lambda member: member.filename)
        self.names = Strings(member.filename for member in members)
        facts = [(m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in members]
        self._facts = np.array(facts, MEMBER)
        self._slices = Slices(path)

    def read(self, index: int) -> bytes:
        """The bytes of a member, at most its declared size; raises OSError, EOFError, BadZipFile or zlib.error."""
        header, packed, size, crc, method = self._facts[index].item()
        data = self._slices.read(data_offset(self._slices.handle, header), packed)
        if method == zipfile.ZIP_DEFLATED:  # to zlib a size of 0 means no bound
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size) if size else b""
        if len(data) != size or zlib.crc32(data) != crc:
            raise zipfile.BadZipFile("Bad CRC")
        return data

    def find(self, name: str) -> int | None:
        """The index of the member with this name, or None."""
        place = bisect.bisect_left(self.names, name)  # the names are sorted
        return place if place < len(self.names) and self.names[place] == name else None


class ZipSource(FileSource):
    """Images in a zip file."""

    def __init__(self, path: Path, labels: str = ""):
        self.path = path
        with open_zip(path) as archive:
            members = archive.infolist()
        # checked before any member is left out: one harmful member is enough to refuse the archive
        unclear = False  # whether a name is neither ASCII nor UTF-8
        for member in members:
            _require_safe(path, member)
            name = _name_of(member)
            unclear |= not (member.flag_bits & UTF8_FLAG or name.isascii()) and name == member.filename
            member.filename = member_path(name) + "/" * name.endswith(("/", "\\"))
        visible = [member for member in members if not _is_junk(member.filename)]
        wanted = [member for member in visible if member.filename.lower().endswith(WANTED)]
        # zip allows repeated names, and programs differ in which of the two members they unpack
        names = sorted(member.filename for member in wanted)
        if twice := next((a for a, b in itertools.pairwise(names) if a == b), None):
            raise UserError(f"{path} contains {twice!r} twice: pack the archive again with every file once.")
        self._members = Members(path, wanted)
        checksums = {member.filename: member.CRC for member in visible if not member.is_dir()}
        folders = {member.filename.partition("/")[0] for member in visible if "/" in member.filename} - {""}
        super().__init__(str(path), checksums, labels, folders=folders, junk=len(members) - len(visible))
        if unclear and not all(map(str.isascii, self.class_names)):
            self.labels_from += (
                "; the archive does not record the encoding of its names, which were read as code page 437: if they are wrong, "
                "pack it again with names in UTF-8"
            )

    def read(self, path: str, name: str) -> bytes:
        index = self._members.find(path)
        assert index is not None, path
        with faults.reading(f"{name} in {self.path}", "a member of a zip file"):
            return self._members.read(index)


def _is_junk(path: str) -> bool:
    return any(map(is_hidden, path.split("/")))


def _name_of(member: zipfile.ZipInfo) -> str:
    """The name of a member. macOS and others write UTF-8 without its flag, which `zipfile` reads as code page 437."""
    with contextlib.suppress(UnicodeError):
        return member.filename if member.flag_bits & UTF8_FLAG else member.filename.encode("cp437").decode()
    return member.filename


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file; raises UserError for any other file."""
    with faults.reading(
        path, "a zip file", "Copy it again; if it is another kind of archive, unpack it and give the folder."
    ):
        return zipfile.ZipFile(path)


def _require_safe(path: Path, member: zipfile.ZipInfo) -> None:
    """Raises UserError for a malicious or unsupported member, before it is read."""
    # zipfile cuts `filename` at a null byte, so a harmful name may look harmless there
    require_safe_member(path, member.orig_filename, max(member.file_size, member.compress_size))
    name = member.filename
    if member.flag_bits & 1:
        raise UserError(f"{name} in {path} is encrypted: pack the archive again without a password.")
    if member.compress_type not in ZIP_METHODS:
        raise UserError(f"{name} in {path} is not compressed with Deflate: pack the archive again with Deflate.")


def tar_samples(path: Path, name: str, size: int, junk: list[str]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Key and extension -> (offset, size) of each sample: adjacent files with equal names up to the first dot."""
    key: str | None = None
    members: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()
    for member in _tar_members(path, name, size, junk):
        folder, slash, base = member_path(member.name).rpartition("/")
        stem, _, extension = base.partition(".")
        sample, extension = f"{folder}{slash}{stem}", extension.lower()
        if sample != key:
            if key is not None:
                yield key, members
            # `tar` without --sort=name may separate the files of a sample, and its image would lose its label
            if sample in seen:
                raise UserError(f"{name} contains the sample {sample!r} twice: pack it again with `tar --sort=name`.")
            key, members = sample, {}
            seen.add(sample)
        if extension in members:
            raise UserError(f"{name} contains {member.name!r} twice: pack it again with every file once.")
        members[extension] = (member.offset_data, member.size)
    if key is not None:
        yield key, members


def _tar_members(path: Path, name: str, size: int, junk: list[str]) -> Iterator[tarfile.TarInfo]:
    """The files of a shard; `junk` gets hidden ones. Raises UserError for malicious members, links and sparse files."""
    with (
        faults.reading(name, "an uncompressed tar file", "Unpack or copy it again."),
        tarfile.open(path, "r:") as archive,
    ):
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # not in typeshed; else the module keeps every header
            require_safe_member(name, member.name, member.size)
            if _is_junk(member_path(member.name)):
                junk.append(member.name)
                continue
            if member.isdir():
                continue
            # a link could point to any file of this machine; the bytes of a sparse file are not contiguous
            if not member.isreg() or member.issparse():
                raise UserError(
                    f"{member.name} in {name} is a link, a device or a sparse file, not a plain file: pack the shard "
                    "again with the files themselves (tar --dereference --hard-dereference)."
                )
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("unexpected end of data")
            yield member
        _require_tar_end(path, archive.offset)


def _require_tar_end(path: Path, offset: int) -> None:
    """Raises ReadError for damage or truncation, both of which tarfile takes for the end of the archive."""
    with open(path, "rb") as file:
        file.seek(offset)
        num_zeros = 0
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"damaged at byte {offset:,}, or several concatenated archives")
            num_zeros += len(block)
    if num_zeros < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")
