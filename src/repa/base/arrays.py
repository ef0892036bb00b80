"""Arrays in untrusted files: no pickles, a limit on the size, and one-sentence errors."""

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Literal

import numpy as np

from repa.base import faults, files
from repa.base.errors import UserError

LIMIT = 4 * 2**30  # unpacked bytes of all requested arrays; a reference of Inception's 2,048 features has 0.2 GiB
LOCAL_HEADER = struct.Struct("<26xHH")  # of a member of a zip: lengths of its name and of its extra field
OBJECTS = "it holds Python objects, which can run any program when they are read; save plain numbers"


def load_npz(
    path: str | Path, kind: str, names: Collection[str] | None = None, *, remedy: str = "", limit: int = LIMIT
) -> dict[str, np.ndarray]:
    """The arrays of an .npz: those of `names` that exist, or all without `names`.

    Raises:
        UserError: missing, damaged, holding Python objects, or unpacking to more than `limit` bytes.
    """
    with faults.reading(path, kind, remedy, missing=f"There is no file {path}."):
        # The zip's directory has the sizes, so a bomb is refused before anything is unpacked.
        with zipfile.ZipFile(path) as archive:
            # NumPy writes no comments; a flipped bit can create one that hides the arrays after it.
            if any(member.comment for member in archive.infolist()):
                raise zipfile.BadZipFile("its directory is damaged")
            require_once(archive)
            members = [m for m in archive.infolist() if names is None or m.filename.removesuffix(".npy") in names]
        if (size := sum(member.file_size for member in members)) > limit:
            raise UserError(
                f"{path} is refused: it unpacks to {files.size(size)}, but {kind} may have at most {files.size(limit)}. {remedy}".rstrip()
            )
        with _no_objects(), np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if names is None or name in names}


def load_npy(path: str | Path, kind: str, remedy: str = "", *, mapped: bool = False) -> np.ndarray:
    """The array of an .npy, or a memory map of it; UserError when it is missing, damaged or holds Python objects."""
    with faults.reading(path, kind, remedy, missing=f"There is no file {path}."), _no_objects():
        array = _mapped(path, 0, os.path.getsize(path))
        return array if mapped else np.load(path, allow_pickle=False)


def map_npz(path: str | Path, kind: str, name: str, *, remedy: str = "", limit: int = LIMIT) -> np.ndarray:
    """One array of an .npz: a memory map if it is stored unpacked (np.load cannot do this), otherwise as from `load_npz`."""
    with faults.reading(f"{name!r} of {path}", kind, remedy), _no_objects():
        with zipfile.ZipFile(path) as archive:
            require_once(archive)
            member = archive.getinfo(f"{name}.npy")
        if member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1:  # neither packed nor encrypted
            with open(path, "rb") as file:
                start = data_offset(file.fileno(), member.header_offset)
            return _mapped(path, start, member.file_size)
        return load_npz(path, kind, (name,), remedy=remedy, limit=limit)[name]


def require_once(archive: zipfile.ZipFile) -> None:
    """Raises BadZipFile for an archive that holds a name twice, of which readers take the first or the last."""
    names = archive.namelist()
    if len(archive.NameToInfo) < len(names):
        raise zipfile.BadZipFile(f"it holds {next(name for name in names if names.count(name) > 1)!r} twice")


def require_checksum(path: str | Path, kind: str, name: str) -> None:
    """Raises UserError for an array of an .npz that does not match the checksum of the zip, which a memory map ignores."""
    with (
        faults.reading(f"{name!r} of {path}", kind, "Copy or make it again."),
        zipfile.ZipFile(path) as archive,
        archive.open(f"{name}.npy") as member,
    ):
        while member.read(1 << 20):  # the last call checks
            pass


def _mapped(path: str | Path, start: int, size: int) -> np.ndarray:
    """A memory map of the .npy that takes up `size` bytes of a file from `start` on."""
    with open(path, "rb") as file:
        file.seek(start)
        shape, fortran, dtype = read_header(file)
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(OBJECTS)
    # In Python's integers: the file claims the shape, and a product in int64 could wrap around to a small number
    num_bytes = int(np.prod([dtype.itemsize, *shape], dtype=object))
    # NumPy would ignore the second of two arrays that were saved to one file
    if (rest := start + size - offset - num_bytes) > 0:
        raise ValueError(f"it has {rest:,} bytes after its array")
    if rest or start + size > os.path.getsize(path):
        raise ValueError("it is truncated")
    order: Literal["F", "C"] = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", offset, shape, order) if num_bytes else np.empty(shape, dtype)


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype from the header of an .npy that begins here."""
    version = np.lib.format.read_magic(file)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def data_offset(zip_file: int, header_offset: int) -> int:
    """Where the bytes of a member of a zip begin: after its local header, its name and its extra field.

    Args:
        zip_file: descriptor of the open file, whose position does not move.
        header_offset: of the local header, as the directory says.
    """
    # The directory at the end lacks this offset: the extra field in the local header may differ from the copy there
    header = files.read_at(zip_file, header_offset, LOCAL_HEADER.size)
    if not header.startswith(b"PK\x03\x04"):
        raise zipfile.BadZipFile("Bad signature")
    return header_offset + len(header) + sum(LOCAL_HEADER.unpack(header))


@contextlib.contextmanager
def _no_objects() -> Iterator[None]:
    """Turn NumPy's refusal of Python objects into an error that says what to do."""
    try:
        yield
    except ValueError as error:
        if any(sign in str(error) for sign in ("Object arrays", "Python objects", "pickled")):  # NumPy's words
            raise ValueError(OBJECTS) from error
        raise


def evenly_spaced(total: int, num: int) -> np.ndarray:
    """At most `num` of the numbers 0 to total - 1, evenly spaced, ascending: int64."""
    return np.unique(np.linspace(0, total - 1, min(num, total)).round().astype(np.int64))


def save_npy(path: str | Path, array: np.ndarray) -> None:
    """Write an .npy through Python's `write`, which reports every failure.

    `np.save` writes to a file through C buffers and does not check whether the last buffer reached a full disk: it can
    leave a truncated file without an error.
    """
    array = np.ascontiguousarray(array)
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(npy_header(array.dtype, array.shape))
        file.write(array.data if array.size else b"")


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The bytes before the numbers of an .npy of version 1.0."""
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue()


def save_npz(path: str | Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> None:
    """An .npz, whole or not at all."""
    # Through a file: NumPy would give a path the ending .npz.
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)  # type: ignore[arg-type]  # none is called allow_pickle


def write_images(archive: zipfile.ZipFile, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Write uint8 images of `shape` (N, H, W, 3) as arr_0 of an .npz, with only one part of them in memory at a time."""
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:  # its size is unknown at the start
        file.write(npy_header(np.dtype(np.uint8), shape))
        for part in parts:
            file.write(part.tobytes())
