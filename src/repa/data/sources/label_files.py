"""Labels in separate files: a dataset.json, or a table with a column of paths (.csv, .tsv, .txt, .jsonl, .parquet)."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repa.base import extras, faults, files
from repa.base.errors import UserError, nearest
from repa.data.sources.contract import EXTENSIONS, Classes
from repa.data.sources.labels import by_name, from_listing

TABLES = (".csv", ".tsv", ".txt", ".parquet", ".jsonl")
FILE_COLUMNS = (
    "file_name", "filename", "file", "path", "image", "name", "key", "image_id", "image_name", "image_path", "img", "filepath",
)  # fmt: skip
Rows = list[Mapping[str, Any]]


def from_file(spec: str, names: Sequence[str]) -> Classes:
    """The classes that a file gives to images by their names.

    Args:
        spec: a `dataset.json`, or `TABLE.csv[:COLUMN]` (.tsv and .parquet too; the column is "label" unless given).
        names: paths of the images in the source.

    Raises:
        UserError: the file cannot be read, or does not give a label to exactly the images of the source.
    """
    path, column = spec, ""
    # the path itself may hold a colon, as drives and buckets do
    if not Path(spec).is_file() and ":" in spec:
        path, _, column = spec.rpartition(":")
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", *TABLES):
        raise UserError(
            f"labels is {spec!r}. Choose 'none', 'folders', 'folders:2', 'folders:last', 'folders:path', 'tars', a "
            "dataset.json, or a table such as labels.csv:COLUMN (.csv, .tsv, .txt, .jsonl, .parquet)."
        )
    if not Path(path).is_file():
        raise UserError(f"labels names {path!r}, but there is no such file: give its path.")
    if suffix == ".json":
        return from_listing(files.read_json(path), names, path)
    column = column or "label"
    if suffix == ".parquet":
        pairs = _pairs_of_parquet(path, column)
    else:
        with faults.reading(path, "a table"):
            data = Path(path).read_bytes()
        columns, rows = read_table(path, data)
        key = _key_column(path, columns, column)
        pairs = [(row.get(key), row.get(column)) for row in rows]
    for number, (name, _) in enumerate(
        pairs, start=2 if suffix in (".csv", ".tsv") else 1
    ):  # row 1 of those are the columns
        if name in (None, ""):  # which 0 is not
            raise UserError(f"Row {number} of {path} names no image: fill in the column of names.")
    return by_name(pairs, names, path)._replace(origin=spec)


def _pairs_of_parquet(path: str, column: str) -> list[tuple[Any, Any]]:
    parquet = extras.need("pyarrow.parquet", f"The table {path}")
    with faults.reading(path, "a parquet file"):
        key = _key_column(path, parquet.read_schema(path).names, column)
        table = parquet.read_table(path, columns=[key, column])  # others may be large
    return list(zip(table.column(key).to_pylist(), table.column(column).to_pylist(), strict=True))


def _key_column(path: str, there: Sequence[str], column: str) -> str:
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


def read_table(name: str, data: bytes) -> tuple[Sequence[str], Rows]:
    """Columns and rows of a table, by the ending of its name: JSON lines, words between spaces (.txt), else cells between marks.

    Raises UserError for a table that cannot be read, or has a column twice.
    """
    suffix = Path(name).suffix.lower()
    if suffix == ".jsonl":
        return _json_lines(name, data)
    if suffix == ".txt":
        with faults.reading(name, "a table of words in UTF-8"):
            columns, lines = _words(data.decode("utf-8-sig"))
        for number, words in enumerate(lines, start=1):
            if len(words) != len(columns):
                raise UserError(
                    f"Row {number} of {name} has {len(words)} words, but there are {len(columns)} columns: correct it."
                )
        return columns, [dict(zip(columns, words, strict=True)) for words in lines]
    with faults.reading(name, "a table", "Save it as comma-separated UTF-8."):
        text = data.decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_mark(text))
        columns = reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]  # "file_name, label"
        # DictReader would keep the last of two in silence
        if twice := next((column for column in columns if column and columns.count(column) > 1), None):
            raise UserError(f"{name} has the column {twice!r} twice: rename one of them.")
        rows: list[Mapping[str, Any]] = list(reader)
        if (long := next((number for number, row in enumerate(rows, start=2) if None in row), None)) is not None:
            raise UserError(
                f"Row {long} of {name} has more cells than there are columns ({len(columns)}): write a text that holds the mark "
                "between cells in quotes."
            )
        return columns, rows


def _mark(text: str) -> str:
    """What stands between the cells of a table: commas, semicolons or tabs."""
    # csv.Sniffer guesses from the frequencies of all characters, and takes a letter for a table of one column
    return max(",;\t", key=text.partition("\n")[0].count)  # the first of them, a comma, where there is none


def _words(text: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table of words between spaces, as CelebA's list_attr_celeba.txt and identity_CelebA.txt are.

    A first line that is one number counts the images. A line with a word less than the others names the columns but that of
    the images; where there is none, the columns are the image and, of two, "label".
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    # list_attr_celeba.txt begins with "202599"
    if lines and len(lines[0]) == 1 and lines[0][0].isdecimal():
        lines = lines[1:]
    if len(lines) > 1 and len(lines[0]) == len(lines[1]) - 1:
        return [FILE_COLUMNS[0], *lines[0]], lines[1:]
    if lines and set(lines[0]) & set(FILE_COLUMNS):
        return lines[0], lines[1:]
    width = len(lines[0]) if lines else 0
    return [FILE_COLUMNS[0], *(["label"] if width == 2 else [str(n) for n in range(1, width)])], lines


def _json_lines(name: str, data: bytes) -> tuple[Sequence[str], Rows]:
    rows: Rows = []
    with faults.reading(name, "JSON, one object a line"):
        for line in data.decode("utf-8-sig").split("\n"):  # JSON may hold other ends of lines, such as U+2028
            row = json.loads(line, object_pairs_hook=files.unique_keys) if line.strip() else {}
            if not isinstance(row, dict):
                raise UserError(f"{name} has a line that holds {type(row).__name__}: each line must be an object.")
            rows += [row] if row else []
    return list(rows[0]) if rows else [], rows


def table_columns(file: str, read: Callable[[str], bytes | None]) -> list[str]:
    """The columns of a table at the root of a source, by its first lines; none if it is not a readable table."""
    suffix = Path(file).suffix.lower()
    if suffix not in TABLES or suffix == ".parquet":
        return []
    try:
        data = read(file) or b""
        head, text = data.partition(b"\n")[0], data.decode("utf-8-sig")
        if suffix == ".jsonl":
            return list(_json_lines(file, head)[0])
    except (UnicodeDecodeError, UserError):
        return []
    if suffix == ".txt":
        columns, rows = _words(text)
        return columns if rows and rows[0][0].lower().endswith(EXTENSIONS) else []  # else it is a text for people
    line = text.partition("\n")[0].strip()
    return [column.strip() for column in next(csv.reader([line], delimiter=_mark(line)), [])]
