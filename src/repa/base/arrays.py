"""Arrays in files that anyone may have written: no pickles, no more bytes than expected, and what is wrong in one sentence."""

import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from repa.base import faults, files
from repa.base.errors import UserError

LIMIT = 4 * 2**30  # bytes of all arrays asked for, unpacked; a reference of Inception's 2,048 features has 0.2 GiB


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
            members = [m for m in archive.infolist() if names is None or m.filename.removesuffix(".npy") in names]
        if (size := sum(member.file_size for member in members)) > limit:
            raise UserError(
                f"{path} is refused: it unpacks to {files.size(size)}, more than {kind} may ({files.size(limit)}). {remedy}".rstrip()
            )
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if names is None or name in names}


def load_npy(path: str | Path, kind: str, remedy: str = "") -> np.ndarray:
    """The array of an .npy; UserError when it is missing, damaged or holds Python objects."""
    with faults.reading(path, kind, remedy, missing=f"There is no file {path}."):
        return np.load(path, allow_pickle=False)


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


def write_images(archive: zipfile.ZipFile, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """uint8 images of `shape` (N, H, W, 3) as arr_0 of an .npz that is being written, no more than one part of them in memory."""
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:  # its size is not known when it begins
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for part in parts:
            file.write(part.tobytes())
