"""Images in files: the base class of folders and zips, and folders."""

import collections
import contextlib
import hashlib
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repa.base import faults, files
from repa.base.errors import UserError, printable
from repa.data.sources.contract import (
    CAPTION_COLUMNS,
    CAPTION_ENDING,
    EXTENSIONS,
    NUMBERS,
    Classes,
    Source,
    Strings,
    caption_lines,
    caption_values,
    json_object,
    one_class,
    plain_text,
    read_image_file,
)
from repa.data.sources.label_files import FILE_COLUMNS, TABLES, Rows, from_file, read_table, split_file, table_columns
from repa.data.sources.labels import (
    by_name,
    classes_by_name,
    from_folders,
    from_listing,
    label_columns,
    like_labels,
    plain_path,
)
from repa.data.sources.names import (
    JUNK_KIND,
    MAX_FOLDERS,
    classes_in_names,
    is_hidden,
    most_common,
    name_before_number,
    split_folders,
)

METADATA = ("metadata.csv", "metadata.jsonl")  # of the `imagefolder` convention: one row per image
LISTING = "dataset.json"  # of EDM2 and REPA: the labels of images in folders that are not classes
MAX_VISITS = 100  # of one folder, by way of links
MOST_TABLES = 20  # tables that are searched for labels


def _folder_of(where: str) -> Path:
    """The folder in which a file of labels is looked for: the source itself, or the folder of an archive."""
    return Path(where) if Path(where).is_dir() else Path(where).parent


def _labels_inside(where: str, labels: str) -> str:
    """The path within a folder of the file that gives the labels; "" if it is elsewhere."""
    if not labels:
        return ""
    folder, path = Path(where).absolute(), Path(split_file(labels, _folder_of(where))[0]).absolute()
    return path.relative_to(folder).as_posix() if path.is_file() and path.is_relative_to(folder) else ""


