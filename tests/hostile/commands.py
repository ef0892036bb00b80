"""Run commands inside the test's process and return their outcome."""

import contextlib
import io
import signal
import traceback

from repa.cli import main

LONGEST = 60  # seconds; a longer command counts as a hang


class Late(BaseException):
    """A command took too long."""


def outcome(argv: list[str]) -> tuple[object, str]:
    """A command's exit code, or how it failed, and its output."""
    said = io.StringIO()

    def late(*_):
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code: object = main.run(argv)
    except Late:
        return "hang", f"{argv} took more than {LONGEST} s"
    except SystemExit as ended:
        code = ended.code
    except Exception:
        return "traceback", f"{argv}\n{traceback.format_exc()}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code, said.getvalue()
