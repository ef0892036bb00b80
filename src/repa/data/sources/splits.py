"""Names that say training, validation or test: parts of one data set, and no classes."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from repa.base.errors import UserError

MEANINGS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test", "holdout": "test",
}  # fmt: skip


def splits_among(names: Iterable[str]) -> list[str]:
    """Those of the names that look like splits, sorted: the bare words, and where two differ also train2017 and seg_test."""
    found = {name: meaning for name in names if (meaning := _meaning(name))}
    if len(set(found.values())) > 1:
        return sorted(found)
    return sorted(name for name in found if name.lower() in MEANINGS)


def _meaning(name: str) -> str:
    words = re.split("[^a-z]+", name.lower())
    return next((MEANINGS[word] for word in words if word in MEANINGS), "")


def require_one_split(files: Sequence[str]) -> None:
    """Raises UserError for shards of several splits, which would become one set in silence."""
    stems = [Path(file.partition("?")[0]).stem for file in files]
    meanings = {stem: _meaning(stem) for stem in stems}
    if len(found := sorted({meaning for meaning in meanings.values() if meaning})) > 1:
        first = next(file for file, stem in zip(files, stems, strict=True) if meanings[stem])
        others = ", ".join(sorted(stem for stem in meanings if meanings[stem])[:4])
        raise UserError(
            f"{Path(first).parent} holds several splits ({', '.join(found)}: {others}): give the files of one, such as {first}."
        )
