"""Tables with a column of images: the choice of columns, and the data sets of the library `datasets`.

These come from the hub, `save_to_disk` or .arrow files, and are memory-mapped; parquet.py reads parquet files.
"""

import functools
import hashlib
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from repa.base import faults, files, imports
from repa.base.errors import UserError, nearest
from repa.data.sources.contract import (
    CAPTION_COLUMNS,
    Source,
    caption_values,
    one_class,
    read_image_file,
    require_image_size,
)
from repa.data.sources.labels import classes_of, label_columns, like_labels, named
from repa.data.sources.names import most_common, named_by_first

LABEL = "label"
TEXTS = ("string", "large_string", "string_view")  # names of arrow types; not every version has the last one
BYTES = ("binary", "large_binary", "binary_view")


class Column(NamedTuple):
    """What the schema says about a column."""

    kind: Literal["image", "class", "text", "other"]
    class_names: tuple[str, ...] = ()


def _only(where: str, likely: Sequence[str], columns: Mapping[str, Column], key: str, otherwise: str = "") -> str:
    if len(likely) == 1:
        return likely[0]
    raise UserError(
        f"{where} has {len(likely) or 'no'} columns that could be the {key}, among {', '.join(columns) or 'none'}: "
        f"choose one with {where}:{key}={likely[0] if likely else 'COLUMN'}{otherwise}."
    )


