"""Which class an image has: from its folder, a dataset.json, a column of a table, or none."""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from repa.base import extras, faults, files
from repa.base.errors import UserError, nearest
from repa.base.images import image_endings
from repa.data.sources.contract import plain_text, printable

ONE_CLASS = "all"
MAX_CLASSES = 1_000_000  # a label far beyond them is no label, and would make as many names
FILE_COLUMNS = (
    "file_name", "filename", "file", "path", "image", "name", "key", "image_id", "image_name", "image_path", "img", "filepath",
)  # fmt: skip
LABEL_COLUMNS = (
    "label", "labels", "fine_label", "coarse_label", "class", "classes", "cls", "class_id", "class_name", "category", "target",
    "y",
)  # fmt: skip
"""What columns and keys of labels are usually called."""
TABLES = (".csv", ".tsv", ".txt", ".parquet", ".jsonl")


class Classes(NamedTuple):
    """A class for each image."""

    labels: np.ndarray  # (N,) int64
    names: list[str]


def no_classes(num: int) -> Classes:
    """One class for all."""
    return Classes(np.zeros(num, np.int64), [ONE_CLASS])


def labels_digest(classes: Classes) -> str:
    """A checksum of the labels and the names of their classes."""
    names = "\n".join(classes.names).encode()
    return hashlib.sha256(classes.labels.tobytes() + names).hexdigest()


