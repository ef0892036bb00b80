"""Labels in separate files: a dataset.json, or a table with a column of paths (.csv, .tsv, .txt, .jsonl, .parquet)."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repa.base import faults, files, imports
from repa.base.errors import UserError, nearest
from repa.data.sources.contract import EXTENSIONS, Classes, text_of
from repa.data.sources.labels import by_name, from_listing

TABLES = (".csv", ".tsv", ".txt", ".parquet", ".jsonl")
FILE_COLUMNS = (
    "file_name", "filename", "file", "path", "image", "name", "key", "image_id", "image_name", "image_path", "img", "filepath",
)  # fmt: skip
HEAD = 1 << 16  # bytes of a table that are searched for its columns; a longer first line is refused
Rows = list[Mapping[str, Any]]


def split_file(spec: str, folder: Path | None = None) -> tuple[str, str]:
    """(path, column) of a file of labels; "" is no column. A path that does not exist here is looked for in `folder`."""
    # the path itself may contain a colon, after a drive for example
    for path, column in ((spec, ""), *([spec.rpartition(":")[::2]] if ":" in spec else ())):
        for place in (Path(path), *([folder / path] if folder else ())):
            if place.is_file():
                return str(place), column
    return path, column


def from_file(spec: str, names: Sequence[str], folder: Path | None = None) -> Classes:
    """The classes of images by their names in a file.

    Args:
        spec: a `dataset.json`, or `TABLE.csv[:COLUMN]`, also .tsv, .txt, .jsonl, .parquet; default column: "label".
        names: paths of the images in the source.
        folder: another place of the file: the source itself, or the folder of an archive.

    Raises:
        UserError: the file is unreadable, or does not label exactly the images of the source.
    """
    path, column = split_file(spec, folder)
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", *TABLES):
        raise UserError(
            f"labels is {spec!r}. Choose 'none', 'folders', 'folders:2', 'folders:last', 'folders:path', 'tars', a "
            "dataset.json, or a table such as labels.csv:COLUMN (.csv, .tsv, .txt, .jsonl, .parquet)."
        )
    if not Path(path).is_file():
        also = f" here or in {folder}" if folder else ""
        raise UserError(f"labels names {path!r}, but there is no such file{also}: correct the path.")
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
    ):  # row 1 of .csv and .tsv has the names of the columns
        if name in (None, ""):  # not 0, which is a name
            raise UserError(f"Row {number} of {path} names no image: fill in the column of image names.")
    return by_name(pairs, names, path)._replace(origin=spec)


def _pairs_of_parquet(path: str, column: str) -> list[tuple[Any, Any]]:
    parquet = imports.need("pyarrow.parquet", f"The table {path}")
    with faults.reading(path, "a parquet file"):
        key = _key_column(path, parquet.read_schema(path).names, column)
        table = parquet.read_table(path, columns=[key, column])  # other columns may be large
    return list(zip(table.column(key).to_pylist(), table.column(column).to_pylist(), strict=True))


def _key_column(path: str, columns: Sequence[str], column: str) -> str:
    """The column of image names; raises UserError if it or `column` is missing."""
    if column not in columns:
        raise UserError(
            f"{path} has no column {column!r}: it has {', '.join(map(repr, columns)) or 'none'}."
            f"{nearest(column, columns)} Choose a column with {path}:COLUMN."
        )
    lower = {name.lower(): name for name in reversed(columns) if name != column}
    keys = [lower[name] for name in FILE_COLUMNS if name in lower]
    if not keys:
        raise UserError(
            f"{path} has no column of image names: call it {FILE_COLUMNS[0]!r} (or {', '.join(FILE_COLUMNS[1:])})."
        )
    return keys[0]


def read_table(name: str, data: bytes) -> tuple[Sequence[str], Rows]:
    """Columns and rows of a table: JSON lines (.jsonl), words separated by spaces (.txt), else cells with separators.

    Raises UserError for a table that is unreadable or has two columns of one name.
    """
    suffix = Path(name).suffix.lower()
    if suffix == ".jsonl":
        return _json_lines(name, data)
    if suffix == ".txt":
        with faults.reading(name, "a table of words in UTF-8"):
            columns, lines = _words(text_of(data))
        for number, words in enumerate(lines, start=1):
            if len(words) != len(columns):
                raise UserError(
                    f"Row {number} of {name} has {len(words)} words for {len(columns)} columns: correct it."
                )
        return columns, [dict(zip(columns, words, strict=True)) for words in lines]
    with faults.reading(name, "a table", "Save it as comma-separated UTF-8."):
        text, mark = _with_mark(text_of(data))
        if len(re.match(r"[^\r\n]*", text)[0]) > HEAD:  # type: ignore[index]  # it matches any text
            raise UserError(
                f"{name} has a first line of more than {HEAD:,} letters, which names no columns: correct it."
            )
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)
        columns = reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]  # "file_name, label"
        # DictReader would silently keep the last of two
        if twice := next((column for column in columns if column and columns.count(column) > 1), None):
            raise UserError(f"{name} has the column {twice!r} twice: rename one of them.")
        rows: list[Mapping[str, Any]] = list(reader)
        if (long := next((number for number, row in enumerate(rows, start=2) if None in row), None)) is not None:
            raise UserError(
                f"Row {long} of {name} has more cells than the {len(columns)} columns: put texts that contain the "
                "separator in quotes."
            )
        return columns, rows


def _with_mark(text: str) -> tuple[str, str]:
    """A table from the names of its columns on, and the separator of its cells: a comma, semicolon, tab or bar."""
    text = text.lstrip("\r\n")
    if named := re.match(r'"?sep=(.)"?[\r\n]+', text):  # for Excel
        return text[named.end() :], named[1]
    # csv.Sniffer counts all characters, so it takes a letter for the separator of a single column
    return text, max(",;\t|", key=re.match(r"[^\r\n]*", text)[0].count)  # type: ignore[index]  # without any: a comma


def _words(text: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table separated by spaces, such as CelebA's list_attr_celeba.txt and identity_CelebA.txt.

    A first line with a single number counts the images. The next line names the columns if it has one word less than
    the rows (none for the image) or a usual name of the image column. Otherwise: the image and, of two, "label".
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
        for line in text_of(data).split("\n"):  # not splitlines: JSON may contain U+2028 and the like
            row = json.loads(line, object_pairs_hook=files.unique_keys) if line.strip() else {}
            if not isinstance(row, dict):
                raise UserError(f"{name} has a line that holds {type(row).__name__}: each line must be a JSON object.")
            rows += [row] if row else []
    return list(rows[0]) if rows else [], rows


def table_columns(file: str, read: Callable[[str], bytes | None]) -> list[str]:
    """The columns of a table, or the keys of a .json, from its first lines; [] for other files.

    The column of image names is found by its cells if it has no usual name. Wrong letters do not hide the columns.
    """
    suffix = Path(file).suffix.lower()
    if suffix not in (*TABLES, ".json") or suffix == ".parquet":
        return []
    try:
        text = text_of((read(file) or b"")[:HEAD], "replace").replace("\0", "")  # UTF-16 without its mark has zeros
        if suffix == ".jsonl":
            return list(_json_lines(file, text.partition("\n")[0].encode())[0])
    except UserError:
        return []
    if suffix == ".json":
        return list(dict.fromkeys(re.findall(r'"([^"\\]{1,200})"\s*:', text)))
    if suffix == ".txt":
        columns, rows = _words(text)
        return columns if rows and rows[0][0].lower().endswith(EXTENSIONS) else []  # else it is prose
    text, mark = _with_mark(text)
    lines = re.split(r"[\r\n]+", text)[:5]
    rows = [[cell.strip() for cell in next(csv.reader([line], delimiter=mark), [])] for line in lines]
    if not set(FILE_COLUMNS).isdisjoint(map(str.lower, rows[0])):
        return rows[0]
    for row in rows:
        if (place := next((i for i, cell in enumerate(row) if cell.lower().endswith(EXTENSIONS)), None)) is not None:
            names = rows[0] if len(rows[0]) == len(row) else list(map(str, range(len(row))))
            return [*names[:place], FILE_COLUMNS[0], *names[place + 1 :]]
    return rows[0]
