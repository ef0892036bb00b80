"""List the files of src/repa that a command runs through, in the order in which a reader would open them.

    python tools/walk.py prepare photographs:num=64 DATA --resolution 32 --features tiny --num-workers 0
    python tools/walk.py --during training/loop.py:backward:6 --without cli/ train quickstart --data DATA --out RUN \
        --num-steps 8 --preview.every 0

Each function counts once, when it is first called. A stop is a run of consecutive functions in one file; a stop in a
file seen before is a return. The fewer returns, the more of the work reads from top to bottom. Threads are followed,
worker processes are not.

`--during FILE:FUNCTION:N` looks only from the N-th call of a function to the next one, for example at one step of a
training. `--without cli/` then leaves out what the progress bar calls. A new epoch adds data/order.py, so use enough
images that none begins during this step; a thousand are enough for the eighth.
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
    """A profile function for `sys.setprofile` that records the files of called functions, in all threads."""

    def __init__(self, during: str = "", without: str = ""):
        self.without = without
        self.file, self.function, self.nth = (*during.split(":"), "", "", "")[:3]
        self.calls = 0
        self.starts: list[str] = []  # file of each function at its first call
        self.moves: dict[tuple[str, str], int] = {}  # from file to file, among all calls of a thread
        self._seen: set[CodeType] = set()
        self._names: dict[str, str] = {}
        self._last = threading.local()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        # skip modules and class bodies, and comprehensions and lambdas, which are read in place
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
            if _importing(frame):  # decorators and tables that run at import
                return
            self._seen.add(code)
            self.starts.append(file)
        last = getattr(self._last, "file", file)
        if last != file:
            self.moves[last, file] = self.moves.get((last, file), 0) + 1
        self._last.file = file

    def _left_out(self, frame: FrameType | None) -> bool:
        """Whether a function in the folder `without` is on the call stack above the file of `during`."""
        while self.without and frame is not None:
            file = self._names.get(frame.f_code.co_filename, "")
            if file == self.file or file.startswith(self.without):
                return file != self.file
            frame = frame.f_back
        return False

    def report(self, below: str) -> str:
        """The stops in one folder of the package and their counts; other files are ignored."""
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
    parser.add_argument("--without", default="", help="with --during: leave out what functions in this folder call")
    parser.add_argument("--below", default="", help="count only files in this folder of the package, e.g. data/")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command without `repa`")
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
