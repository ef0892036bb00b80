"""Batches of uint8 images from an .npz in ADM's format, read from inside the zip without loading it whole."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.base.errors import UserError

# what the zip and npy readers answer damaged or strange files with; RuntimeError: encrypted, or an unknown compression
UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError)


class SampleFile(NamedTuple):
    """What an .npz of samples holds."""

    num: int
    height: int
    width: int
    batches: Iterator[Tensor]  # uint8 (n, 3, H, W)


def read_samples(path: Path, batch_size: int) -> SampleFile:
    """Open `arr_0` of an .npz, uint8 (N, H, W, 3); nothing is read yet but its header. Never unpickles."""
    try:
        archive = zipfile.ZipFile(path)
        file = archive.open("arr_0.npy")
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read as samples: {error}. It must be an .npz with uint8 images under arr_0."
        ) from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 3), but is {dtype} {shape}.")

    def batches() -> Iterator[Tensor]:
        size = shape[1] * shape[2] * 3
        with archive, file:
            for start in range(0, shape[0], batch_size):
                num = min(batch_size, shape[0] - start)
                try:
                    data = file.read(num * size)
                except UNREADABLE as error:
                    raise UserError(f"{path} is damaged after image {start:,}: {error}.") from None
                if len(data) != num * size:
                    raise UserError(f"{path} is cut off: it announces {shape[0]:,} images and ends after {start:,}.")
                rows = np.frombuffer(data, np.uint8).reshape(num, *shape[1:])
                yield torch.from_numpy(rows.copy()).permute(0, 3, 1, 2)  # (n, 3, H, W)

    return SampleFile(*shape[:3], batches())