def image_bytes(cell: Any, name: str) -> bytes:
    """The image file in a cell, which is bytes or {"bytes": ..., "path": ...}."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        missing = "only the path of its image" if isinstance(cell, dict) and cell.get("path") else "no image"
        raise UserError(f"{name} holds {missing}: save the table with embedded images, or remove the row.")
    require_image_size(len(data), name)
    return data


class TableSource(Source):
    """Rows with a column of images. Subclasses implement `name` and `_cell`."""

    def _choose(
        self,
        where: str,
        columns: Mapping[str, Column],
        labels: str,
        *,
        image: str = "",
        label: str = "",
        caption: str = "",
    ) -> None:
        """Choose the columns to read: the given ones, else those of images, labels (by type or name) and captions.

        Raises:
            UserError: a column is missing, or it is not clear which one is meant.
        """
        for key, name in (("image", image), ("label", label), ("caption", caption)):
            if name and name not in columns:
                names = ", ".join(columns) or "none"
                raise UserError(f"{where} has no column {name!r} for {key}: it has {names}.{nearest(name, columns)}")
        if labels not in ("", "none"):
            raise UserError(
                f"labels is {labels!r}, but the labels of {where} are a column: give {where}:label=COLUMN, or 'none'."
            )
        # texts may be stored as bytes too, so a column with a usual name for captions is the last choice
        binary = [name for name, column in columns.items() if column.kind == "image"]
        binary = [name for name in binary if name not in CAPTION_COLUMNS] or binary
        image = image or _only(where, binary, columns, "image")
        if columns[image].kind != "image":
            raise UserError(
                f"The column {image!r} of {where} does not hold encoded images: choose another of {', '.join(columns)}."
            )
        if not label and labels != "none":
            classes = [name for name, column in columns.items() if column.kind == "class"]
            usual = [name for name in label_columns(columns) if name != image]
            likely = [LABEL] if LABEL in columns else classes or usual
            if not likely and (worded := [name for name in like_labels(columns) if name != image]):
                raise UserError(
                    f"{where} has no column called {LABEL!r}, but {', '.join(worded)}: give {where}:label={worded[0]}, "
                    "or --labels none for one class."
                )
            label = _only(where, likely, columns, "label", ", or give --labels none for one class") if likely else ""
        texts = [name for name in CAPTION_COLUMNS if name in columns and columns[name].kind == "text" and name != label]
        self._image, self._label, self._caption = image, label, caption or next(iter(texts), "")
        self._class_names = columns[label].class_names if label else ()
        self.has_captions = bool(self._caption)
        unread = [name for name in columns if name not in (image, label, self._caption)]
        self._unlabelled = "no column of labels"
        if others := [name for name in unread if name not in CAPTION_COLUMNS]:
            self._unlabelled += f" (not read: {', '.join(others)}; {where}:label={others[0]} selects one)"
        no_texts = {name for name in CAPTION_COLUMNS if name in columns and columns[name].kind != "text"}
        left_out = {f"column {name!r}{', which holds no texts' * (name in no_texts)}": 1 for name in unread}
        self.left_out = most_common(left_out, "more columns")

    def _describe(
        self, where: str, num: int, labels: str, values: Callable[[], Sequence[Any]], facts: str, *, is_local: bool
    ) -> None:
        """Set the classes and the identity of `num` rows.

        Args:
            values: returns the column of labels.
            facts: sizes of the images, for the identity.
            is_local: whether some images are read for the identity too; from remote files this would need a download.
        """
        if not num:
            raise UserError(f"{where} has no rows: give a file or split with images.")
        if self._label and labels != "none":
            column, names = f"the column {self._label!r} of {where}", self._class_names
            classes = named(values(), names, self.name, column) if names else classes_of(values(), self.name, column)
        else:
            classes = one_class(num, labels, why=self._unlabelled)
        sampled = self._sampled_digest(num) if is_local else ""
        name = Path(where).name if "://" in where or not where.startswith("hf:") else where
        self._identify(classes, name, sha256=hashlib.sha256((facts + sampled).encode()).hexdigest())
        if not labels and is_local:
            self._require_no_numbers(where, f"give {where}:label={self._caption}")

    def contents(self, index: int) -> bytes:
        return image_bytes(self._cell(self._image, index), self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return caption_values(self._cell(self._caption, index)) if self.has_captions else ()

    @abstractmethod
    def _cell(self, column: str, index: int) -> Any:
        """The value of a row in a column."""


class DatasetSource(TableSource):
    """A `datasets.Dataset` with a column of images."""

    def __init__(
        self, table: Any, where: str, labels: str = "", *, folders: Sequence[str | Path] | None = None, **columns: str
    ):
        """
        Args:
            table: the data set.
            where: its name in messages.
            labels: "" for a column, or "none".
            folders: the only folders whose files an untrusted data set may name; None: any file.
            columns: image, label and caption, the names of these columns.
        """
        datasets = _library()
        self._where = where
        self._folders = None if folders is None else [os.path.realpath(folder) for folder in folders]
        for file in table.cache_files:
            self._require_inside(file["filename"], where)
        if table.format["type"] == "custom":
            raise UserError(
                f"{where} has a transform, which would run at every access: apply it with map, or call reset_format."
            )
        table = table.with_format(None)
        # a damaged file may have offsets beyond its end; arrow does not check them, and reading would crash the process
        _loading(lambda: table.data.validate(full=True), where)
        # the arrow schema with the metadata of `datasets`: its tables and parquet files share one rule
        self._choose(where, columns_of(table.features.arrow_schema), labels, **columns)
        # a table per column, because reading a row decodes all columns of its table
        images = table.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))
        self._tables = {self._image: images}
        if self._caption:
            self._tables[self._caption] = table.select_columns([self._caption])
        facts = _lengths(table, self._image)
        self._describe(where, len(table), labels, lambda: table[self._label][:], facts, is_local=True)

    def name(self, index: int) -> str:
        return f"{self._where}[{index}]"

    def contents(self, index: int) -> bytes:
        cell = self._cell(self._image, index)
        if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
            self._require_inside(cell["path"], self.name(index))
            return read_image_file(Path(cell["path"]), self.name(index))  # a file beside the table, as in `imagefolder`
        return image_bytes(cell, self.name(index))

    def _require_inside(self, path: str, name: str) -> None:
        if self._folders is not None:
            _require_inside(path, name, self._folders)

    def _cell(self, column: str, index: int) -> Any:
        return self._tables[column][index][column]


def _require_inside(path: str | Path, name: str, folders: Sequence[str]) -> None:
    if not any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in folders):
        raise UserError(
            f"{name} names the file {str(path)!r:.200}, outside of {' and '.join(folders)}: save the data set with "
            "embedded images."
        )


def open_table(table: Any, labels: str = "") -> DatasetSource:
    """A loaded data set; raises UserError for anything but a `datasets.Dataset`."""
    datasets = _library()
    if isinstance(table, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise UserError(
            f"The data set has the splits {', '.join(table)}: give one of them, such as data[{next(iter(table))!r}]."
        )
    if not isinstance(table, datasets.Dataset):
        raise UserError(f"A source must be a path, a name or a datasets.Dataset, but got {type(table).__name__}.")
    return DatasetSource(table, "the data set", labels)


def open_hub(
    name: str,
    labels: str = "",
    *,
    config: str = "",
    split: str = "train",
    revision: str = "",
    streaming: bool = False,
    **columns: str,
) -> DatasetSource:
    """`hf:OWNER/NAME`: `datasets` downloads it once into its own cache."""
    if streaming:
        raise UserError(
            f"hf:{name} cannot be streamed as a data set: a stream has no length and no access by index, so processes "
            "cannot share or continue it. Stream its parquet files, "
            f"hf://datasets/{name}@refs/convert/parquet/{config or 'default'}/{split}/{{0000..0009}}.parquet with "
            "their numbers, or leave out streaming."
        )
    # `datasets` would take any other text for a folder or a file format
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"'hf:{name}' is not the name of a data set on the hub: write hf:OWNER/NAME.")
    datasets = _library()
    import huggingface_hub

    table = _loading(
        lambda: datasets.load_dataset(name, config or None, split=split, revision=revision or None), f"hf:{name}"
    )
    places = datasets.config
    caches = [places.HF_DATASETS_CACHE, places.DOWNLOADED_DATASETS_PATH, huggingface_hub.constants.HF_HUB_CACHE]
    return DatasetSource(table, f"hf:{name}", labels, folders=caches, **columns)


def open_saved(folder: Path, labels: str = "", *, split: str = "", **columns: str) -> DatasetSource:
    """A folder of `save_to_disk`, with one split or several."""
    # before the library opens files that a stranger may have named: a pipe would block it
    for state in (folder / "state.json", *folder.glob("*/state.json")):
        parts = files.read_object(state, _data_files=list)["_data_files"] if state.is_file() else []
        for name in [part["filename"] for part in parts if isinstance(part, dict) and "filename" in part]:
            _require_inside(state.parent / str(name), str(folder), [os.path.realpath(folder)])
            faults.require_plain(state.parent / str(name))
    table = _loading(lambda: _library().load_from_disk(str(folder)), str(folder))
    if isinstance(table, dict):
        if split not in table:
            raise UserError(
                f"{folder} has the splits {', '.join(table)}: give {folder}:split=NAME.{nearest(split, table)}"
            )
        table = table[split]
    elif split:
        raise UserError(f"{folder} holds one split: leave out split={split}.")
    return DatasetSource(table, str(folder), labels, folders=[folder], **columns)


def open_arrow(shards: Sequence[str], labels: str = "", **columns: str) -> DatasetSource:
    """The .arrow files of `datasets`, concatenated."""
    datasets = _library()
    for shard in shards:
        faults.require_plain(shard)
    tables = [_loading(functools.partial(datasets.Dataset.from_file, shard), shard) for shard in shards]
    where = named_by_first(shards)
    table = _loading(lambda: datasets.concatenate_datasets(tables), where)
    folders = list(dict.fromkeys(Path(shard).parent for shard in shards))
    return DatasetSource(table, where, labels, folders=folders, **columns)


def _library() -> Any:
    return imports.need("datasets", "A Hugging Face data set")


def _loading(load: Callable[[], Any], where: str) -> Any:
    try:
        return load()
    except Exception as error:  # the hub, its client, pyarrow and the library have no common base class
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{where} cannot be loaded: {first.rstrip('.')}.") from error


def columns_of(schema: Any) -> dict[str, Column]:
    """The columns of an arrow schema, by their types and the metadata of `datasets`."""
    from pyarrow import types

    features = _features_of(schema.metadata or {})
    columns = {}
    for field in schema:
        feature = features.get(field.name)
        feature = feature if isinstance(feature, dict) else {}
        binary = [field.type] if not types.is_struct(field.type) else [f.type for f in field.type if f.name == "bytes"]
        if any(str(kind) in BYTES for kind in binary):
            # audio and video have columns of the same type
            columns[field.name] = Column("image" if feature.get("_type", "Image") in ("Image", "Value") else "other")
        elif feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            columns[field.name] = Column("class", tuple(map(str, names)) if isinstance(names, list) else ())
        elif _is_text(field.type) or _lists_texts(field.type):
            columns[field.name] = Column("text")
        else:
            columns[field.name] = Column("other")
    return columns


def _lists_texts(kind: Any) -> bool:
    from pyarrow import types

    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return listed and _is_text(kind.value_type)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    # pandas writes categories as a dictionary
    return str(kind.value_type if types.is_dictionary(kind) else kind) in TEXTS


def _features_of(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """The metadata of `datasets` about columns; {} if they are invalid, because the arrow types are enough."""
    try:
        value = json.loads(metadata.get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return {}
    for key in ("info", "features"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _lengths(table: Any, image: str) -> str:
    """A checksum of the lengths of all images, which arrow knows without reading the images."""
    from pyarrow import compute, types

    cells = table.data.column(image)
    cells = compute.struct_field(cells, "bytes") if types.is_struct(cells.type) else cells
    lengths = compute.fill_null(compute.binary_length(cells), -1)
    return hashlib.sha256(lengths.cast("int64").to_numpy().tobytes()).hexdigest()
