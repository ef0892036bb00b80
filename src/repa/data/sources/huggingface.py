"""Data sets of the library `datasets`: from the hub, saved by `save_to_disk`, or .arrow files. Memory-mapped by it."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from repa.base import extras
from repa.base.errors import UserError, nearest
from repa.base.images import decode_image
from repa.data.sources.archives import Slices
from repa.data.sources.columns import Column, choose, classes_of_column, image_bytes, labels_from, left_out
from repa.data.sources.contract import Source, sampled_digest
from repa.data.sources.folders import MAX_FILE_SIZE, caption_values
from repa.data.sources.labels import labels_digest, no_classes


class TableSource(Source):
    """A `datasets.Dataset` with a column of images."""

    def __init__(self, table: Any, where: str, labels: str = "", **columns: str):
        """
        Args:
            table: the data set.
            where: what to call it.
            labels: "" for a column, or "none".
            columns: image, label, caption: the names of those columns.
        """
        datasets = _library()
        self._where = where
        chosen = choose(where, _columns_of(table), labels, **{key: str(name) for key, name in columns.items()})
        num = len(table)
        if not num:
            raise UserError(f"{where} holds no rows: give a split with images.")
        classes = no_classes(num)
        if chosen.label:
            classes = classes_of_column(chosen, table[chosen.label][:], self.name, where)
        self.labels, self.class_names = classes
        self.labels_from, self.left_out = (
            labels_from(chosen, labels, _columns_of(table)),
            left_out(chosen, _columns_of(table)),
        )
        self.has_captions = bool(chosen.caption)
        self._images = table.select_columns([chosen.image]).cast_column(chosen.image, datasets.Image(decode=False))
        self._image, self._caption = chosen.image, chosen.caption
        self._captions = table.select_columns([chosen.caption]) if chosen.caption else None
        self.identity = {
            "name": where if where.startswith("hf:") else Path(where).name,
            "num_images": num,
            "sha256": hashlib.sha256(
                (_digest(table, chosen.image) + sampled_digest(num, self._contents)).encode()
            ).hexdigest(),
            "labels_sha256": labels_digest(classes),
        }

    def _contents(self, index: int) -> bytes:
        cell = self._images[index][self._image]
        return (cell.get("bytes") if isinstance(cell, dict) else cell) or b""

    def name(self, index: int) -> str:
        return f"{self._where}[{index}]"

    def decode(self, index: int) -> Image.Image:
        name = self.name(index)
        cell = self._images[index][self._image]
        if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
            return decode_image(_file(Path(cell["path"]), name), name)
        return decode_image(image_bytes(cell, name), name)

    def captions(self, index: int) -> tuple[str, ...]:
        if self._captions is None:
            return ()
        return caption_values(self._captions[index][self._caption])


def open_table(table: Any, labels: str = "") -> TableSource:
    """A data set that is loaded already; UserError for anything that is no `datasets.Dataset`."""
    datasets = _library()
    if isinstance(table, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise UserError(
            f"The data set has the splits {', '.join(table)}: give one of them, such as data[{next(iter(table))!r}]."
        )
    if not isinstance(table, datasets.Dataset):
        raise UserError(f"A source is a path, a name or a datasets.Dataset, but got {type(table).__name__}.")
    return TableSource(table, "the data set", labels)


def open_hub(
    name: str,
    labels: str = "",
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    **columns: str,
) -> TableSource:
    """`hf:OWNER/NAME`: downloaded once by `datasets`, into its own cache."""
    if streaming:
        raise UserError(
            f"hf:{name} cannot be streamed as a data set, which has no length and no images by number, so that work could "
            f"not be shared or continued: stream its parquet files, hf://datasets/{name}@refs/convert/parquet/"
            f"{config or 'default'}/{split}/{{0000..0009}}.parquet with the numbers that are there, or leave out streaming."
        )
    datasets = _library()
    table = _loading(lambda: datasets.load_dataset(name, config, split=split, revision=revision), f"hf:{name}")
    return TableSource(table, f"hf:{name}", labels, **columns)


def open_saved(folder: Path, labels: str = "", *, split: str = "", **columns: str) -> TableSource:
    """A folder made by `save_to_disk`, of one split or of several."""
    table = _loading(lambda: _library().load_from_disk(str(folder)), str(folder))
    if isinstance(table, dict):
        if split not in table:
            raise UserError(
                f"{folder} holds the splits {', '.join(table)}: say which one as {folder}:split=NAME.{nearest(split, table)}"
            )
        table = table[split]
    elif split:
        raise UserError(f"{folder} holds one split: leave out split={split}.")
    return TableSource(table, str(folder), labels, **columns)


def open_arrow(shards: Sequence[str], labels: str = "", **columns: str) -> TableSource:
    """The .arrow files of `datasets`, one after the other."""
    datasets = _library()
    tables = [_loading(lambda shard=shard: datasets.Dataset.from_file(shard), shard) for shard in shards]
    where = shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"
    table = _loading(lambda: datasets.concatenate_datasets(tables), where)
    return TableSource(table, where, labels, **columns)


def _library() -> Any:
    return extras.need("datasets", "A Hugging Face data set")


def _loading(load: Callable[[], Any], where: str) -> Any:
    try:
        return load()
    except Exception as error:  # of the hub, its client, pyarrow and the library itself: there is no common base
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{where} cannot be loaded: {first.rstrip('.')}.") from error


def _columns_of(table: Any) -> dict[str, Column]:
    import datasets

    columns = {}
    for name, feature in table.features.items():
        struct = isinstance(feature, dict) and "bytes" in feature
        if struct or isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary"):
            columns[name] = Column("image")
        elif isinstance(feature, datasets.ClassLabel):
            columns[name] = Column("class", tuple(feature.names or ()))
        elif getattr(feature, "dtype", "") in ("string", "large_string") or _lists_texts(feature):
            columns[name] = Column("text")
        else:
            columns[name] = Column("other")
    return columns


def _lists_texts(feature: Any) -> bool:
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return getattr(inner, "dtype", "") in ("string", "large_string")


def _digest(table: Any, image: str) -> str:
    """A checksum of the lengths of all images, which arrow knows without reading them."""
    from pyarrow import compute, types

    cells = table.data.column(image)
    cells = compute.struct_field(cells, "bytes") if types.is_struct(cells.type) else cells
    lengths = compute.fill_null(compute.binary_length(cells), -1)
    return hashlib.sha256(lengths.cast("int64").to_numpy().tobytes()).hexdigest()


def _file(path: Path, name: str) -> bytes:
    """An image that lies beside the table, as `imagefolder` has them."""
    try:
        if (size := path.stat().st_size) <= MAX_FILE_SIZE:
            return Slices(path).read(0, size)
    except (OSError, EOFError) as error:
        raise UserError(f"{name} cannot be read: {error}.") from error
    raise UserError(f"{name} has {size:,} bytes, more than an image may have ({MAX_FILE_SIZE:,}): remove it.")
