"""Sets of uint8 images for evaluation: an .npz, prepared data, folders and zips; each process reads its share.

An .npz has ADM's format: memory-mapped if its images are stored uncompressed, otherwise read as a stream.
"""

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repa.base import dist, faults
from repa.base.arrays import map_npz, read_header, require_checksum, require_once
from repa.base.errors import UserError, require_type
from repa.base.images import to_tensor
from repa.data import DataSet, Source, open_checked, open_source
from repa.data.manifest import MANIFEST, PARTS
from repa.data.remote import is_url

DECODERS = 8  # threads
REMEDY = "Save them with np.savez and np.ascontiguousarray."


class Images(ABC):
    """Images of one size, in a fixed order."""

    where: str
    """Name of the set in messages."""
    num: int
    height: int
    width: int
    identity: dict[str, Any]
    """Identity of the contents, as far as it is known without reading all images."""
    home: Path | None = None
    """A folder that belongs to the set and may store results."""

    @abstractmethod
    def rows(self, indices: np.ndarray) -> Tensor:
        """Images `indices` (n,), ascending: uint8 (n, 3, H, W)."""

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share: (indices (n,), images); batch b belongs to process b modulo the number of processes."""
        # Batches in turn: each process reads forwards, and shares differ by at most one batch.
        for start in range(dist.rank() * size, self.num, dist.world() * size):
            indices = np.arange(start, min(start + size, self.num))
            yield torch.from_numpy(indices), self.rows(indices)


def gather_rows(parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """(n, D) and (n,) for each batch of this process, possibly none -> (N, D) of all processes, ordered by index; on the CPU."""
    rows = torch.cat(list(parts)) if parts else torch.empty(0, 0)
    index = torch.cat(list(indices)) if indices else torch.empty(0, dtype=torch.int64)
    if dist.active():  # collectives need equal shapes: all pad to the longest, with rows without an index
        shapes = dist.gather_objects(tuple(rows.shape))
        num, dim = (max(sizes) for sizes in zip(*shapes, strict=True))
        padded, places = torch.zeros(num, dim), torch.full((num,), -1)
        padded[: len(rows), : rows.shape[1]], places[: len(rows)] = rows, index
        rows, index = dist.gather(padded), dist.gather(places)  # (world * num, D)
        rows, index = rows[index >= 0], index[index >= 0]
    in_order = bool((index[1:] > index[:-1]).all())
    return rows if in_order else rows[index.argsort()]  # copies all rows, which a single process avoids


class NpzImages(Images):
    """`arr_0` of an .npz, uint8 (N, H, W, 3). Opening reads its header only. Never unpickles."""

    def __init__(self, path: Path):
        self.path, self.where = path, str(path)
        wanted = "It must be an .npz with uint8 images under arr_0."
        # numpy would unpack the whole member into memory: 50,000 images of 512 pixels are 39 GB.
        with faults.reading(path, "images", wanted, missing=f"There is no file {path}."):
            self._archive = zipfile.ZipFile(path)
            require_once(self._archive)
            self._info = self._archive.getinfo("arr_0.npy")
            self._file = self._archive.open(self._info)
            shape, fortran, dtype = read_header(self._file)
            self._start = self._file.tell()
            # The checksum of a zip covers the entire member, so it starts with the array's header.
            self._file.seek(0)
            self._checksum = zlib.crc32(self._file.read(self._start))
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise UserError(
                f"{path}: arr_0 must be uint8 (N, H, W, 3), but is {dtype} {shape}: save the images in this form."
            )
        if 0 in shape:
            raise UserError(f"{path} holds no images: arr_0 has the shape {shape}. Give a file with images.")
        self.num, self.height, self.width, _ = shape
        self._size = self.height * self.width * 3
        # Before any allocation: a header may declare more than the file contains.
        if self._info.file_size < self._start + self.num * self._size:
            whole = (self._info.file_size - self._start) // self._size
            raise UserError(
                f"{path} is truncated: it declares {self.num:,} images but holds {whole:,}. Copy or make it again."
            )
        self.identity = {"name": path.name, "shape": list(shape), "crc32": self._info.CRC}
        self._map = None
        if fortran or self._info.compress_type == zipfile.ZIP_STORED:
            self._map = map_npz(path, "images", "arr_0", remedy=REMEDY)
            self._next = 0
            if fortran:  # its images are not stored in the order of the checksum
                require_checksum(path, "images", "arr_0")
                self._next = -1

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
            raise UserError(
                f"{self.path} is truncated: it declares {self.num:,} images but ends after {index:,}. Copy or make it again."
            )
        return np.frombuffer(data, np.uint8).reshape(self.height, self.width, 3)

    def _check(self, indices: np.ndarray, data: np.ndarray) -> None:
        """Update the zip's checksum while reading in order; a process that reads only a share does not check it."""
        if indices[0] != self._next or len(indices) != indices[-1] - indices[0] + 1:
            return
        self._checksum, self._next = zlib.crc32(data.data, self._checksum), int(indices[-1]) + 1
        if self._next == self.num and self._checksum != self._info.CRC:
            raise UserError(f"{self.path} is damaged: arr_0 does not match its checksum. Copy or make it again.")


class DataImages(Images):
    """The images of prepared data, without mirrored copies."""

    def __init__(self, data: DataSet):
        require_type(data, DataSet, "The images must be data that repa.open_data opened")
        data.require_images(" to measure against")
        self.data, self.where = data, str(data.folder)
        self.home = None if is_url(data.folder) else Path(data.folder)
        self.num = len(data.originals)
        self.height = self.width = data.resolution
        self.identity = data.summary()

    def rows(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(
            self.data.gather("images", np.array([self.data.originals[i] for i in indices.tolist()]))
        )


class SourceImages(Images):
    """Image files. Cropped to `resolution` like ADM; without it, all must have the size of the first."""

    def __init__(self, source: Source, where: str, resolution: int | None):
        self.source, self.where, self.resolution = source, where, resolution
        self.num = len(source)
        self.width, self.height = (resolution, resolution) if resolution else source.decode(0).size
        self.identity = {**source.identity, "resolution": resolution}
        self._pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")  # Pillow decodes without Python's lock

    def rows(self, indices: np.ndarray) -> Tensor:
        return torch.stack(list(self._pool.map(self._image, indices.tolist())))

    def _image(self, index: int) -> Tensor:
        return to_tensor(self.source.image(index, self.resolution) if self.resolution else self._as_is(index))

    def _as_is(self, index: int) -> Image.Image:
        image = self.source.decode(index)
        if image.size != (self.width, self.height):
            raise UserError(
                f"{self.source.name(index)} in {self.where} has {image.width} x {image.height} pixels, but the first image "
                f"{self.width} x {self.height}: crop or resize them to the same size."
            )
        return image


def open_images(where: str | Path, resolution: int | None = None) -> Images:
    """An .npz with arr_0, prepared data, or any source of `repa prepare`: a folder of images, a zip, ...

    Args:
        where: path, or a source's name such as photographs:num=1000.
        resolution: side to which images of a source are cropped; None: they are samples of equal size.
    """
    path = Path(where)
    if path.suffix == ".npz":
        return NpzImages(path)
    if is_url(where) or (path / MANIFEST).is_file() or (path / PARTS).is_dir():
        return DataImages(open_checked(where))
    return SourceImages(open_source(str(where), labels="none"), str(where), resolution)