class FileSource(Source):
    """A sorted list of relative paths; a folder of the path is the class, unless a file gives the labels."""

    def __init__(self, where: str, stamps: Mapping[str, int], labels: str, *, folders: Iterable[str], junk: int):
        """
        Args:
            where: the folder or archive, for messages.
            stamps: path of every visible file -> a number that changes with its content: its size or checksum.
            labels: as `open_source` takes them.
            folders: names of the folders at the root.
            junk: number of hidden files and folders.
        """
        paths = sorted(path for path in stamps if path.lower().endswith(EXTENSIONS))
        if not paths:
            if "manifest.json" in stamps:
                raise UserError(
                    f"{where} holds no images, but prepared data: `repa train RECIPE --data {where}` trains on it."
                )
            listed = ", ".join(f"{num:,} {kind}" for kind, num in count_others(stamps, (), junk).items())
            remedy = "give a folder or archive with images, such as .png, .jpg or .webp files, at any depth"
            # class.tar in train/: a pattern makes them the source, and a shard inside an archive cannot be read in place
            if packed := next((path for path in sorted(stamps) if path.lower().endswith((".tar", ".parquet"))), ""):
                pattern = (Path(where) / packed).with_name(f"*{Path(packed).suffix}")
                remedy = f"give {printable(str(pattern))!r}" + " from the unpacked archive" * Path(where).is_file()
            raise UserError(f"{where} holds no images{listed and f', but {listed}'}: {remedy}.")
        used = _labels_inside(where, labels)
        texts = {path for path in stamps if path.lower().endswith(CAPTION_ENDING) and path != used}
        above = _folders_above(paths)  # files in other folders do not describe these images
        metadata = {os.path.join(folder, name) for folder in above for name in METADATA}
        self._described = ({LISTING} | metadata) & stamps.keys()
        others = stamps.keys() - {*texts, *paths, *self._described, used}
        # a .txt beside an image of its name is a caption; any other .txt may be a table of labels
        stems, tops = set(map(_stem, paths)), {path.partition("/")[0] for path in paths if "/" in path}
        unknown = [*others, *metadata & stamps.keys(), *(path for path in texts if _stem(path) not in stems)]
        self.left_out = count_others(others, set(folders) - tops if tops else (), junk)
        self.paths = Strings(paths)
        captions = {_stem(path): path for path in texts}
        self._texts = {path: captions[_stem(path)] for path in paths if _stem(path) in captions}
        self._written = self._captions_of_metadata()
        self.has_captions = bool(self._texts or self._written)
        if unused := len(texts) - len(set(self._texts.values())):
            self.left_out["texts without an image"] = unused
        # no times of change: a copy of the folder is the same source
        listing = "\n".join(f"{path} {stamps[path]}" for path in paths)
        digest = hashlib.sha256(listing.encode(errors="surrogateescape"))
        digest.update(self._sampled_digest(len(paths)).encode())
        explicit = self._explicit_classes(where, paths, labels)
        if explicit is not None and (splits := split_folders(paths)):
            shown = ", ".join(map(printable, splits))
            if not labels:
                raise UserError(
                    f"{where} holds folders that look like splits ({shown}), and {explicit.origin} labels all of them: "
                    "give one split as the source, or --labels none or TABLE.csv:COLUMN to use all splits as one set."
                )
            explicit = explicit._replace(origin=f"{explicit.origin}; the splits {shown} are one set")
        classes = explicit or from_folders(where, paths, labels)
        if explicit is None and not labels:
            self._require_nothing_label_like(where, paths, unknown, above, is_one=len(classes.names) == 1)
        # labels from folders follow from the list of paths
        self._identify(classes, Path(where).name, with_labels=explicit is not None, sha256=digest.hexdigest())
        if not labels:
            self._require_no_numbers(where)

    def _explicit_classes(self, where: str, paths: Sequence[str], labels: str) -> Classes | None:
        """The classes, unless they are the folders: then None."""
        if labels == "none":
            return one_class(len(paths), labels)
        if labels.partition(":")[0] == "folders":
            return None
        if labels == "names":
            names = [name_before_number(path) for path in paths]
            if "" in names:
                first = printable(paths[names.index("")])
                raise UserError(
                    f"labels is 'names', but {first} of {where} has no name before a number, as cat_001.png has: rename it, or "
                    "give --labels TABLE.csv:COLUMN."
                )
            return classes_by_name(
                [plain_text(name) for name in names], "the file names, without the numbers at their ends"
            )
        if labels:
            return from_file(labels, paths, _folder_of(where))
        if LISTING in self._described:
            name, data = f"{LISTING} of {where}", self.read(LISTING, LISTING)
            with faults.reading(name, "JSON"):
                listing = json.loads(data, object_pairs_hook=files.unique_keys)
            return from_listing(listing, paths, name)._replace(origin=LISTING)
        return self._from_metadata(where, paths)

    def _require_nothing_label_like(
        self, where: str, paths: Sequence[str], unknown: Sequence[str], above: set[str], *, is_one: bool
    ) -> None:
        """Raises UserError with the choices if a file looks like labels, because the labels would be ignored.

        Args:
            unknown: files that are neither images nor their captions. Only those beside images or in `above` count.
            is_one: all images have one class. Otherwise only a table that names images and labels is a conflict.
        """
        # training with one class by mistake raises no error; only the samples would show it
        stems = set(map(_stem, paths))
        if is_one:
            self._require_no_labels_beside(where, sorted(path for path in unknown if _stem(path) in stems))
            self._require_no_numbers_elsewhere(where, stems, unknown)
        # a table of labels is beside or above the images; tables in other folders belong to other files
        tables = sorted(path for path in unknown if path.rpartition("/")[0] in above and _stem(path) not in stems)
        for file in tables[:MOST_TABLES]:
            if not (columns := self._columns_of_labels(file, is_one)):
                continue
            spec = f"{Path(where) / file}:{columns[0]}" if columns[0] else str(Path(where) / file)
            if Path(where).is_file():
                spec = f"{spec} from the unpacked archive"
            if not file.lower().endswith((*TABLES, ".json")):
                spec = "TABLE.csv:COLUMN with its content"
            raise UserError(
                f"{where} has {'no' if is_one else 'both'} folders of classes{', but' if is_one else ' and'} "
                f"{printable(file)}, which looks like labels: give --labels {printable(spec)}, another column or file, "
                f"or --labels {_without_a_file(paths)}."
            )
        if is_one and not self.has_captions and (named := classes_in_names(paths)):
            raise UserError(
                f"{where} has no folders of classes, but its file names look like classes with numbers "
                f"({', '.join(map(printable, named[:3]))}): give --labels names for these classes, or --labels none for one."
            )

    def _require_no_labels_beside(self, where: str, beside: Sequence[str]) -> None:
        """Raises UserError if files of WebDataset beside the images, such as 0001.cls, may hold their labels."""
        is_file = Path(where).is_file()
        unpacked, source = ("unpack it to FOLDER, then ", "FOLDER") if is_file else ("", where)
        for ending in dict.fromkeys(Path(path).suffix.lower() for path in beside):
            first = next(path for path in beside if path.lower().endswith(ending))
            keys: dict[str, Any] = {}
            with contextlib.suppress(UserError):  # a .json without an object has no labels
                keys = json_object(self.read(first, first), first) if ending == ".json" else {}
            if like_labels([ending.removeprefix("."), *keys]):
                raise UserError(
                    f"{where} has no folders of classes, but files such as {printable(first)} beside its images look "
                    f"like labels: {unpacked}pack it with `tar --sort=name -cf images.tar -C {source} .` and give "
                    "images.tar, whose labels are read, or give --labels TABLE.csv:COLUMN or --labels none."
                )

    def _require_no_numbers_elsewhere(self, where: str, stems: set[str], unknown: Sequence[str]) -> None:
        """Raises UserError for annotations (.xml) or texts of numbers in another folder that are named like images."""
        names = {stem.rpartition("/")[2] for stem in stems}
        texts = sorted(p for p in unknown if p.lower().endswith(CAPTION_ENDING) and Path(p).stem in names and "/" in p)
        lines = [line for path in texts[:MOST_TABLES] for line in caption_lines(self.read(path, path))]
        kind = "texts of numbers" if lines and all(map(NUMBERS.fullmatch, lines)) else ""
        if found := sorted(p for p in unknown if p.lower().endswith(".xml") and Path(p).stem in names):
            kind, texts = "annotations", found
        if kind:
            raise UserError(
                f"{where} has no folders of classes, but {kind} such as {printable(texts[0])} are named "
                "like its images: write the class of each image into a table and give --labels TABLE.csv:COLUMN, or give "
                "--labels none for one class."
            )

    def _columns_of_labels(self, file: str, is_one: bool) -> list[str]:
        """The columns of a file that could be labels; [""] if only its name looks like labels; [] for none."""
        columns = table_columns(file, lambda name: self.read(name, name))
        if file.lower().endswith(".json"):
            # {"a.png": 3}, or records with a label
            if is_one and (like_labels(columns) or any(key.lower().endswith(EXTENSIONS) for key in columns)):
                return [""]
            columns = []
        names_images = not {*FILE_COLUMNS, "id"}.isdisjoint(map(str.lower, columns))
        if likely := label_columns(columns):
            return likely if is_one or names_images else []
        if not is_one:
            return []
        if worded := like_labels(columns):
            return worded
        name = file.rpartition("/")[2]
        if name in METADATA:  # captions, boxes and sizes
            return []
        # image,species: a table of images has labels under any name
        others = [column for column in columns if column.lower() not in (*FILE_COLUMNS, "id", *CAPTION_COLUMNS, "")]
        if names_images and others:
            return others
        words = [word.lower() for word in re.findall("[A-Z]*[a-z]+|[A-Z]+", name)]
        is_named_labels = name == LISTING or any(
            word in words
            for word in ("label", "labels", "classes", "attr", "identity", "annotations", "targets", "truth")
        )
        return [columns[1] if len(columns) > 1 else ""] if is_named_labels or Path(name).stem == "metadata" else []

    def _from_metadata(self, where: str, paths: Sequence[str]) -> Classes | None:
        """The labels in the METADATA files (`imagefolder`), at the root or in folders; None without such labels."""
        classes: Classes | None = None
        for kind in METADATA:
            pairs: list[tuple[str, Any]] = []
            origin = ""
            for file, folder, rows in self._metadata(kind):
                # each line of a JSONL file has its own columns
                columns = list(dict.fromkeys(column for row in rows for column in row))
                likely = label_columns(columns)
                if len(likely) > 1:
                    raise UserError(
                        f"{file} of {where} has several columns that could be the label ({', '.join(likely)}): give "
                        f"--labels {Path(where) / file}:{likely[0]} or another, or --labels {_without_a_file(paths)}."
                    )
                used = ("file_name", *CAPTION_COLUMNS, *map(str.lower, likely))
                unread = [f"column {name!r:.60} of {kind}" for name in columns if name.lower() not in used]
                self.left_out = {**self.left_out, **dict.fromkeys(unread[:20], 1)}
                if not likely:
                    continue
                key = next((column for column in columns if column.lower() == "file_name"), None)
                if key is None:
                    raise UserError(
                        f"{file} of {where} has the column {likely[0]!r}, but no column of image names: add one called "
                        f"'file_name', or give --labels {_without_a_file(paths)}."
                    )
                pairs += [(folder + plain_path(str(row.get(key, ""))), row.get(likely[0])) for row in rows]
                origin = origin or f"the column {likely[0]!r} of {file}"
            if not origin:
                continue
            other = by_name(pairs, paths, f"{kind} of {where}")
            if classes is not None and (classes.names, classes.labels.tolist()) != (other.names, other.labels.tolist()):
                raise UserError(
                    f"{' and '.join(METADATA)} of {where} give different labels: remove one of the two, or give "
                    f"--labels {Path(where) / kind}:COLUMN."
                )
            classes = classes or other._replace(origin=origin)
        return classes

    def _metadata(self, *kinds: str) -> Iterator[tuple[str, str, Rows]]:
        """Each file of these names, the folder its paths are relative to ("", or with a slash), and its rows."""
        for file in sorted(self._described):
            folder, slash, name = file.rpartition("/")
            if name in kinds:
                yield file, folder + slash, read_table(file, self.read(file, file))[1]

    def _captions_of_metadata(self) -> dict[str, tuple[str, ...]]:
        """Path -> its captions in METADATA files; {} if one is unreadable: captions never stop a preparation."""
        written: dict[str, tuple[str, ...]] = {}
        try:
            for folder, row in ((folder, row) for _, folder, rows in self._metadata(*METADATA) for row in rows):
                if texts := next((t for key in CAPTION_COLUMNS if (t := caption_values(row.get(key)))), ()):
                    path = next((str(row[key]) for key in row if key.lower() == "file_name"), "")
                    path = plain_text(folder + plain_path(path))
                    written[path] = (*written.get(path, ()), *texts)
        except UserError:
            return {}
        return written

    def name(self, index: int) -> str:
        return printable(self.paths[index])

    def contents(self, index: int) -> bytes:
        return self.read(self.paths[index], self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        name = self._texts.get(self.paths[index])
        if name is None:
            return self._written.get(plain_text(self.paths[index]), ())
        return caption_lines(self.read(name, printable(name)))

    @abstractmethod
    def read(self, path: str, name: str) -> bytes:
        """The bytes of the file at `path` in the source; `name` is for messages."""


def _without_a_file(paths: Sequence[str]) -> str:
    """The values of --labels that need no file: folders only if an image is in one."""
    in_folders = any("/" in path for path in paths)
    return "folders (each is a class) or none (one class)" if in_folders else "none for one class"


def _folders_above(paths: Iterable[str]) -> set[str]:
    """All folders that contain files, directly or in subfolders; "" is the root."""
    above = {""}
    for folder in {path.rpartition("/")[0] for path in paths}:
        parts = folder.split("/")
        above.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return above


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def count_others(paths: Iterable[str], empty_folders: Iterable[str], junk: int) -> dict[str, int]:
    """Kind -> number of what is not used: other files by ending, empty class folders, hidden files and folders."""
    endings = collections.Counter(
        f"files {Path(path).suffix.lower()[:20]}" if Path(path).suffix else "files without an ending" for path in paths
    )
    empty = sorted(empty_folders)
    # an untrusted source may have any number of endings and folders: the bound keeps the manifest small
    named = {f"folder without images: {printable(name)[:60]}": 1 for name in empty[:20]}
    return {
        **most_common(endings, "files with other endings"),
        **named,
        **({"more folders without images": len(empty) - 20} if empty[20:] else {}),
        **({JUNK_KIND: junk} if junk else {}),
    }


class FolderSource(FileSource):
    """Images in a folder, links followed."""

    def __init__(self, root: Path, labels: str = ""):
        self.root = root
        junk: list[str] = []
        sizes = scan(root, ("",), junk)
        folders = [e.name for e in os.scandir(root) if _is_folder(e) and not is_hidden(e.name)]
        super().__init__(str(root), sizes, labels, folders=folders, junk=len(junk))

    def read(self, path: str, name: str) -> bytes:
        return read_image_file(self.root / path, name)


def scan(root: Path, endings: tuple[str, ...], junk: list[str] | None = None) -> dict[str, int]:
    """Paths below a folder -> size, -1 for a broken link, which fails when it is read. `junk` gets hidden ones."""
    visits: collections.Counter[str] = collections.Counter()
    entries = _walk(root, os.path.realpath(root), endings, (), [] if junk is None else junk, visits)
    return {Path(entry.path).relative_to(root).as_posix(): _size(entry) for entry in entries}


def _walk(
    folder: Path | str, real: str, endings: tuple[str, ...], above: tuple[str, ...], junk: list[str],
    visits: collections.Counter[str],
) -> Iterator[os.DirEntry]:  # fmt: skip
    # a link to a folder above would be followed forever; two links to one folder are no cycle, and both are followed
    if real in above:
        return
    visits[real] += 1
    # a few links on each of a few levels reach a folder by millions of paths
    if visits[real] > MAX_VISITS:
        raise UserError(
            f"Links reach {folder} by more than {MAX_VISITS} paths: give that folder itself, or remove links."
        )
    if len(above) > MAX_FOLDERS:
        raise UserError(f"{folder} is nested in more than {MAX_FOLDERS} folders: move it up.")
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    for entry in entries:
        if is_hidden(entry.name):
            junk.append(entry.path)
        elif _is_folder(entry):
            inside = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            yield from _walk(entry.path, inside, endings, (*above, real), junk, visits)
        elif entry.name.lower().endswith(endings):
            yield entry


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a cycle of links has no end
        return False


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1
