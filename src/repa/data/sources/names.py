"""What file names mean: system junk, members of archives, patterns, splits of a data set."""

import collections
import glob
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from repa.base.errors import UserError
from repa.data.sources.contract import require_image_size

MAX_FILES = 1_000_000
FEW_OF_CLASS = 5  # images with one name before their numbers; fewer may share it by chance
# depth of a file: the set of all parent folders of a path needs memory that is quadratic in its depth
MAX_FOLDERS = 100
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")  # a range of numbers, or alternatives
# of macOS, Windows, ext4, Python, and disks of Synology, QNAP and NetApp; none of them begins with a dot
JUNK = (
    "__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "desktop.ini", "__pycache__", "#snapshot", "~snapshot", "@tmp", "@sharebin", "recycler", "found.000",
    "network trash folder", "temporary items", "@__thumb", "$extend",
)  # fmt: skip
JUNK_KIND = "hidden files and folders of the system"
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test", "holdout": "test",
}  # fmt: skip
"""Names of folders and files that are splits, not classes -> the split."""
UNNAMED = {
    "cimg", "clip", "crop", "dcim", "dsc", "dscf", "dscn", "file", "frame", "gopr", "gx", "image", "images", "img", "mg", "mvimg",
    "page", "pano", "patch", "photo", "pic", "pict", "picture", "pxl", "sam", "sample", "scan", "scene", "screenshot", "shot", "tile",
    "untitled", "vid", "video", "wp",
}  # fmt: skip
"""First words of the names that cameras and programs give."""


def most_common(counts: Mapping[str, int], others: str) -> dict[str, int]:
    """The 20 largest counts, in a fixed order; the rest as one, because an untrusted source may have any number."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(num for _, num in ordered[20:])
    return dict(ordered[:20]) | ({others: rest} if rest else {})


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or made by the system, not by the user."""
    return name.startswith(".") or name.lower() in JUNK