def classes_of(values: Iterable[Any], name_of: Callable[[int], str], where: str) -> Classes:
    """Labels as they were written, one for each image, as classes.

    Whole numbers (also written as text, or as 10.0) are labels already and their classes are named by them; -1 and 1
    alone, as attributes have them, are two classes of these names; other texts are the names of classes, in sorted order.

    Args:
        values: int or str for each image; None and "" are missing.
        name_of: what to call image i in a message.
        where: what they were read from, for messages.

    Raises:
        UserError: a label is missing, no whole number from 0 on, or of another type.
    """
    values = [plain_text(value) if isinstance(value, str) else value for value in values]
    for index, value in enumerate(values):
        if value is None or value == "" or value != value:
            raise UserError(
                f"{name_of(index)} has no label in {where}: give one to every image, or set labels to 'none'."
            )
        whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
        if isinstance(value, bool) or not (whole or isinstance(value, (int, np.integer, str))):
            raise UserError(
                f"The label of {name_of(index)} in {where} is {value!r}: a label is a whole number or the name of a class."
            )
    if all(_is_whole(value) for value in values):
        numbers = [int(value.partition(".")[0]) if isinstance(value, str) else int(value) for value in values]
        if set(numbers) == {-1, 1}:
            return Classes((np.array(numbers, np.int64) + 1) // 2, ["-1", "1"])
        return _numbered(numbers, name_of, where)
    texts = [str(value) for value in values]
    names = in_order(set(texts))
    position = {name: label for label, name in enumerate(names)}
    return Classes(np.array([position[text] for text in texts], np.int64), [printable(name) for name in names])


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes: numbers by value, other texts as texts."""
    names = list(names)
    numbers = all(re.fullmatch(r"[+-]?[0-9]{1,15}(\.[0-9]+)?", name) for name in names)
    return sorted(names, key=lambda name: (float(name) if numbers else 0.0, name))


def _is_whole(value: Any) -> bool:
    return not isinstance(value, str) or re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", value) is not None


def _numbered(labels: Sequence[int], name_of: Callable[[int], str], where: str) -> Classes:
    for index, label in enumerate(labels):
        if not 0 <= label < MAX_CLASSES:
            raise UserError(
                f"The label of {name_of(index)} in {where} is {_short(label)}: labels are 0 to {MAX_CLASSES - 1:,}. "
                "Correct it, or set labels to 'none'."
            )
    return Classes(np.array(labels, np.int64), [str(label) for label in range(max(labels, default=0) + 1)])


def _short(label: int) -> str:
    """A number to show; Python refuses to write out one of thousands of digits."""
    return (
        str(label)
        if abs(label) < 10**20
        else f"{label:.0e}"
        if abs(label) < 10**300
        else "a number of hundreds of digits"
    )


def named(labels: np.ndarray, names: Sequence[str], name_of: Callable[[int], str], where: str) -> Classes:
    """Labels whose classes have names; raises UserError for a label without one."""
    bad = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(bad):
        index = int(bad[0])
        raise UserError(
            f"The label of {name_of(index)} in {where} is {labels[index]}, but there are {len(names)} classes: "
            "correct it, or set labels to 'none'."
        )
    return Classes(labels.astype(np.int64), [printable(name) for name in names])


def from_file(spec: str, names: Sequence[str]) -> Classes:
    """The classes that a file gives to images by their names.

    Args:
        spec: a `dataset.json`, or `TABLE.csv[:COLUMN]` (.tsv and .parquet too; the column is "label" unless given).
        names: paths of the images in the source.

    Raises:
        UserError: the file cannot be read, or does not give a label to exactly the images of the source.
    """
    path, _, column = spec, "", ""
    if not Path(spec).is_file() and ":" in spec:
        path, _, column = spec.rpartition(":")
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", *TABLES):
        raise UserError(
            f"labels was given {spec!r}: allowed are 'none', 'folders', 'folders:2', 'folders:last', 'folders:path', 'tars', a "
            "dataset.json, or a table such as labels.csv:COLUMN (.csv, .tsv, .txt, .jsonl, .parquet)."
        )
    if not Path(path).is_file():
        raise UserError(f"labels names {path!r}, but there is no such file: give its path.")
    if suffix == ".json":
        return from_listing(files.read_json(path), names, path)
    keys, values = _read_table(Path(path), column or "label")
    return by_name(_unique(zip(keys, values, strict=True), path), names, path)


def from_listing(listing: Any, names: Sequence[str], where: str) -> Classes:
    """The labels of a dataset.json: {"labels": [[path, label], ...]}, or null when the images have no classes."""
    if not isinstance(listing, dict) or "labels" not in listing:
        raise UserError(
            f"{where} holds no labels: it must be an object with 'labels', a list of [path, label] or null."
        )
    pairs = listing["labels"]
    if pairs is None:
        return no_classes(len(names))
    if not isinstance(pairs, list):
        raise UserError(f"'labels' in {where} is {type(pairs).__name__}: it must be a list of [path, label] or null.")
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"{where} has an entry {str(pair)[:80]}: every entry of 'labels' is [path, label].")
    return by_name(_unique(pairs, where), names, where)


def _unique(pairs: Iterable[Sequence[Any]], where: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise UserError(f"{where} names {printable(str(name))!r} twice: give every image one label.")
        table[name] = value
    return table


def by_name(table: Mapping[str, Any], names: Sequence[str], where: str) -> Classes:
    """The classes of images from a table of their paths; the table must hold exactly those images."""
    table = {_plain_path(str(name)): value for name, value in table.items()}
    names = [plain_text(name) for name in names]
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


def _plain_path(name: str) -> str:
    """A path of a table as sources write theirs: './cat\\a.png' -> 'cat/a.png'."""
    return plain_text(name).replace("\\", "/").removeprefix("./")


def _near(table: Mapping[str, Any], name: str) -> list[str]:
    """A few names worth comparing with: comparing with a million takes minutes."""
    base = name.rpartition("/")[2]
    first = next(iter(table), None)
    return [str(key) for key in table if str(key).rpartition("/")[2] == base][:5] or ([str(first)] if first else [])


def _read_table(path: Path, column: str) -> tuple[list[str], list[Any]]:
    """The column of paths, and the column asked for."""
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, column)
    if path.suffix.lower() == ".jsonl":
        return _read_lines(path, column)
    if path.suffix.lower() == ".txt":
        return _read_words(path, column)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=_delimiter(head))
            key = _columns(path, list(reader.fieldnames or ()), column)
            rows = [(row[key], row[column]) for row in reader]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"{path} cannot be read as a table ({error}): save it as comma-separated UTF-8.") from error
    for line, (name, _) in enumerate(rows, start=2):
        if not name:
            raise UserError(f"Row {line} of {path} names no image: fill in the column {key!r}.")
    return [name for name, _ in rows], [value for _, value in rows]


def _delimiter(head: str) -> str:
    """What stands between the columns of a table, by its first line."""
    return max(",;\t", key=head.count) if any(mark in head for mark in ",;\t") else ","


def words_of(text: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table of words between spaces, as CelebA's list_attr_celeba.txt and identity_CelebA.txt are.

    A first line that is one number counts the images. A line with a word less than the others names the columns but that of
    the images; where there is none, the columns are the image and, of two, "label".
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if lines and len(lines[0]) == 1 and lines[0][0].isdecimal():
        lines = lines[1:]
    if len(lines) > 1 and len(lines[0]) == len(lines[1]) - 1:
        return [FILE_COLUMNS[0], *lines[0]], lines[1:]
    if lines and set(lines[0]) & set(FILE_COLUMNS):
        return lines[0], lines[1:]
    width = len(lines[0]) if lines else 0
    return [FILE_COLUMNS[0], *(["label"] if width == 2 else [str(n) for n in range(1, width)])], lines


def _read_words(path: Path, column: str) -> tuple[list[str], list[Any]]:
    with faults.reading(path, "a table of words in UTF-8"):
        columns, rows = words_of(path.read_text(encoding="utf-8-sig"))
    key = _columns(path, columns, column)
    for line, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise UserError(
                f"Row {line} of {path} has {len(row)} words, but there are {len(columns)} columns: correct it."
            )
    at = columns.index(key), columns.index(column)
    return [row[at[0]] for row in rows], [row[at[1]] for row in rows]


def table_columns(file: str, read: Callable[[str], bytes | None]) -> list[str]:
    """The columns of a table at the root of a source, by its first lines; none of what is no readable table."""
    suffix = Path(file).suffix.lower()
    if suffix not in TABLES or suffix == ".parquet":
        return []
    try:
        text = (read(file) or b"").decode("utf-8-sig")
        if suffix == ".jsonl":
            return list(rows_of_lines(text.partition("\n")[0].encode(), file)[0])
    except (UnicodeDecodeError, UserError, IndexError):
        return []
    head = text.partition("\n")[0].strip()
    if suffix != ".txt":
        return head.split(_delimiter(head))
    columns, rows = words_of(text)
    return columns if rows and rows[0][0].lower().endswith(image_endings()) else []  # else it is a text for people


def _read_lines(path: Path, column: str) -> tuple[list[str], list[Any]]:
    rows = rows_of_lines(path.read_bytes(), str(path))
    key = _columns(path, list(rows[0]) if rows else [], column)
    return [str(row.get(key, "")) for row in rows], [row.get(column) for row in rows]


def rows_of_lines(data: bytes, name: str) -> list[dict[str, Any]]:
    """The objects of a .jsonl, one a line."""
    rows = []
    with faults.reading(name, "JSON, one object a line"):
        for line in data.decode("utf-8-sig").splitlines():
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise UserError(f"{name} has a line that holds {type(row).__name__}: each line must be an object.")
            rows += [row] if row else []
    return rows


def label_columns(there: Iterable[str]) -> list[str]:
    """Those that are called as labels usually are, the likeliest first."""
    there = list(there)
    lower = {name.lower(): name for name in there}
    return [lower[name] for name in LABEL_COLUMNS if name in lower]


def _read_parquet(path: Path, column: str) -> tuple[list[str], list[Any]]:
    lib, parquet = (extras.need(f"pyarrow.{name}", f"The table {path}") for name in ("lib", "parquet"))
    try:
        key = _columns(path, parquet.read_schema(path).names, column)
        table = parquet.read_table(path, columns=[key, column])
    except (lib.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as a parquet file: {error}.") from error
    return table.column(key).to_pylist(), table.column(column).to_pylist()


def _columns(path: Path, there: list[str], column: str) -> str:
    """The column that names the images; the one asked for must be there too."""
    if column not in there:
        raise UserError(
            f"{path} has no column {column!r}: it has {', '.join(map(repr, there)) or 'none'}."
            f"{nearest(column, there)} Write the column as {path}:COLUMN."
        )
    keys = [name for name in FILE_COLUMNS if name in there and name != column]
    if not keys:
        raise UserError(
            f"{path} has no column that names the images: call it {FILE_COLUMNS[0]!r} (or {', '.join(FILE_COLUMNS[1:])})."
        )
    return keys[0]
