"""Labels in separate files: a dataset.json, or a table with a column of paths (.csv, .tsv, .txt, .jsonl, .parquet)."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
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
            f"labels was given {spec!r}. Choose 'none', 'folders', 'folders:2', 'folders:last', 'folders:path', 'tars', a "
            "dataset.json, or a table such as labels.csv:COLUMN (.csv, .tsv, .txt, .jsonl, .parquet)."
        )
    if not Path(path).is_file():
        raise UserError(f"labels names {path!r}, but there is no such file: give its path.")
    if suffix == ".json":
        return from_listing(files.read_json(path), names, path)
    keys, values = _read_table(Path(path), column or "label")
    return by_name(zip(keys, values, strict=True), names, path)


def _read_table(path: Path, column: str) -> tuple[list[str], list[Any]]:
    """The column of paths, and the column asked for."""
    read = {".parquet": _read_parquet, ".jsonl": _read_lines, ".txt": _read_words}
    return read.get(path.suffix.lower(), _read_csv)(path, column)


def _read_csv(path: Path, column: str) -> tuple[list[str], list[Any]]:
    with faults.reading(path, "a table", "Save it as comma-separated UTF-8."):
        columns, reader = _csv(path.read_bytes(), str(path))
        key = _columns(path, columns, column)
        rows = [(row[key], row[column]) for row in reader]
    for line, (name, _) in enumerate(rows, start=2):
        if not name:
            raise UserError(f"Row {line} of {path} names no image: fill in the column {key!r}.")
    return [name for name, _ in rows], [value for _, value in rows]


def rows_of_csv(data: bytes, name: str) -> list[dict[str, Any]]:
    with faults.reading(name, "a table", "Save it as comma-separated UTF-8."):
        return list(_csv(data, name)[1])


def _csv(data: bytes, name: str) -> tuple[list[str], Iterable[dict[str, Any]]]:
    """Columns and rows of a table whose columns stand between commas, semicolons or tabs."""
    text = data.decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text.partition("\n")[0]))
    columns = [column.strip() for column in reader.fieldnames or ()]  # "file_name, label"
    reader.fieldnames = columns
    # DictReader would keep the last of two in silence
    if twice := next((column for column in columns if column and columns.count(column) > 1), None):
        raise UserError(f"{name} has the column {twice!r} twice: rename one of them.")
    return columns, reader


def _delimiter(head: str) -> str:
    # csv.Sniffer guesses from the frequencies of all characters, and takes a letter for a table of one column
    return max(",;\t", key=head.count)  # the first of them, a comma, where there is none


def rows_of_words(text: str) -> tuple[list[str], list[list[str]]]:
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


def _read_words(path: Path, column: str) -> tuple[list[str], list[Any]]:
    with faults.reading(path, "a table of words in UTF-8"):
        columns, rows = rows_of_words(path.read_text(encoding="utf-8-sig"))
    key = _columns(path, columns, column)
    for line, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise UserError(
                f"Row {line} of {path} has {len(row)} words, but there are {len(columns)} columns: correct it."
            )
    at = columns.index(key), columns.index(column)
    return [row[at[0]] for row in rows], [row[at[1]] for row in rows]


def table_columns(file: str, read: Callable[[str], bytes | None]) -> list[str]:
    """The columns of a table at the root of a source, by its first lines; none if it is not a readable table."""
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
        return [column.strip() for column in next(csv.reader([head], delimiter=_delimiter(head)), [])]
    columns, rows = rows_of_words(text)
    return columns if rows and rows[0][0].lower().endswith(EXTENSIONS) else []  # else it is a text for people


def _read_lines(path: Path, column: str) -> tuple[list[str], list[Any]]:
    rows = rows_of_lines(path.read_bytes(), str(path))
    key = _columns(path, list(rows[0]) if rows else [], column)
    return [str(row.get(key, "")) for row in rows], [row.get(column) for row in rows]


def rows_of_lines(data: bytes, name: str) -> list[dict[str, Any]]:
    """The objects of a .jsonl, one a line."""
    rows = []
    with faults.reading(name, "JSON, one object a line"):
        for line in data.decode("utf-8-sig").split("\n"):  # JSON may hold other ends of lines, such as U+2028
            row = json.loads(line, object_pairs_hook=files.once) if line.strip() else {}
            if not isinstance(row, dict):
                raise UserError(f"{name} has a line that holds {type(row).__name__}: each line must be an object.")
            rows += [row] if row else []
    return rows


def _read_parquet(path: Path, column: str) -> tuple[list[str], list[Any]]:
    lib, parquet = (extras.need(f"pyarrow.{name}", f"The table {path}") for name in ("lib", "parquet"))
    try:
        key = _columns(path, parquet.read_schema(path).names, column)
        table = parquet.read_table(path, columns=[key, column])
    except (lib.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as a parquet file: {str(error).rstrip('.')}.") from error
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
