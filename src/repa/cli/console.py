"""Output of a command: lines, tables, progress (a bar on a terminal, plain lines in a log), notes on retries."""

import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from repa.base import launch
from repa.base.errors import printable
from repa.base.reporting import duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_EVERY = 10.0  # seconds between progress lines in a log
NARROWEST = 24  # columns into which a sentence is wrapped
MEASURED = 1.0  # seconds of work before a rate is shown
_bars = True


def draw_no_bars() -> None:
    """Use plain lines from now on, also on a terminal: another process writes there too."""
    global _bars
    _bars = False


def speaks() -> bool:
    """Whether this process prints."""
    return launch.place(strict=False).rank == 0


def say(*lines: str) -> None:
    """Print lines in the main process only, with control characters escaped."""
    if speaks():
        print(*(map(printable, lines)), sep="\n", flush=True)


def short(name: str, most: int) -> str:
    """A name cut to at most this many characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def table(groups: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """Rows under their headings, in columns. On a terminal the last column is wrapped; a log has one line per row."""
    every = [row for rows in groups.values() for row in rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    # A log has one row per line, because wrapped rows are hard to search.
    room = shutil.get_terminal_size().columns - indent if sys.stdout.isatty() else 0
    lines: list[str] = []
    for heading, rows in groups.items():
        lines += [""] * bool(lines) + [f"# {heading}"] * bool(heading)
        for *cells, last in rows:
            before = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths[:-1], strict=True))
            parts = (
                textwrap.wrap(last, room, break_long_words=False, break_on_hyphens=False)
                if room >= NARROWEST
                else [last]
            )
            lines.append((before + "".join(parts[:1])).rstrip())
            lines += [" " * indent + part for part in parts[1:]]
    return lines


class ProgressBar:
    """One task: call it with (done, total, note). Use as a context manager."""

    def __init__(self, what: str, unit: str):
        self.what, self.unit = printable(what), unit
        self.bar: Bar | None = None
        self.begin = self.said = time.perf_counter()
        # The rate of a resumed job counts only the work of this process; otherwise the remaining time would be too
        # short.
        self.first: int | None = None

    def __enter__(self) -> "ProgressBar":
        if _bars and speaks() and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True), redirect_stdout=sys.stdout.isatty(),  # otherwise the bar would swallow the lines of a log
            )  # fmt: skip
            self.task = self.bar.add_task(self.what, total=None, rate="", note="")
            self.bar.start()
        return self

    def __call__(self, done: int, total: int, note: str = "") -> None:
        note, now = printable(note), time.perf_counter()
        # A smaller count starts another pass. The clock restarts, because loading models or another process took the
        # time before it.
        if self.first is None or done < self.first:
            self.first, self.begin = done, now
        if not speaks():
            return
        spent = now - self.begin
        rate = (done - self.first) / spent if spent >= MEASURED else 0.0
        if self.bar:
            speed = f"{_shown(rate)} {self.unit}/s" if rate else ""
            self.bar.update(self.task, completed=done, total=total, rate=speed, note=note)
        elif now - self.said >= LINE_EVERY or done >= total:
            self.said = now
            left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
            speed = f" ({_shown(rate)}/s{left})" if rate else ""  # work that is reported once, at its end, has no rate
            print(
                f"{self.what}: {done:,}/{total:,} {self.unit}{speed} {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def within(self, what: str, done: int, total: int) -> None:
        """Progress inside one unit of the task, such as the samples of a preview: beside the bar, or in occasional lines."""
        now, text = time.perf_counter(), printable(f"{what} {done:,}/{total:,}")
        if self.bar:
            self.bar.update(self.task, note=text)
        elif speaks() and now - self.said >= LINE_EVERY:
            self.said = now
            print(f"{self.what}: {text}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()


def _shown(rate: float) -> str:
    """A rate as text; below 1 with two digits."""
    return f"{rate:,.1f}" if rate >= 1 else f"{rate:.2g}"


class Bars:
    """Consecutive tasks with a bar each: a terminal shows one at a time."""

    def __init__(self) -> None:
        self._stack, self._shown = ExitStack(), ""

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, what: str, unit: str = "images") -> Callable[[int, int], None]:
        """A function to call with (done, total); its first call replaces the bar of the previous task."""

        def progress(done: int, total: int) -> None:
            if self._shown != what:
                self._stack.close()
                self._bar, self._shown = self._stack.enter_context(ProgressBar(what, unit)), what
            self._bar(done, total)

        return progress


class OneSentence(logging.Filter):
    """Drops the messages of libraries about network retries; the first one is replaced by one line of ours."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        is_retry = any(sign in record.getMessage() for sign in ("Retrying", "thrown while requesting"))
        if record.levelno >= logging.ERROR or not is_retry:
            return True
        if speaks() and not self.said:
            print("repa: The server does not answer. Retrying for up to a minute.", file=sys.stderr, flush=True)
        self.said = True
        return False


def tell_retries_once() -> None:
    """Install the filter in this process."""
    one = OneSentence()
    for name in ("huggingface_hub.utils._http", "urllib3.connectionpool"):
        logging.getLogger(name).addFilter(one)
