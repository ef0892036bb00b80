"""Progress callbacks, and durations in words."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # done, total


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def duration(seconds: float) -> str:
    """33.1 -> '33 s', 725 -> '12 min 5 s', 74400 -> '20 h 40 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"
