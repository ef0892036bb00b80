"""Open a source by its name: recognise its kind, and choose the class that reads it."""

import collections
import inspect
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from repa.base.errors import UserError
from repa.base.files import near
from repa.base.registry import Registry, Setting, check_settings, parse_spec, settings_of
from repa.base.trust import DOTTED
from repa.data.sources.archives import ZipSource
from repa.data.sources.arrays import ArraySource, CifarSource, is_cifar
from repa.data.sources.coco import CocoSource
from repa.data.sources.contract import EXTENSIONS, Source
from repa.data.sources.folders import FolderSource
from repa.data.sources.names import expand, is_hidden, is_pattern, is_remote
from repa.data.sources.parquet import ParquetSource
from repa.data.sources.photographs import PhotographSource
from repa.data.sources.reference_layout import ReferenceSource, is_reference
from repa.data.sources.tables import open_arrow, open_hub, open_saved, open_table
from repa.data.sources.webdataset import WebDataset

# a path may contain colons, as URLs do: settings are the end of a name that looks like :key=value,key=value
SETTINGS = re.compile(r"(.+?):([a-z_]+=[^,]*(?:,[a-z_]+=[^,]*)*)")
# a shell command may have such an end too, so only the known keys are settings
PIPE_SETTINGS = re.compile(
    r"(pipe:.+):((?:image|label|caption|cache)=[^,\s]*(?:,(?:image|label|caption|cache)=[^,\s]*)*)"
)
COLUMNS = ("image", "label", "caption")  # of tables
KINDS = (
    "a folder of images, a zip, .tar shards, .parquet or .arrow files, an .npz or .npy array, a folder of CIFAR "
    "binaries, COCO's captions (.json), 'hf:OWNER/NAME', 'photographs', or the dotted name of your own function"
)
COMPRESSED, PICKLES = (".gz", ".tgz", ".bz2", ".xz", ".zst"), (".pkl", ".pickle", ".pt", ".pth")
FILES = (".zip", ".tar", ".parquet", ".arrow", ".json", ".npz", ".npy", *COMPRESSED, *PICKLES, *EXTENSIONS)
SOURCES = Registry("source", {}, takes=("labels",))  # functions of users: f(labels, *, settings) -> Source


def open_source(spec: Any, *, labels: str = "") -> Source:
    """A source of images by its name.

    Args:
        spec: a folder, a zip, tar shards (`shard-{0000..0099}.tar`, URLs, `pipe:COMMAND`), parquet or arrow files, an
            array (.npz, .npy), CIFAR binaries, the reference layout, `hf:OWNER/NAME`, or `photographs`. Settings
            follow a colon, e.g. `hf:OWNER/NAME:split=train,image=img`; see docs/sources.md. Or the dotted name of your
            own function `f(labels, *, settings) -> Source`; a `Source` itself; or a loaded `datasets.Dataset`.
        labels: "" for the source's own; "none"; "folders" (the first folder of each path), "folders:2" (the second),
            "folders:last"; "names" (of the files, before a number); "tars"; a `dataset.json`; `TABLE.csv:COLUMN` (.tsv, .jsonl
            and .parquet too); for arrays also an .npy file.

    Raises:
        UserError: no such source, no images, missing or invalid labels, a damaged or unsafe file, or unknown settings.
    """
    if isinstance(spec, Source):
        if labels != spec.opened_with:
            _require_own(labels, spec)
        return spec
    if not isinstance(spec, (str, Path)):
        return open_table(spec, labels)
    path, settings = _split(str(spec))
    opened = _kind(path, labels)
    known = settings_of(opened, is_ours=opened.func.__module__.startswith("repa."))
    if any(argument.kind is argument.VAR_KEYWORD for argument in inspect.signature(opened).parameters.values()):
        known |= dict.fromkeys(COLUMNS, Setting(str, is_required=False))
    check_settings("source", str(spec), settings, known)
    # settings are parsed as Python values if possible: a column called 1 becomes a text again
    source = opened(**{key: str(value) if known[key].annotation is str else value for key, value in settings.items()})
    source = SOURCES.instance(str(spec), source, Source)
    source.opened_with = labels
    return source


def require_source(spec: str) -> None:
    """Raises UserError if there is no source of this name. Opens nothing and imports no torch."""
    _kind(_split(spec)[0], labels="")


def _split(spec: str) -> tuple[str, dict[str, Any]]:
    """The path, and the settings after it."""
    if spec.partition(":")[0] == "photographs" and Path(spec).exists():
        raise UserError(
            f"{spec!r} means the photographs inside the package, but a folder has this name too: write ./{spec} for it."
        )
    # an existing file of exactly this name has no settings, even if its name looks like them
    pattern = PIPE_SETTINGS if spec.startswith("pipe:") else SETTINGS
    match = None if Path(spec).exists() else pattern.fullmatch(spec)
    return (match[1], parse_spec(f"source:{match[2]}")[1]) if match else (spec, {})


