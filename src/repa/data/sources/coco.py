"""Images and captions from COCO's annotation files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from repa.base import faults, files
from repa.base.errors import UserError, printable
from repa.data.sources.contract import Source, Strings, one_class, read_image_file


class CocoSource(Source):
    """The images of an annotation file, in one class. Images and the captions of each are in the order of their ids.

    Args:
        annotations: a file such as annotations/captions_val2014.json.
        images: the folder of the images; "": the folder named like the end of the file's name (val2014), beside the
            file or one folder up.

    Raises:
        UserError: the files are missing, or have other contents.
    """

    has_captions = True

    def __init__(self, annotations: Path, *, images: str = ""):
        values = files.read_object(annotations, images=list, annotations=list)
        self.folder = _folder_of_images(annotations, images)
        remedy = "Give a file such as captions_val2014.json, whose entries have id, file_name, image_id and caption."
        with faults.reading(annotations, "COCO's annotations of captions", remedy):
            names: dict[int, str] = {}
            for row in sorted(values["images"], key=lambda row: _number(row, "id")):
                if names.setdefault(row["id"], _plain_file_name(row["file_name"])) != row["file_name"]:
                    raise ValueError(f"two images have the id {row['id']}")
            texts: dict[int, list[str]] = {number: [] for number in names}
            for row in sorted(values["annotations"], key=lambda row: _number(row, "id")):
                if _number(row, "image_id") not in texts:
                    raise ValueError(f"image_id {row['image_id']} is none of its images")
                texts[row["image_id"]].append(_caption(row["caption"]))
        if not names:
            raise UserError(f"{annotations} lists no images: give an annotation file of captions.")
        self._names = Strings(names.values())
        # JSON in one array: lists of 600,000 captions would need several times as much memory
        self._captions = Strings(json.dumps(of_image) for of_image in texts.values())
        digest = hashlib.sha256(json.dumps([[*names.items()], [*texts.values()]]).encode())
        digest.update(self._sampled_digest(len(names), strict=True).encode())
        classes = one_class(len(names), why="captions have no classes")
        self._identify(classes, annotations.name, with_labels=False, sha256=digest.hexdigest())

    def name(self, index: int) -> str:
        return printable(self._names[index])

    def contents(self, index: int) -> bytes:
        return read_image_file(self.folder / self._names[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(json.loads(self._captions[index]))


def _folder_of_images(annotations: Path, images: str) -> Path:
    # COCO's archives unpack to annotations/captions_val2014.json and val2014/, side by side
    split = annotations.stem.rpartition("_")[2]
    places = [Path(images)] if images else [annotations.parent / split, annotations.parent.parent / split]
    folder = next((path for path in places if path.is_dir()), None)
    if folder is None:
        raise UserError(
            f"The images of {annotations} are not in {' or '.join(map(str, places))}: give {annotations}:images=FOLDER."
        )
    return folder


def _number(row: dict[str, Any], key: str) -> int:
    if type(number := row[key]) is not int:  # 1.5 and true would become the id of another image
        raise ValueError(f"{key} {number!r:.40} is not a whole number")
    return number


def _plain_file_name(name: str) -> str:
    """The name of an image; raises ValueError for a path, which could lead outside the folder of images."""
    if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise ValueError(f"file_name {name!r:.80} is not the plain name of a file")
    name.encode()  # raises a ValueError for half of a surrogate pair, which JSON can contain
    return name


def _caption(caption: str) -> str:
    if not isinstance(caption, str):
        raise ValueError(f"caption {caption!r:.80} is not a text")
    return " ".join(caption.split())
