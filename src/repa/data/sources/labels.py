"""The classes of images: from folders, a dataset.json, a table of paths, or values as they were written."""

import os.path
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repa.base.errors import UserError, nearest, printable
from repa.data.sources.contract import Classes, one_class, plain_text
from repa.data.sources.names import SPLITS, split_folders, splits_among

# a larger label is an identifier or a time; it would make that many class names and rows of the embedding
MAX_CLASSES = 1_000_000
MISSING = ("na", "n/a", "#n/a", "<na>", "none", "null", "?", "-", "inf", "+inf", "-inf")
LABEL_COLUMNS = (
    "label", "labels", "fine_label", "coarse_label", "class", "classes", "cls", "class_id", "class_name", "category", "target",
    "y",
)  # fmt: skip
"""Usual names of columns and keys of labels."""
AROUND = (
    "images", "image", "imgs", "img", "data", "dataset", "photos", "pictures", "jpg", "png", "classes", "set", "all",
)  # fmt: skip
"""Names of folders that contain the class folders and are not classes."""


def classes_of(values: Iterable[Any], name_of: Callable[[int], str], where: str) -> Classes:
    """The classes of labels as they were written, one for each image.

    Whole numbers (also as text, or as 10.0) are the labels, and name their classes. -1 and 1 alone, as in attributes,
    are two classes with these names. Other texts are the names of classes, which are sorted.

    Args:
        values: int or str for each image; None and "" are missing.
        name_of: index -> name of the image, for messages.
        where: origin of the values, for messages and reports.

    Raises:
        UserError: a label is missing, negative, too large, or neither a whole number nor a text.
    """
    values = [plain_text(value) if isinstance(value, str) else value for value in values]
    for index, value in enumerate(values):
        # pandas writes a missing label as NaN, which differs from itself, or as "nan" if it converted labels to text
        if value is None or value != value or (isinstance(value, str) and value.lower() in ("", "nan")):
            raise UserError(_missing(name_of(index), where))
        # in Python True is an int, but the classes of a column of booleans have no order
        whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
        if isinstance(value, bool) or not (whole or isinstance(value, (int, np.integer, str))):
            raise UserError(
                f"The label of {name_of(index)} in {where} is {value!r}: a label is a whole number or the name of a "
                "class. Convert the labels, or set labels to 'none'."
            )
    written: dict[int, str] = {}
    for value in dict.fromkeys(value for value in values if isinstance(value, str) and _is_whole(value)):
        if (first := written.setdefault(_number_of(value), value)) != value:
            raise UserError(
                f"Labels in {where} are numbers, but {first!r} and {value!r} are the same one: write each number in "
                "one way, or give the classes names that are not numbers."
            )
    if all(_is_whole(value) for value in values):
        numbers = [_number_of(value) for value in values]
        if set(numbers) == {-1, 1}:
            return Classes((np.array(numbers, np.int64) + 1) // 2, ["-1", "1"], where)
        return _numbered(numbers, name_of, where)
    names = [index for index, value in enumerate(values) if not _is_whole(value)]
    # if all others are numbers, such a word means a missing label; among names, "none" may be a name
    if len(names) < len(values) and all(values[index].lower() in MISSING for index in names):
        raise UserError(_missing(name_of(names[0]), where))
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(values):
        number = next(value for value in values if not isinstance(value, str))
        name = next(text for text in texts if not _is_whole(text))
        raise UserError(
            f"The labels in {where} mix numbers such as {number} with names such as {printable(name)!r}: use only "
            "numbers or only names."
        )
    return classes_by_name(texts, where)


def classes_by_name(texts: Sequence[str], origin: str) -> Classes:
    """The classes of images with these class names, sorted: by value if all names are numbers, else as text."""
    # a float represents at most 15 digits exactly: two longer numbers could compare equal
    numbers = all(re.fullmatch(r"[+-]?[0-9]{1,15}(\.[0-9]+)?", name) for name in set(texts))
    names = sorted(set(texts), key=lambda name: (float(name) if numbers else 0.0, name))
    position = {name: label for label, name in enumerate(names)}
    labels = np.array([position[text] for text in texts], np.int64)
    return Classes(labels, [printable(name) for name in names], origin)


def _is_whole(value: Any) -> bool:
    # a decimal comma: tables with semicolons come from countries that write 10,0; 1,000 is more often a thousand
    return not isinstance(value, str) or re.fullmatch(r"[+-]?[0-9]{1,4000}(\.0*|,0{0,2})?", value) is not None


def _number_of(value: Any) -> int:
    return int(re.split("[.,]", value)[0]) if isinstance(value, str) else int(value)


def _numbered(labels: Sequence[int], name_of: Callable[[int], str], where: str) -> Classes:
    for index, label in enumerate(labels):
        if not 0 <= label < MAX_CLASSES:
            raise UserError(
                f"The label of {name_of(index)} in {where} is {_short(label)}: labels are 0 to {MAX_CLASSES - 1:,}. "
                "Correct it, or set labels to 'none'."
            )
    return Classes(np.array(labels, np.int64), [str(label) for label in range(max(labels, default=0) + 1)], where)


def _short(label: int) -> str:
    """A number for a message: Python refuses to print one with thousands of digits."""
    return str(label) if abs(label) < 10**20 else "a number of more than 20 digits"


def named(values: Sequence[Any], names: Sequence[str], name_of: Callable[[int], str], where: str) -> Classes:
    """The classes of labels that are indices into `names`; raises UserError for a missing or invalid label."""
    if len(names) > MAX_CLASSES:
        raise UserError(f"{where} has {len(names):,} class names, more than {MAX_CLASSES:,}: set labels to 'none'.")
    for index, value in enumerate(values):
        if value is None:
            raise UserError(_missing(name_of(index), where))
        # `datasets` writes -1 for the secret labels of a test split
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < len(names):
            raise UserError(
                f"The label of {name_of(index)} in {where} is {str(value)[:80]}, but must be the index of one of the "
                f"{len(names)} classes: correct it, or set labels to 'none'."
            )
    return Classes(np.array(values, np.int64), [printable(name) for name in names], where)


def _missing(name: str, where: str) -> str:
    return f"{name} has no label in {where}: give every image a label, or set labels to 'none'."


def label_columns(columns: Iterable[str]) -> list[str]:
    """The columns with a usual name for labels, the likeliest first."""
    columns = list(columns)
    lower = {name.lower(): name for name in columns}
    return [lower[name] for name in LABEL_COLUMNS if name in lower]


def like_labels(columns: Iterable[str]) -> list[str]:
    """The columns that may be the label: those of `label_columns`, else names such as label_id and image_class.

    Only the former are used without a choice of the user: target_size is no label.
    """
    columns = list(columns)
    worded = [name for name in columns if any(word in name.lower() for word in ("label", "class", "categor", "target"))]
    return label_columns(columns) or worded


def from_listing(listing: Any, names: Sequence[str], where: str) -> Classes:
    """The labels of a dataset.json: {"labels": [[path, label], ...]}, or null for images without classes."""
    if not isinstance(listing, dict) or "labels" not in listing:
        raise UserError(
            f"{where} holds no labels: it must be an object with 'labels', a list of [path, label] or null."
        )
    pairs = listing["labels"]
    if pairs is None:
        return one_class(len(names), why=f"null in {where}")
    if not isinstance(pairs, list):
        raise UserError(f"'labels' in {where} is {type(pairs).__name__}: it must be a list of [path, label] or null.")
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"{where} has an entry {str(pair)[:80]}: every entry of 'labels' is [path, label].")
    return by_name(pairs, names, where)


