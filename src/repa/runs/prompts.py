"""The texts that samples are of, and files of them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from repa.base import faults, files
from repa.base.errors import UserError
from repa.conditions import Text

MOST_BYTES = 2**28  # of a file of prompts


@dataclass(frozen=True)
class Prompts:
    """Texts in turn: image i is of text i modulo their number.

    Args:
        texts: P of them.
        encode: their tokens, by their numbers 0 ... P - 1.
        negative: tokens (1, S, E) of what guidance walks away from; None: the empty text.
    """

    texts: Sequence[str]
    encode: Callable[[Sequence[int]], Text]
    negative: Text | None = None

    def of(self, indices: Sequence[int]) -> Text:
        """Tokens (N, S, E) of the texts of N images."""
        return self.encode([int(index) % len(self.texts) for index in indices])

    def texts_of(self, indices: Sequence[int]) -> list[str]:
        """The texts themselves."""
        return [self.texts[int(index) % len(self.texts)] for index in indices]


def prompts_in(path: Path) -> list[str]:
    """One a line; of .jsonl the "prompt" (or "caption", "text") of each line's object. Empty lines are left out.

    Raises:
        UserError: no such file, no UTF-8, no prompt in it or in a line.
    """
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is larger than {files.size(MOST_BYTES)}: give fewer prompts.")
    with faults.reading(path, "a file of prompts", "Save it as UTF-8."):
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        lines = [_prompt(line, number, path) for number, line in enumerate(lines, start=1)]
    if not lines:
        raise UserError(f"{path} holds no prompt: write one a line.")
    return [files.well_formed(line.strip()) for line in lines]


def _prompt(line: str, number: int, path: Path) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    found = [values.get(key) for key in ("prompt", "caption", "text")] if isinstance(values, dict) else []
    text = next((text for text in found if isinstance(text, str)), "")
    if not text.strip():
        raise UserError(f'Line {number} of {path} holds no object with a "prompt".')
    return text
