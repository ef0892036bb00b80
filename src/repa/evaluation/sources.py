"""Images of prepared data, of folders and of zips; and the one door to all kinds of sets."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repa.base.errors import UserError
from repa.base.images import to_tensor
from repa.data import DataSet, Source, open_data, open_source
from repa.data.manifest import MANIFEST, PARTS
from repa.data.remote import is_url
from repa.evaluation.images import Images
from repa.evaluation.npz import NpzImages

DECODERS = 8  # threads


class DataImages(Images):
    """The images of prepared data, mirrored copies left out."""

    def __init__(self, data: DataSet):
        if not data.has_images:
            raise UserError(f"{data.folder} holds no images to measure against: prepare it with --store-images true.")
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
    """Image files. Cropped to `resolution` as ADM crops; without one, all must have the size of the first."""

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
                f"{self.source.name(index)} in {self.where} has {image.width} x {image.height} pixels, the first image "
                f"{self.width} x {self.height}: samples that are measured together have one size."
            )
        return image


def open_images(where: str | Path, resolution: int | None = None) -> Images:
    """An .npz with arr_0, a folder made by `repa prepare`, or what `repa prepare` takes: a folder of images, a zip, ...

    Args:
        where: path, or a source's name such as photographs:num=1000.
        resolution: of a source, the side to crop to; None takes samples, which have one size already.
    """
    path = Path(where)
    if path.suffix == ".npz":
        return NpzImages(path)
    if is_url(where) or (path / MANIFEST).is_file() or (path / PARTS).is_dir():
        return DataImages(open_data(where))
    return SourceImages(open_source(str(where), labels="none"), str(where), resolution)