def by_name(pairs: Iterable[Sequence[Any]], names: Sequence[str], where: str) -> Classes:
    """The classes of images from (path, label) pairs, which must name exactly these images.

    Paths are relative to the root of the source, or all to the one folder that contains all images.
    """
    table: dict[str, Any] = {}
    for path, value in pairs:
        name = plain_path(str(path))
        # the same label again is no error: a table of captions has one row per caption
        if name in table and table[name] != value:
            raise UserError(f"{where} names {printable(name)!r} twice with two labels: give every image one label.")
        table[name] = value
    names = [plain_text(name) for name in names]
    # a table that was made inside the one folder of images has paths relative to it
    if not any(name in table for name in names) and (above := os.path.commonpath([*map(os.path.dirname, names)])):
        names = [name.removeprefix(f"{above}/") for name in names]
    values = []
    for name in names:
        if name not in table:
            raise UserError(
                f"{printable(name)} has no label in {where}.{nearest(name, _near(table, name))} "
                "Write paths from the root of the source, and give every image a label."
            )
        values.append(table[name])
    if len(table) > len(names):
        known = set(names)
        extra = [name for name in table if name not in known]
        raise UserError(
            f"{where} gives labels to {len(extra):,} images that are not in the source; the first is "
            f"{printable(str(extra[0]))}: remove these labels, or correct the source."
        )
    return classes_of(values, lambda index: printable(names[index]), where)


def plain_path(name: str) -> str:
    """A path from a table in the form that sources use: './cat\\a.png' -> 'cat/a.png'."""
    return plain_text(name).replace("\\", "/").removeprefix("./")


def _near(table: Mapping[str, Any], name: str) -> list[str]:
    """A few candidates for the suggestion of a name, because `nearest` takes minutes for a million names."""
    base = name.rpartition("/")[2]
    first = next(iter(table), None)
    return [str(key) for key in table if str(key).rpartition("/")[2] == base][:5] or ([str(first)] if first else [])


