"""Which class an image has: from its folder, a dataset.json, a table of paths, or values as they were written."""

import os.path
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repa.base.errors import UserError, nearest, printable
from repa.data.sources.contract import Classes, one_class, plain_text
from repa.data.sources.names import SPLITS, several_splits, splits_among

# a larger label is an id or a time, and would make as many names and rows of the embedding as it counts
MAX_CLASSES = 1_000_000
MISSING = ("na", "n/a", "#n/a", "<na>", "none", "null", "?", "-")
LABEL_COLUMNS = (
    "label", "labels", "fine_label", "coarse_label", "class", "classes", "cls", "class_id", "class_name", "category", "target",
    "y",
)  # fmt: skip
"""What columns and keys of labels are usually called."""
AROUND = (
    "images", "image", "imgs", "img", "data", "dataset", "photos", "pictures", "jpg", "png", "classes", "set", "all",
)  # fmt: skip
"""Names of a folder around the folders of classes, which is not a class."""


def classes_of(values: Iterable[Any], name_of: Callable[[int], str], where: str) -> Classes:
    """Labels as they were written, one for each image, as classes.

    Whole numbers (also written as text, or as 10.0) are labels already and their classes are named by them; -1 and 1
    alone, as attributes have them, are two classes of these names; other texts are the names of classes, in sorted order.

    Args:
        values: int or str for each image; None and "" are missing.
        name_of: what to call image i in a message.
        where: what they were read from, for messages and reports.

    Raises:
        UserError: a label is missing, no whole number from 0 on, or of another type.
    """
    values = [plain_text(value) if isinstance(value, str) else value for value in values]
    for index, value in enumerate(values):
        # NaN, which is no number equal to itself, is how pandas writes a missing label, and "nan" where it made texts of all
        if value is None or value != value or (isinstance(value, str) and value.lower() in ("", "nan")):
            raise UserError(_missing(name_of(index), where))
        # True is an int of Python, but a column of booleans is an attribute, whose classes have no order
        whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
        if isinstance(value, bool) or not (whole or isinstance(value, (int, np.integer, str))):
            raise UserError(
                f"The label of {name_of(index)} in {where} is {value!r}: a label is a whole number or the name of a class. "
                "Convert the labels, or set them to 'none'."
            )
    written: dict[int, str] = {}
    for value in dict.fromkeys(value for value in values if isinstance(value, str) and _is_whole(value)):
        if (first := written.setdefault(_number_of(value), value)) != value:
            raise UserError(
                f"Labels in {where} are numbers, but {first!r} and {value!r} are the same one: write it one way, or give the "
                "classes names that are no numbers."
            )
    if all(_is_whole(value) for value in values):
        numbers = [_number_of(value) for value in values]
        if set(numbers) == {-1, 1}:
            return Classes((np.array(numbers, np.int64) + 1) // 2, ["-1", "1"], where)
        return _numbered(numbers, name_of, where)
    names = [index for index, value in enumerate(values) if not _is_whole(value)]
    # beside numbers alone they stand for a label that is missing; among names, "none" may be one
    if len(names) < len(values) and all(values[index].lower() in MISSING for index in names):
        raise UserError(_missing(name_of(names[0]), where))
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(values):
        number = next(value for value in values if not isinstance(value, str))
        name = next(text for text in texts if not _is_whole(text))
        raise UserError(
            f"The labels in {where} are numbers such as {number} and names such as {printable(name)!r}: write numbers for all, or "
            "names for all."
        )
    return classes_by_name(texts, where)


def classes_by_name(texts: Sequence[str], origin: str) -> Classes:
    """The classes of images from the name of each one's class. Names that are all numbers are sorted by value, others as texts."""
    # at most 15 digits, which a float holds exactly: a longer one would compare as equal to its neighbour
    numbers = all(re.fullmatch(r"[+-]?[0-9]{1,15}(\.[0-9]+)?", name) for name in set(texts))
    names = sorted(set(texts), key=lambda name: (float(name) if numbers else 0.0, name))
    position = {name: label for label, name in enumerate(names)}
    labels = np.array([position[text] for text in texts], np.int64)
    return Classes(labels, [printable(name) for name in names], origin)


def _is_whole(value: Any) -> bool:
    return not isinstance(value, str) or re.fullmatch(r"[+-]?[0-9]{1,4000}(\.0*)?", value) is not None


def _number_of(value: Any) -> int:
    return int(value.partition(".")[0]) if isinstance(value, str) else int(value)


def _numbered(labels: Sequence[int], name_of: Callable[[int], str], where: str) -> Classes:
    for index, label in enumerate(labels):
        if not 0 <= label < MAX_CLASSES:
            raise UserError(
                f"The label of {name_of(index)} in {where} is {_short(label)}: labels are 0 to {MAX_CLASSES - 1:,}. "
                "Correct it, or set labels to 'none'."
            )
    return Classes(np.array(labels, np.int64), [str(label) for label in range(max(labels, default=0) + 1)], where)


def _short(label: int) -> str:
    """A number to show; Python refuses to write out one of thousands of digits."""
    return str(label) if abs(label) < 10**20 else "a number of more than 20 digits"


def named(values: Sequence[Any], names: Sequence[str], name_of: Callable[[int], str], where: str) -> Classes:
    """Labels that are the numbers of classes with names; raises UserError for one that is missing or no such number."""
    if len(names) > MAX_CLASSES:
        raise UserError(
            f"{where} has names of {len(names):,} classes, more than {MAX_CLASSES:,}: set labels to 'none'."
        )
    for index, value in enumerate(values):
        if value is None:
            raise UserError(_missing(name_of(index), where))
        # -1 is how `datasets` writes that the labels of a test split are secret
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < len(names):
            raise UserError(
                f"The label of {name_of(index)} in {where} is {str(value)[:80]}, but there are {len(names)} classes, and a label is "
                "the number of one: correct it, or set labels to 'none'."
            )
    return Classes(np.array(values, np.int64), [printable(name) for name in names], where)


def _missing(name: str, where: str) -> str:
    return f"{name} has no label in {where}: give one to every image, or set labels to 'none'."


def label_columns(there: Iterable[str]) -> list[str]:
    """Those of the columns that are called as labels usually are, the likeliest first."""
    there = list(there)
    lower = {name.lower(): name for name in there}
    return [lower[name] for name in LABEL_COLUMNS if name in lower]


def from_listing(listing: Any, names: Sequence[str], where: str) -> Classes:
    """The labels of a dataset.json: {"labels": [[path, label], ...]}, or null when the images have no classes."""
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
    """The classes of images from (path, label) pairs, which must be of exactly those images.

    Paths start at the root of the source, or all at the folder that all images lie in.
    """
    table: dict[str, Any] = {}
    for path, value in pairs:
        name = plain_path(str(path))
        # the same label again is no mistake: a table of captions has a row for each of them
        if name in table and table[name] != value:
            raise UserError(f"{where} names {printable(name)!r} twice: give every image one label.")
        table[name] = value
    names = [plain_text(name) for name in names]
    # a table that was made inside the one folder of images writes paths from there
    if not any(name in table for name in names) and (above := os.path.commonpath([*map(os.path.dirname, names)])):
        names = [name.removeprefix(f"{above}/") for name in names]
    values = []
    for name in names:
        if name not in table:
            raise UserError(
                f"{printable(name)} has no label in {where}.{nearest(name, _near(table, name))} "
                "Paths there are those from the root of the source; give a label to every image."
            )
        values.append(table[name])
    if len(table) > len(names):
        known = set(names)
        extra = [name for name in table if name not in known]
        raise UserError(
            f"{where} gives labels to {len(extra):,} images that are not in the source; the first is "
            f"{printable(str(extra[0]))}: remove them from it, or correct the source."
        )
    return classes_of(values, lambda index: printable(names[index]), where)


def plain_path(name: str) -> str:
    """A path of a table as sources write theirs: './cat\\a.png' -> 'cat/a.png'."""
    return plain_text(name).replace("\\", "/").removeprefix("./")


def _near(table: Mapping[str, Any], name: str) -> list[str]:
    """A few names to compare a misspelt one with: `nearest` on a million takes minutes."""
    base = name.rpartition("/")[2]
    first = next(iter(table), None)
    return [str(key) for key in table if str(key).rpartition("/")[2] == base][:5] or ([str(first)] if first else [])


def from_folders(where: str, paths: Sequence[str], labels: str = "") -> Classes:
    """The classes that folders are.

    "" and "folders" take the first folder of each path, "folders:2" the second, "folders:last" the one that holds the
    image, "folders:path" all of them. Where "" could mean two things, it is refused with the choices.

    Raises:
        UserError: which folders are classes cannot be told, or an image does not lie in one.
    """
    level = _level(labels)
    prefix = ""
    if not labels:
        prefix = _around(where, paths)
        level = prefix.count("/") + 2 if prefix else 1
    depths = {path.count("/") for path in paths}
    if not labels and depths == {0}:
        return one_class(len(paths), why="no folders")
    if depths == {0}:
        raise UserError(
            f"labels is {labels!r}, but no image of {where} lies in a folder: give --labels none for one class."
        )
    folders = []
    for path in paths:
        parts = path.split("/")[:-1]
        if parts and level is not None and len(parts) < level:
            raise UserError(
                f"labels is {labels!r}, but {printable(path)} of {where} lies in {len(parts)} folders: give fewer, folders:last, "
                "or none."
            )
        if not parts:
            raise UserError(
                f"{where} holds folders of images and loose images such as {printable(path)}: move every image into the "
                "folder of its class, or give --labels none for one class."
            )
        folders.append(plain_text("/".join(parts) if level == 0 else parts[-1] if level is None else parts[level - 1]))
    named_levels = {
        0: "the whole path of each image's folder",
        None: "the folder of each image",
        1: "the first folder of each path",
    }
    deeper = {path.split("/")[level] for path in paths if level and path.count("/") > level}
    if not labels and (splits := several_splits(deeper)):
        raise UserError(
            f"The folders of classes in {where} hold what looks like splits ({', '.join(map(printable, splits))}): give a folder of one "
            f"of them, or --labels folders{f':{level}' if prefix else ''} to take all of them as one set."
        )
    which = named_levels.get(level, f"folder {level} of each path" + (f", inside {prefix}/" if prefix else ""))
    if deeper and not labels:
        shown = ", ".join(printable(name) for name in sorted(deeper)[:3])
        which += f"; folders inside them ({shown}) are no classes (--labels folders:last or folders:path takes them)"
    return classes_by_name(folders, which)


def _level(labels: str) -> int | None:
    """Which folder of a path is its class, counted from 1; None for the last, 0 for the whole path."""
    _, _, level = labels.partition(":")
    if level in ("last", "path"):
        return None if level == "last" else 0
    if level and not re.fullmatch(r"[1-9][0-9]?", level):
        raise UserError(f"labels is {labels!r}: write folders, folders:2, folders:last or folders:path.")
    return int(level or 1)


def _around(where: str, paths: Sequence[str]) -> str:
    """The folders around those of classes, "" for none; raises UserError where that cannot be told."""
    around: list[str] = []
    while True:
        level = len(around)
        inside = "/".join([where, *map(printable, around)])
        tops = {path.split("/")[level] if path.count("/") > level else "" for path in paths}
        nested = all(path.count("/") > level + 1 for path in paths)
        # train/cat/1.png and val/cat/1.png would become the classes train and val, and a set that holds its own validation
        splits = splits_among(tops)
        if splits and (len(tops) > 1 or not nested):
            deep = {path.count("/") for path in paths} != {level + 2}
            all_of_them = (
                f", or --labels folders:{'last' if deep else level + 2} for the classes inside all of them"
                if nested
                else ""
            )
            own = f"folders:{level + 1}" if level else "folders"
            raise UserError(
                f"{inside} holds what looks like splits ({', '.join(map(printable, splits))}), which are no classes: give one of them "
                f"as the source{all_of_them}, or --labels {own} if they are classes, or none."
            )
        if len(tops) > 1 or not nested or tops == {""}:
            return "/".join(around)
        # a single folder may be the class of all images or hold the classes: its name decides, or the user
        (top,) = tops
        own_names = () if level else (Path(where).stem.lower(), Path(where).name.lower())
        if top.lower() not in (*SPLITS, *AROUND, *own_names):
            inner = sorted({path.split("/")[level + 1] for path in paths})
            raise UserError(
                f"All images of {where} lie in folders inside {'/'.join(map(printable, [*around, top]))}/: give --labels "
                f"folders:{level + 2} if {', '.join(map(printable, inner[:3]))} are classes, --labels "
                f"{f'folders:{level + 1}' if level else 'folders'} if {printable(top)} is one, or --labels none."
            )
        around.append(top)