def _kind(name: str, labels: str) -> partial[Any]:
    """The function that opens a source; its keyword-only arguments are the settings."""
    path = Path(name)
    if name == "photographs":
        return partial(PhotographSource, _require_own(labels, name))
    if name.startswith("hf:"):
        return partial(open_hub, name[3:], labels)
    if path.is_dir():
        return _folder_kind(path, labels)
    if path.is_file() or is_remote(name) or is_pattern(name):
        return _file_kind(name, labels)
    why = ""
    # a mistyped images.zip must not import a module `images` from the current folder
    if DOTTED.fullmatch(name) and path.suffix.lower() not in FILES:
        try:
            return partial(SOURCES.load(name), labels)
        except UserError as error:
            if not isinstance(error.__cause__, (ImportError, AttributeError)):
                raise
            why = f" ({error.__cause__})"
    raise UserError(f"There is no source {name!r}: give {KINDS}{why}.{near(path)}")


def _folder_kind(path: Path, labels: str) -> partial[Any]:
    # from the most specific to the most general: each of these is also a folder of files
    if is_reference(path):
        return partial(ReferenceSource, path, _require_own(labels, path))
    if is_cifar(path):
        return partial(CifarSource, path, _require_own(labels, path))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return partial(open_saved, path, labels)
    if shards := _shards(path, path.glob("*.tar")):
        return partial(WebDataset, shards, labels)
    if shards := _shards(path, [*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
        return partial(ParquetSource, shards, labels)
    return partial(FolderSource, path, labels)


def _file_kind(name: str, labels: str) -> partial[Any]:
    ending = Path(name.partition("?")[0]).suffix.lower() if is_remote(name) else Path(name).suffix.lower()
    if name.startswith("pipe:") or ending == ".tar":
        return partial(WebDataset, expand(name), labels)
    if ending == ".parquet":
        return partial(ParquetSource, expand(name), labels)
    if is_remote(name):
        raise UserError(f"{name!r} cannot be streamed: remote files must be .tar or .parquet. Download it first.")
    if ending == ".arrow":
        return partial(open_arrow, expand(name), labels)
    if ending == ".json":
        _require_own(labels, name)
        return partial(CocoSource, Path(name))
    if ending in (".npz", ".npy"):
        return partial(ArraySource, Path(name), labels)
    if ending in COMPRESSED:
        raise UserError(f"{name} is compressed as a whole, so no image in it can be read alone: unpack it first.")
    if ending in PICKLES:
        raise UserError(f"{name} is a pickle, which can run any program when it is read: save it as .npz or .npy.")
    if ending in EXTENSIONS:
        raise UserError(f"{name} is a single image: give its folder, or a zip of images.")
    return partial(ZipSource, Path(name), labels)


def _shards(folder: Path, paths: Iterable[Path]) -> list[str]:
    """The shards of a folder; raises UserError if it also has images, which would be ignored."""
    # metadata.parquet is a table of labels beside images (`imagefolder`), not a table of images
    shards = sorted(str(path) for path in paths if not is_hidden(path.name) and path.name != "metadata.parquet")
    data = {Path(shard).parent for shard in shards}
    for path in folder.iterdir() if shards else ():
        if not is_hidden(path.name) and (path.suffix.lower() in EXTENSIONS or (path.is_dir() and path not in data)):
            raise UserError(
                f"{folder} holds both shards ({Path(shards[0]).name}) and {path.name}: give the shards as "
                f"{Path(shards[0]).parent}/*{Path(shards[0]).suffix}, or move other files out of the folder."
            )
    _require_all_parts(shards)
    return shards


def _require_all_parts(shards: Sequence[str]) -> None:
    """Raises UserError for names such as train-00000-of-00002.parquet without all parts, as after a stopped download."""
    found = collections.Counter(
        match.groups() for shard in shards if (match := re.fullmatch(r"(.*?)[0-9]+-of-([0-9]+)(\.\w+)", shard))
    )
    for (start, total, ending), num in found.items():
        if num < int(total):
            raise UserError(
                f"There are only {num:,} of the {int(total):,} parts {start}*{ending}: download the others, or give "
                f"'{start}*{ending}' to use only these."
            )


def _require_own(labels: str, what: object) -> str:
    if labels not in ("", "none"):
        raise UserError(f"labels is {labels!r}, but {what} has its own labels: leave it out, or set it to 'none'.")
    return labels