def from_folders(where: str, paths: Sequence[str], labels: str = "") -> Classes:
    """The classes from folders.

    "" and "folders" take the first folder of each path, "folders:2" the second, "folders:last" the folder of the image,
    "folders:path" all folders joined. If "" is ambiguous, the error names the choices.

    Raises:
        UserError: it is ambiguous which folders are classes, or an image is in none.
    """
    level = _level(labels)
    prefix = ""
    if not labels:
        prefix = _around(where, paths)
        level = prefix.count("/") + 2 if prefix else 1
    depths = {path.count("/") for path in paths}
    if not labels and depths == {0}:
        return one_class(len(paths), why="no folders or file names of classes")
    if depths == {0}:
        raise UserError(
            f"labels is {labels!r}, but no image of {where} is in a folder: leave --labels out for the labels of the "
            "source itself, or give --labels none for one class."
        )
    folders = []
    for path in paths:
        parts = path.split("/")[:-1]
        if parts and level is not None and len(parts) < level:
            raise UserError(
                f"labels is {labels!r}, but {printable(path)} of {where} is at folder depth {len(parts)}: give a "
                "smaller number, folders:last or none."
            )
        if not parts:
            raise UserError(
                f"{where} holds folders of images and also images in no folder, such as {printable(path)}: move every "
                "image into the folder of its class, or give --labels none for one class."
            )
        folders.append(plain_text("/".join(parts) if level == 0 else parts[-1] if level is None else parts[level - 1]))
    named_levels = {
        0: "the whole path of each image's folder",
        None: "the folder of each image",
        1: "the first folder of each path",
    }
    deeper = {path.split("/")[level] for path in paths if level and path.count("/") > level}
    if deeper and not labels and (splits := split_folders([path.split("/", level or 0)[-1] for path in paths])):
        raise UserError(
            f"The class folders in {where} contain folders that look like splits "
            f"({', '.join(map(printable, splits))}): give a folder with one split, or --labels "
            f"folders{f':{level}' if prefix else ''} to use all splits as one set."
        )
    which = named_levels.get(level, f"folder {level} of each path" + (f", inside {prefix}/" if prefix else ""))
    if deeper and not labels:
        shown = ", ".join(printable(name) for name in sorted(deeper)[:3])
        which += f"; folders inside them ({shown}) are not classes (--labels folders:last or folders:path uses them)"
    return classes_by_name(folders, which)


def _level(labels: str) -> int | None:
    """The level of the class folder in a path, from 1; None: the last folder; 0: all folders joined."""
    _, _, level = labels.partition(":")
    if level in ("last", "path"):
        return None if level == "last" else 0
    if level and not re.fullmatch(r"[1-9][0-9]?", level):
        raise UserError(f"labels is {labels!r}: give folders, folders:2, folders:last or folders:path.")
    return int(level or 1)


def _around(where: str, paths: Sequence[str]) -> str:
    """The path of the folders that contain the class folders; "": none. Raises UserError if it is ambiguous."""
    around: list[str] = []
    while True:
        level = len(around)
        inside = "/".join([where, *map(printable, around)])
        tops = {path.split("/")[level] if path.count("/") > level else "" for path in paths}
        nested = all(path.count("/") > level + 1 for path in paths)
        # train/cat/1.png and val/cat/1.png would become classes train and val, and training would see validation images
        splits = splits_among(tops)
        if splits and (len(tops) > 1 or not nested):
            deep = {path.count("/") for path in paths} != {level + 2}
            all_splits = (
                f", or --labels folders:{'last' if deep else level + 2} for the classes inside all splits"
                if nested
                else ""
            )
            as_classes = f"folders:{level + 1}" if level else "folders"
            raise UserError(
                f"{inside} holds folders that look like splits ({', '.join(map(printable, splits))}), not like "
                f"classes: give one of them as the source{all_splits}, or --labels {as_classes} if they are classes, "
                "or --labels none."
            )
        # images/1.png and masks/1.png
        parts = sorted(
            top for top in tops if any(word in top.lower() for word in ("mask", "label", "annotation", "segment"))
        )
        images = sorted(top for top in tops - {*parts} if top.lower() in AROUND or top.lower().endswith("images"))
        if parts and images:
            raise UserError(
                f"{inside} holds folders that look like images and their masks ({images[0]}, {printable(parts[0])}), "
                f"not like classes: give {inside}/{images[0]} as the source, or --labels folders:{level + 1} if they are "
                "classes, or --labels none."
            )
        if len(tops) > 1 or not nested or tops == {""}:
            return "/".join(around)
        # a single folder may be the class of all images or contain the classes: its name decides, else the user
        (top,) = tops
        names_of_source = () if level else (Path(where).stem.lower(), Path(where).name.lower())
        if top.lower() not in (*SPLITS, *AROUND, *names_of_source):
            inner = sorted({path.split("/")[level + 1] for path in paths})
            raise UserError(
                f"All images of {where} are in folders inside {'/'.join(map(printable, [*around, top]))}/: give "
                f"--labels folders:{level + 2} if {', '.join(map(printable, inner[:3]))} are the classes, --labels "
                f"{f'folders:{level + 1}' if level else 'folders'} if {printable(top)} is a class, or --labels none."
            )
        around.append(top)
