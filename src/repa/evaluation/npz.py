"""uint8 images inside an .npz, ADM's format: memory-mapped in the zip where they are stored, else read as a stream."""

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repa.base import faults
from repa.base.arrays import load_npz
from repa.base.errors import UserError
from repa.evaluation.images import Images

REMEDY = "Save them with np.savez and np.ascontiguousarray."


class NpzImages(Images):
    """`arr_0` of an .npz, uint8 (N, H, W, 3). Opening reads its header only. Never unpickles."""

    def __init__(self, path: Path):
        self.path, self.where = path, str(path)
        wanted = "It must be an .npz with uint8 images under arr_0."
        with faults.reading(path, "images", wanted, missing=f"There is no file {path}."):
            self._archive = zipfile.ZipFile(path)
            self._info = self._archive.getinfo("arr_0.npy")
            self._file = self._archive.open(self._info)
            shape, fortran, dtype = _read_header(self._file)
            self._start = self._file.tell()
            stored = self._info.compress_type == zipfile.ZIP_STORED
            begin = _data_offset(path, self._info) if stored else 0
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 3), but is {dtype} {shape}.")
        self.num, self.height, self.width, _ = shape
        self._size = self.height * self.width * 3
        if self._info.file_size < self._start + self.num * self._size:
            whole = (self._info.file_size - self._start) // self._size
            raise UserError(f"{path} is cut off: it announces {self.num:,} images and holds {whole:,}.")
        self.identity = {"name": path.name, "shape": list(shape), "crc32": self._info.CRC}
        self._map = None
        if fortran:  # images do not lie one after the other: nothing to stream or to sum up in order
            self._map, self._next = load_npz(path, "images in Fortran order", ("arr_0",), remedy=REMEDY)["arr_0"], -1
        elif stored and self.num:
            self._map = np.memmap(path, np.uint8, "r", offset=begin + self._start, shape=shape)
            self._checksum = zlib.crc32(np.memmap(path, np.uint8, "r", offset=begin, shape=(self._start,)))
            self._next = 0

    def rows(self, indices: np.ndarray) -> Tensor:
        """Images `indices` (n,), ascending: uint8 (n, 3, H, W). A stream is cheapest read in order."""
        if self._map is None:
            data = np.stack([self._streamed(index) for index in indices.tolist()])
        else:
            data = self._map[indices]  # (n, H, W, 3), a copy
            self._check(indices, data)
        return torch.from_numpy(data).permute(0, 3, 1, 2)  # (n, 3, H, W)

    def _streamed(self, index: int) -> np.ndarray:
        with faults.reading(self.path, f"images (image {index:,})"):
            self._file.seek(self._start + index * self._size)
            data = self._file.read(self._size)
        if len(data) != self._size:
            raise UserError(f"{self.path} is cut off: it announces {self.num:,} images and ends after {index:,}.")
        return np.frombuffer(data, np.uint8).reshape(self.height, self.width, 3)

    def _check(self, indices: np.ndarray, data: np.ndarray) -> None:
        """A process that reads everything in order compares the zip's checksum as it goes; a share has none."""
        if indices[0] != self._next or len(indices) != indices[-1] - indices[0] + 1:
            return
        self._checksum, self._next = zlib.crc32(data, self._checksum), int(indices[-1]) + 1
        whole = self._info.file_size == self._start + self.num * self._size
        if self._next == self.num and whole and self._checksum != self._info.CRC:
            raise UserError(f"{self.path} is damaged: arr_0 has another checksum than when it was written.")


def _read_header(file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header of 30 bytes, its name and its extra field."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name + extra
