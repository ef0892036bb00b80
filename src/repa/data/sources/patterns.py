"""Several files by one name: shard-{0000..0099}.tar, train-*.parquet; and where they lie."""

import glob
import re
from pathlib import Path

from repa.base.errors import UserError

MAX_FILES = 1_000_000
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")  # a range of numbers, or words


def is_remote(name: str) -> bool:
    """Whether a file is fetched: a URL, or the output of a command (`pipe:`)."""
    return name.startswith("pipe:") or re.match(r"[a-z][a-z0-9+]*://", name) is not None


def expand(spec: str) -> list[str]:
    """The files that a name stands for: braces first, as a shell does, then * ? [] for files on this machine.

    Raises:
        UserError: a range that goes down, more than MAX_FILES, or a pattern that no file matches.
    """
    names = _braces(spec)
    if is_remote(spec):
        return names
    found: list[str] = []
    for name in names:
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UserError(f"There is no file {name!r}{'' if name == spec else f', of {spec!r}'}: give its path.")
        found += matches
    return found


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
        raise UserError(f"{spec!r} has the range {match.group()}: it goes up, over at most {MAX_FILES:,} files.")
    names = []
    for option in options:
        names += _braces(spec[: match.start()] + option + spec[match.end() :])
        if len(names) > MAX_FILES:
            raise UserError(f"{spec!r} stands for more than {MAX_FILES:,} files: give fewer at a time.")
    return names
