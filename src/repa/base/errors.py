"""The one exception that is meant for the user."""


class UserError(ValueError):
    """A mistake the user can mend: the message says what was given, what is allowed and what to do next.

    The command line prints it as one sentence and exits with code 2. Every other exception is a bug of ours: traceback, exit code 1.
    """


def nearest(given: str, allowed) -> str:
    """' Did you mean ...?' for the allowed name closest to `given`, or '' when none is close."""
    import difflib

    match = difflib.get_close_matches(given, [str(name) for name in allowed], n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
