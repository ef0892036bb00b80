"""Progress callbacks, durations in words, rows in columns."""

from collections.abc import Callable, Container, Sequence

Progress = Callable[[int, int], None]  # done, total


def silent(done: int, total: int) -> None:
    """Progress that is not shown."""


def duration(seconds: float) -> str:
    """33.1 -> '33 s', 725 -> '12 min 5 s', 74400 -> '20 h 40 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def columns(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """One line per row, with columns two spaces apart; the columns `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]
