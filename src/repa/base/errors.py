"""The exception for users, helpers for its messages, and escaping of texts for printing."""

import re
from collections.abc import Iterable, Sequence

FITS = 120  # characters of a list of names in a message

# C0, C1 and DEL control the terminal; bidirectional controls and line separators reorder the text; lone surrogates
# represent bytes that are not UTF-8
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
LINES = str.maketrans({"\n": "\\n", "\t": "\\t"})
MARKDOWN = str.maketrans({letter: f"\\{letter}" for letter in "\\|*_<>`[]"})


class UserError(ValueError):
    """An error that the user can fix: the message says what happened, then what to do.

    The command line prints it as one sentence and exits with code 2. Every other exception is a bug in repa: traceback, exit code 1.
    """


def require_type(given: object, kind: type | tuple[type, ...], needed: str) -> None:
    """UserError unless an argument is an instance of `kind`; `needed` begins the sentence: "A block is a name"."""
    if not isinstance(given, kind):
        shown = repr(given)
        is_short = len(shown) <= 60 and not shown.startswith(("<", "tensor(", "array(")) and "\n" not in shown
        raise UserError(f"{needed}, but got {shown if is_short else f'an object of type {type(given).__name__}'}.")


def escaped(text: str) -> str:
    r"""Text that is safe for a terminal: control characters are escaped (\\x1b), newlines and tabs stay."""
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def printable(name: str) -> str:
    """An untrusted name for a line, a cell or a manifest: newlines and tabs are escaped too."""
    return escaped(name).translate(LINES)


def in_markdown(name: str) -> str:
    """A name escaped for Markdown: it may contain a bar, a star or a tag."""
    return printable(name).translate(MARKDOWN)


def choices(given: object, allowed: Iterable[object], see: str = "") -> str:
    """The end of an error about an unknown name: '. Choose a, b or c. Did you mean 'a'?'

    A list that is too long is replaced by the nearest name, or cut. `see` is the command that prints all names.
    """
    names = [str(name) for name in allowed]
    near, shown = nearest(given, names), listed(names)
    if len(shown) > FITS and (see or near):
        all_of_them = f" `{see}` prints all {len(names)}." if see else ""
        if near:
            return f".{near}{all_of_them}"
        return f". Choose {shown[:FITS].rpartition(', ')[0]}, ...{all_of_them}"
    if not names:
        return ". There are none."
    return f".{near}" if near and len(names) == 1 else f". Choose {shown}.{near}"


def listed(names: Sequence[object], word: str = "or") -> str:
    """'a, b or c'."""
    *others, last = map(str, names) if names else ("",)
    return f"{', '.join(others)} {word} {last}" if others else last


def nearest(given: object, allowed: Iterable[object], cutoff: float = 0.5) -> str:
    """' Did you mean ...?' for the allowed name closest to `given`, or '' if none is close."""
    import difflib

    match = difflib.get_close_matches(str(given), [str(name) for name in allowed], n=1, cutoff=cutoff)
    return f" Did you mean {match[0]!r}?" if match else ""
