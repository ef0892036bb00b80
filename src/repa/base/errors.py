"""The one exception that is meant for the user, and texts made safe to print."""

import re
from collections.abc import Iterable

FITS = 120  # characters of a list of names in a sentence

# C0, C1 and DEL move the cursor or colour the terminal; bidirectional controls and line separators reorder what is read; lone
# surrogates stand for bytes that are no UTF-8
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class UserError(ValueError):
    """An error the user can fix: the message says what was given, what is allowed and what to do next.

    The command line prints it as one sentence and exits with code 2. Every other exception is a bug of ours: traceback, exit code 1.
    """


def escaped(text: str) -> str:
    r"""Text as a terminal may show it: control characters are written out (\\x1b), newlines and tabs stay."""
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def choices(given: str, allowed: Iterable[object], see: str = "") -> str:
    """The end of a sentence about a name that does not exist: the nearest name first, then those that there are.

    A list that is too long for a sentence is cut: `see` is the command that prints all of it.
    """
    names = [str(name) for name in allowed]
    near, listed = nearest(given, names), ", ".join(names) or "none"
    if len(listed) > FITS and (see or near):
        all_of_them = f" `{see}` prints all {len(names)}." if see else ""
        if near:
            return f".{near}{all_of_them}"
        return f": allowed are {listed[:FITS].rpartition(', ')[0]}, ...{all_of_them}"
    return f".{near} Allowed are {listed}." if near else f": allowed are {listed}."


def nearest(given: str, allowed: Iterable[object]) -> str:
    """' Did you mean ...?' for the allowed name closest to `given`, or '' when none is close."""
    import difflib

    match = difflib.get_close_matches(given, [str(name) for name in allowed], n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
