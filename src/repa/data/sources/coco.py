"""COCO's own annotation files of captions: one JSON that names images and says several things of each."""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from repa.base import faults, files
from repa.base.errors import UserError
from repa.base.images import decode_image
from repa.data.sources.contract import Source, Strings, printable, sampled_digest
from repa.data.sources.folders import MAX_FILE_SIZE

MOST_BYTES = 2**28  # of an annotation file: COCO 2017 has 92 MB, and parsed JSON takes up to 24 times as much memory


class CocoSource(Source):
    """Images of an annotation file in the order of their ids, each with its captions in the order of theirs. One class.

    Args:
        annotations: a file such as annotations/captions_val2014.json.
        images: the folder of the images; "": the folder beside the file, or beside its folder, that is named like the end of the
            file's name (val2014).

    Raises:
        UserError: no such files, or a file that holds something else.
    """

    has_captions = True
    labels_from = "nothing: captions have no classes"

    def __init__(self, annotations: Path, *, images: str = ""):
        if annotations.stat().st_size > MOST_BYTES:
            raise UserError(
                f"{annotations} is larger than {files.size(MOST_BYTES)}: give an annotation file of captions."
            )
        values = files.read_object(annotations, images=list, annotations=list)
        self.folder = _folder(annotations, images)
        with faults.reading(annotations, "COCO's annotations of captions"):
            names = dict(sorted((int(row["id"]), _plain(row["file_name"])) for row in values["images"]))
            texts: dict[int, list[str]] = {number: [] for number in names}
            for row in sorted(values["annotations"], key=lambda row: int(row["id"])):
                texts[int(row["image_id"])].append(_text(row["caption"]))
        if not names:
            raise UserError(f"{annotations} names no image: give an annotation file of captions.")
        self._names = Strings(names.values())
        self._captions = Strings(json.dumps(of_image) for of_image in texts.values())
        self.class_names, self.labels = ["all"], np.zeros(len(names), np.int64)
        digest = hashlib.sha256(json.dumps([[*names.items()], [*texts.values()]]).encode())
        digest.update(sampled_digest(len(names), lambda index: self._bytes(index)).encode())
        self.identity = {"name": annotations.name, "num_images": len(names), "sha256": digest.hexdigest()}

    def name(self, index: int) -> str:
        return printable(self._names[index])

    def decode(self, index: int) -> Image.Image:
        return decode_image(self._bytes(index), self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(json.loads(self._captions[index]))

    def _bytes(self, index: int) -> bytes:
        path = self.folder / self._names[index]
        faults.require_plain(path)
        try:
            if path.stat().st_size <= MAX_FILE_SIZE:
                return path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror}. Give the folder of the images as images=FOLDER."
            ) from error
        raise UserError(f"{path} is larger than an image may be ({files.size(MAX_FILE_SIZE)}): remove it.")


def _folder(annotations: Path, images: str) -> Path:
    split = annotations.stem.rpartition("_")[2]
    found = [Path(images)] if images else [annotations.parent / split, annotations.parent.parent / split]
    folder = next((path for path in found if path.is_dir()), None)
    if folder is None:
        raise UserError(
            f"The images of {annotations} are not in {' or '.join(map(str, found))}: write {annotations}:images=FOLDER."
        )
    return folder


def _plain(name: str) -> str:
    """A name in the folder of images: whoever made the file must not make us read elsewhere."""
    if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise ValueError(f"file_name {name!r:.80} is no plain name of a file")
    name.encode()  # a ValueError for halves of surrogate pairs, which JSON can write
    return name


def _text(caption: str) -> str:
    if not isinstance(caption, str):
        raise ValueError(f"caption {caption!r:.80} is no text")
    return " ".join(caption.split())
