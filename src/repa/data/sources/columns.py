"""Which columns of a table are the images, their labels and captions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from repa.base import files
from repa.base.errors import UserError, nearest
from repa.data.sources.folders import CAPTIONS, MAX_FILE_SIZE
from repa.data.sources.labels import MAX_CLASSES, Classes, classes_of, label_columns, named

LABEL = "label"


class Column(NamedTuple):
    """What is known of a column before it is read."""

    kind: Literal["image", "class", "text", "other"]
    class_names: tuple[str, ...] = ()


class Columns(NamedTuple):
    """The columns that are read; "" for none."""

    image: str
    label: str
    caption: str
    class_names: tuple[str, ...]


def choose(
    where: str, columns: Mapping[str, Column], labels: str, *, image: str = "", label: str = "", caption: str = ""
) -> Columns:
    """The columns asked for; else the one that holds images, the one of classes (or called "label"), and captions.

    Raises:
        UserError: a column is missing, or which one is meant cannot be told.
    """
    for key, name in (("image", image), ("label", label), ("caption", caption)):
        if name and name not in columns:
            raise UserError(
                f"{where} has no column {name!r} for {key}: it has {_list(columns)}.{nearest(name, columns)}"
            )
    if labels not in ("", "none"):
        raise UserError(
            f"labels was given {labels!r}: of {where} they are a column, which is written {where}:label=COLUMN, or 'none'."
        )
    binary = [name for name, column in columns.items() if column.kind == "image"]
    image = image or _only(where, [name for name in binary if name not in CAPTIONS] or binary, columns, "image")
    if columns[image].kind != "image":
        raise UserError(f"The column {image!r} of {where} does not hold the bytes of images: it has {_list(columns)}.")
    if not label and labels != "none":
        classes = [name for name, column in columns.items() if column.kind == "class"]
        usual = [name for name in label_columns(columns) if name != image]
        found = [LABEL] if LABEL in columns else classes if len(classes) == 1 else classes or usual
        label = _only(where, found, columns, "label", ", or give --labels none for one class") if found else ""
    if not caption:
        texts = (name for name in CAPTIONS if name in columns and name != label and columns[name].kind == "text")
        caption = next(texts, "")
    names = columns[label].class_names if label else ()
    return Columns(image, "" if labels == "none" else label, caption, names)


def _only(where: str, found: Sequence[str], columns: Mapping[str, Column], key: str, otherwise: str = "") -> str:
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"{where} has {len(found) or 'no'} columns that could be the {key}, among {_list(columns)}: "
        f"name the one as {where}:{key}={found[0] if found else 'COLUMN'}{otherwise}."
    )


def _list(columns: Mapping[str, Column]) -> str:
    return ", ".join(columns) or "none"


def labels_from(chosen: Columns, labels: str, columns: Iterable[str]) -> str:
    """Where the labels of a table came from, for the inventory."""
    if labels == "none":
        return "--labels none: one class"
    return (
        f"the column {chosen.label!r}" if chosen.label else f"no column of labels among {', '.join(columns)}: one class"
    )


def left_out(chosen: Columns, columns: Mapping[str, Column]) -> dict[str, int]:
    """Columns that are called as captions are, and hold something else."""
    return {
        f"column {name!r}, which holds no texts": 1
        for name in CAPTIONS
        if name in columns and name not in (chosen.label, chosen.caption) and columns[name].kind != "text"
    }


def classes_of_column(chosen: Columns, values: Sequence[Any], name_of: Any, where: str) -> Classes:
    """The classes in a column of labels; their names are kept where the table has them."""
    where = f"the column {chosen.label!r} of {where}"
    if not chosen.class_names:
        return classes_of(values, name_of, where)
    for index, value in enumerate(values):
        if value is None:
            raise UserError(f"{name_of(index)} has no label in {where}: give it one, or set labels to 'none'.")
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not -1 <= value < MAX_CLASSES:
            raise UserError(
                f"{name_of(index)} has the label {str(value)[:80]!r} in {where}, whose classes have names: a label there is the "
                "number of a class. Correct it, or set labels to 'none'."
            )
    return named(np.array(values, np.int64), chosen.class_names, name_of, where)


def image_bytes(cell: Any, name: str) -> bytes:
    """The bytes of an image file in a cell: bytes, or {"bytes": ..., "path": ...}."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        missing = "only the path of its image" if isinstance(cell, dict) and cell.get("path") else "no image"
        raise UserError(f"{name} holds {missing}: save the table with the images in it, or remove the row.")
    if len(data) > MAX_FILE_SIZE:
        raise UserError(
            f"{name} has {files.size(len(data))}, more than an image may have ({files.size(MAX_FILE_SIZE)}): remove it."
        )
    return data
