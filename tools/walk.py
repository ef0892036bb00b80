"""The files of src/repa that a command walks through, in the order in which a reader of its work would open them.

    python tools/walk.py prepare photographs:num=64 DATA --resolution 32 --features tiny --num-workers 0
    python tools/walk.py --during training/loop.py:backward:6 --without cli/ train quickstart --data DATA --out RUN \
        --num-steps 8 --preview.every 0

Each function counts where it starts first. A stop is a run of such functions in one file; a stop in a file that was left before
is a return. Fewer returns: more of the work is read from top to bottom. Work in threads is seen, that in worker processes is
not. `--during FILE:FUNCTION:N` looks only from the N-th call of a function to the next one: at one steady step of a training,
of which `--without cli/` leaves out what the progress bar calls. An epoch that begins adds data/order.py: DATA of a thousand
images have none in the eighth step.
"""

import argparse
import inspect
import itertools
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "repa"


class Walk:
    """What `sys.setprofile` calls. Counts files that functions start in, in all threads."""

    def __init__(self, during: str = "", without: str = ""):
        self.without = without
        self.file, self.function, self.nth = (*during.split(":"), "", "", "")[:3]
        self.calls = 0
        self.starts: list[str] = []  # file of each function, at its first start
        self.moves: dict[tuple[str, str], int] = {}  # from file to file, among all starts of a thread
        self._seen: set[CodeType] = set()
        self._names: dict[str, str] = {}
        self._last = threading.local()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        # neither modules nor bodies of classes, and no comprehensions or lambdas, which are read where they stand
        if event != "call" or not code.co_flags & inspect.CO_OPTIMIZED or code.co_name.startswith("<"):
            return
        file = self._names.get(code.co_filename)
        if file is None:
            path = Path(code.co_filename)
            file = str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else ""
            self._names[code.co_filename] = file
        if not file:
            return
        if self.function:
            self.calls += file == self.file and code.co_name == self.function
            if self.calls != int(self.nth) or self._left_out(frame):
                return
        if code not in self._seen:
            if _importing(frame):  # decorators and tables that run when a module is read
                return
            self._seen.add(code)
            self.starts.append(file)
        last = getattr(self._last, "file", file)
        if last != file:
            self.moves[last, file] = self.moves.get((last, file), 0) + 1
        self._last.file = file

    def _left_out(self, frame: FrameType | None) -> bool:
        """Whether a function of the folder `without` called it, between the file of `during` and here."""
        while self.without and frame is not None:
            file = self._names.get(frame.f_code.co_filename, "")
            if file == self.file or file.startswith(self.without):
                return file != self.file
            frame = frame.f_back
        return False

    def report(self, below: str) -> str:
        """The stops below a folder of the package, and their counts; files elsewhere are passed over."""
        stops = [file for file, _ in itertools.groupby(file for file in self.starts if file.startswith(below))]
        before, lines = set(), []
        for file in stops:
            lines.append(f"{'  return to ' if file in before else ''}{file}")
            before.add(file)
        moves = {pair: num for pair, num in self.moves.items() if all(file.startswith(below) for file in pair)}
        lines.append(
            f"{below or 'all'}: {len(stops)} stops in {len(before)} files, {len(stops) - len(before)} of them returns; "
            f"{sum(moves.values()):,} moves between files, {len(moves)} different ones"
        )
        return "\n".join(lines)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") != "__main__":
            return True
        frame = frame.f_back
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--during", default="", help="FILE:FUNCTION:N")
    parser.add_argument("--without", default="", help="with --during: leave out what this folder's functions call")
    parser.add_argument("--below", default="", help="count files of this folder of the package alone, e.g. data/")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what follows `repa`")
    given = parser.parse_args()
    sys.path.insert(0, str(PACKAGE.parent))
    from repa.cli.main import run

    walk = Walk(given.during, given.without)
    threading.setprofile(walk)
    sys.setprofile(walk)
    try:
        run(given.command)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        print(walk.report(given.below))


if __name__ == "__main__":
    main()