def member_path(name: str) -> str:
    """The normalised path of a member of an archive: some programs write backslashes, others './' and '//'."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def require_safe_member(archive: str | Path, name: str, size: int) -> None:
    """Raises UserError for a harmful member: a path that leaves the folder of the archive, or too large a file."""
    # the rules of all systems apply on each: an archive that passes here must not be harmful elsewhere
    plain = name.replace("\\", "/")
    if plain.startswith("/") or re.match(r"[A-Za-z]:", plain) or ".." in plain.split("/"):
        raise UserError(
            f"{archive} holds {name!r}, a path that leads out of the archive: pack it again without that path."
        )
    if plain.count("/") > MAX_FOLDERS:
        raise UserError(
            f"{archive} holds {plain[:60]!r}..., a path of more than {MAX_FOLDERS} folders: shorten it and pack again."
        )
    require_image_size(size, f"{plain} in {archive}")


def name_before_number(path: str) -> str:
    """The name of a file without the number at its end: cat for a/cat_001.png and cat (1).png; "" without a number."""
    counted = re.fullmatch(r"(.*?)[\s_.(-]*[0-9]+\)?", path.rpartition("/")[2].rpartition(".")[0])
    return counted[1] if counted else ""


def classes_in_names(paths: Iterable[str]) -> list[str]:
    """The names before numbers if they look like classes, the most common first: cat_1.png, dog_1.png; else []."""
    counts = collections.Counter(map(name_before_number, paths))
    found = [name for name, num in counts.most_common() if num >= FEW_OF_CLASS and _is_worded(name)]
    # a few other files may be among them; names that are rarely repeated are not classes
    return found if len(found) > 1 and sum(counts[name] for name in found) >= 0.9 * counts.total() else []


def _is_worded(name: str) -> bool:
    word = re.match(r"_*([^\W\d_]+)", name)
    return word is not None and word[1].lower() not in UNNAMED


def is_remote(name: str) -> bool:
    """Whether a name is a URL or a command (`pipe:`) instead of a local path."""
    return name.startswith("pipe:") or re.match(r"[a-z][a-z0-9+]*://", name) is not None


def expand(spec: str) -> list[str]:
    """The files that a pattern names: braces are expanded first, as in a shell, then * ? [] for local files.

    Raises:
        UserError: a descending range, more than MAX_FILES files, a file named twice, or a pattern that no file matches.
    """
    names = _braces(spec)
    if is_remote(spec):
        return _each_once(spec, names)
    files: list[str] = []
    for name in names:
        # glob would not match a file with a bracket in its name
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            source = "" if name == spec else f" (from {spec!r})"
            raise UserError(f"There is no file {name!r}{source}: check the path.")
        files += matches
    return _each_once(spec, files)


def _each_once(spec: str, files: list[str]) -> list[str]:
    if len(set(files)) < len(files):
        twice = next(file for file, num in collections.Counter(files).items() if num > 1)
        raise UserError(f"{spec!r} names {twice} twice: name every file once.")
    return files


def stem_of(shard: str) -> str:
    """The name of a file without its folder, its ending and, for a URL, its query."""
    return Path(shard.partition("?")[0]).stem


def counted_through(shards: Sequence[str]) -> bool:
    """Whether these are consecutive parts of one set: train-0000.tar, train-0001.tar; 00000-of-00002.parquet.

    Names such as class_0.tar, 0.tar without leading zeros, and n01440764.tar may be those of classes.
    """
    stems = [re.sub("-of-[0-9]+$", "", stem_of(shard)) for shard in shards]
    matches = [match for stem in stems if (match := re.search(r"([0-9]+)(?!.*[0-9])", stem))]
    if len(matches) < len(stems):
        return False
    numbers = sorted(int(match[1]) for match in matches)
    others = {stem[: match.start()] + stem[match.end() :] for stem, match in zip(stems, matches, strict=True)}
    if len(others) > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return False
    (other,) = others
    is_plain_number = not other and all(match[1] == str(int(match[1])) for match in matches)
    is_identifier = numbers[0] > MAX_FILES
    return not (is_plain_number or is_identifier or "class" in other.lower() or "label" in other.lower())


def named_by_first(shards: Sequence[str]) -> str:
    """A name for several files in messages."""
    return shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"


def is_pattern(spec: str) -> bool:
    return any(mark in spec for mark in "*?[") or BRACES.search(spec) is not None


def _braces(spec: str) -> list[str]:
    match = BRACES.search(spec)
    if not match:
        return [spec]
    first, last, words = match.groups()
    if words is not None:
        options = words.split(",")
    elif 0 <= int(last) - int(first) < MAX_FILES:
        width = len(first) if first.startswith("0") else 0
        options = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        raise UserError(f"{spec!r} has the range {match.group()}: it must ascend, over at most {MAX_FILES:,} files.")
    names = []
    for option in options:
        # counted at every level: a few braces of a thousand names each would fill the memory before the last level
        names += _braces(spec[: match.start()] + option + spec[match.end() :])
        if len(names) > MAX_FILES:
            raise UserError(f"{spec!r} names more than {MAX_FILES:,} files: give fewer at a time.")
    return names


def splits_among(names: Iterable[str]) -> list[str]:
    """The names that look like splits, sorted: the bare words; with several splits also train2017 and seg_test."""
    split_like = {name for name in names if _split_of(name)}
    # test_tube and dev_board may be classes: without a second split, only the bare word is one
    return several_splits(split_like) or sorted(name for name in split_like if name.lower() in SPLITS)


def several_splits(names: Iterable[str]) -> list[str]:
    """The names that look like splits, sorted; [] unless they are of at least two different splits."""
    split_of = {name: meaning for name in names if (meaning := _split_of(name))}
    return sorted(split_of) if len(set(split_of.values())) > 1 else []


def split_folders(paths: Sequence[str]) -> list[str]:
    """The folders that look like several splits, on the highest level with such folders."""
    folders = {path.rpartition("/")[0] for path in paths}
    for level in range(max(folder.count("/") for folder in folders) + 1):
        if splits := several_splits({folder.split("/")[level] for folder in folders if folder.count("/") >= level}):
            return splits
    return []


def _split_of(name: str) -> str:
    words = re.findall("[A-Z]*[a-z]+|[A-Z]+", name)  # also in trainA and TestSet
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), "")


def require_one_split(files: Sequence[str]) -> None:
    """Raises UserError for shards of several splits, by name or folder, which would silently become one set."""
    paths = [re.split(r"[/\\]", file.partition("?")[0]) for file in files]
    # common folders do not distinguish splits
    same = len([*itertools.takewhile(lambda names: len({*names}) == 1, zip(*paths, strict=False))])
    parts = [[*path[same:-1], stem_of(file)] for path, file in zip(paths, files, strict=True)]
    splits = [next(filter(None, map(_split_of, names)), "") for names in parts]
    if len(kinds := sorted({*splits} - {""})) > 1:
        first, others = files[splits.index(kinds[0])], ", ".join(sorted({"/".join(names) for names in parts})[:4])
        raise UserError(
            f"The files are of several splits ({', '.join(kinds)}: {others}): give the files of one, such as {first}."
        )
