"""Arrays in files that anyone may have written: no pickles, no more bytes than expected, and what is wrong in one sentence."""

import contextlib
import os
import struct
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Literal

import numpy as np

from repa.base import faults, files
from repa.base.errors import UserError

LIMIT = 4 * 2**30  # bytes of all arrays asked for, unpacked; a reference of Inception's 2,048 features has 0.2 GiB
LOCAL_HEADER = struct.Struct("<26xHH")  # of a member of a zip: lengths of its name and of its extra field
OBJECTS = "it holds Python objects, which can run any program when they are read; save plain numbers"


def load_npz(
    path: str | Path, kind: str, names: Collection[str] | None = None, *, remedy: str = "", limit: int = LIMIT
) -> dict[str, np.ndarray]:
    """The arrays of an .npz, those of `names` that are there; all without names.

    Raises:
        UserError: missing, damaged, holding Python objects, or unpacking to more than `limit` bytes.
    """
    with faults.reading(path, kind, remedy, missing=f"There is no file {path}."):
        # Sizes are in the zip's directory: a bomb is refused before anything of it is unpacked.
        with zipfile.ZipFile(path) as archive:
            # NumPy writes no comments: one that a flipped bit made swallows the arrays behind it.
            if any(member.comment for member in archive.infolist()):
                raise zipfile.BadZipFile("its directory is damaged")
            members = [m for m in archive.infolist() if names is None or m.filename.removesuffix(".npy") in names]
        if (size := sum(member.file_size for member in members)) > limit:
            raise UserError(
                f"{path} is refused: it unpacks to {files.size(size)}, more than {kind} may ({files.size(limit)}). {remedy}".rstrip()
            )
        with _no_objects(), np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if names is None or name in names}


def load_npy(path: str | Path, kind: str, remedy: str = "", *, mapped: bool = False) -> np.ndarray:
    """The array of an .npy, or a memory map of it; UserError when it is missing, damaged or holds Python objects."""
    with faults.reading(path, kind, remedy, missing=f"There is no file {path}."), _no_objects():
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def map_npz(path: str | Path, kind: str, name: str, *, remedy: str = "", limit: int = LIMIT) -> np.ndarray:
    """One array of an .npz: as a memory map where it lies there as it is, which np.load has not; else as `load_npz` gives it."""
    with faults.reading(f"{name!r} of {path}", kind, remedy), _no_objects():
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
        if member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1:  # neither packed nor encrypted
            return _mapped(path, member)
        return load_npz(path, kind, (name,), remedy=remedy, limit=limit)[name]


def _mapped(path: str | Path, member: zipfile.ZipInfo) -> np.ndarray:
    with open(path, "rb") as file:
        start = data_offset(file.fileno(), member.header_offset)
        file.seek(start)
        shape, fortran, dtype = read_header(file)
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(OBJECTS)
    # In Python's integers: the shape is the file's word, and a product in int64 could wrap around to a small number
    num_bytes = int(np.prod([dtype.itemsize, *shape], dtype=object))
    if offset - start + num_bytes != member.file_size or offset + num_bytes > os.path.getsize(path):
        raise ValueError("it is cut short")
    order: Literal["F", "C"] = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", offset, shape, order) if num_bytes else np.empty(shape, dtype)


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of the array of an .npy that begins here."""
    version = np.lib.format.read_magic(file)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def data_offset(zip_file: int, header_offset: int) -> int:
    """Where the bytes of a member of a zip begin: after its local header, its name and its extra field.

    Args:
        zip_file: descriptor of the open file, whose position does not move.
        header_offset: of the local header, as the directory says.
    """
    # The directory at the end does not tell: the local header may have another extra field than its copy there
    header = files.read_at(zip_file, header_offset, LOCAL_HEADER.size)
    if not header.startswith(b"PK\x03\x04"):
        raise zipfile.BadZipFile("Bad signature")
    return header_offset + len(header) + sum(LOCAL_HEADER.unpack(header))


@contextlib.contextmanager
def _no_objects() -> Iterator[None]:
    """NumPy's refusal of Python objects, in words that say what to do."""
    try:
        yield
    except ValueError as error:
        if any(sign in str(error) for sign in ("Object arrays", "Python objects", "pickled")):  # as NumPy says it
            raise ValueError(OBJECTS) from error
        raise


def save_npy(path: str | Path, array: np.ndarray) -> None:
    """An .npy, whole or not at all.

    `np.save` writes to a file by C's buffers and does not look whether the last of them reached a disk that is full: what it
    leaves then is cut short, without an error. Through `write` of Python's file every failure is seen.
    """
    array = np.ascontiguousarray(array)
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data if array.size else b"")


def save_npz(path: str | Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> None:
    """An .npz, whole or not at all."""
    # Through a file: NumPy would give a path the ending .npz.
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)  # type: ignore[arg-type]  # none is called allow_pickle


def write_images(archive: zipfile.ZipFile, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """uint8 images of `shape` (N, H, W, 3) as arr_0 of an .npz that is being written, no more than one part of them in memory."""
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:  # its size is not known when it begins
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for part in parts:
            file.write(part.tobytes())
