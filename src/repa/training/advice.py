"""The figures of `measure` for people: a table, and what to change next. Every suggestion rests on a measured figure."""

from collections.abc import Sequence
from typing import NamedTuple

from repa.base.files import size
from repa.training.measure import PARTS, Figures

HEAD = ("model", "teacher", "batch", "precision", "step", "s/step", "images/s", "of the rate", "memory", *PARTS)
WORTH = 1.03  # times as fast that a change must promise to be named: less is within the noise


class Advice(NamedTuple):
    """What to change, and how many times as fast the step then is: measured, or at most for a part that would go away."""

    gain: float
    sentence: str


def table(figures: Sequence[Figures]) -> str:
    """Markdown, a row for each; the parts are shares of their sum."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for f in figures:
        memory = "" if f.peak_memory is None else size(f.peak_memory)
        cells = (
            f.model, f.teacher, str(f.batch_size), f.precision, "compiled" if f.compiled else "eager", f"{f.seconds:.3f}",
            f"{f.images_per_second:.1f}", f"{f.utilisation:.0%}", memory, *(f"{f.share(part):.0%}" for part in PARTS),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def advise(now: Figures, others: Sequence[Figures]) -> list[Advice]:
    """What would make the step `now` faster, the most first; empty when nothing that was measured would."""
    found = [_switch(now, other) for other in others if other.images_per_second > now.images_per_second]
    found += [part for part in (_teacher(now), _data(now), _update(now)) if part is not None]
    return sorted((advice for advice in found if advice.gain >= WORTH), reverse=True)


def _switch(now: Figures, other: Figures) -> Advice:
    changes = []
    if other.precision != now.precision:
        changes.append(f"--precision {other.precision}")
    if other.compiled != now.compiled:
        changes.append(f"--compile {str(other.compiled).lower()}")
    if other.batch_size != now.batch_size:
        changes.append(f"--batch-size {other.batch_size} (which changes the training too)")
    gain = other.images_per_second / now.images_per_second
    return Advice(
        gain,
        f"{' '.join(changes)}: {gain:.2f} times as many images a second, {other.images_per_second:.1f} instead of "
        f"{now.images_per_second:.1f}.",
    )


def _teacher(now: Figures) -> Advice | None:
    share = now.share("teacher")
    if now.teacher != "online":
        return None
    return Advice(
        1 / (1 - share),
        f"Store the target tokens, `repa prepare ... --features`: the teacher takes {share:.0%} of the step.",
    )


def _data(now: Figures) -> Advice | None:
    computing = sum(now.parts.values()) - now.parts["data"]
    if now.parts["data"] <= computing:  # it is read while other steps compute
        return None
    return Advice(
        now.parts["data"] / computing,
        f"Put the data on a faster disk, or closer: reading a batch takes {now.parts['data']:.3f} s, computing its step "
        f"{computing:.3f} s.",
    )


def _update(now: Figures) -> Advice | None:
    share = now.share("optimizer") + now.share("averages")
    return Advice(
        1 / (1 - share / 2),
        f"Twice the --batch-size (which changes the training too): optimizer and averages take {share:.0%} of a step of "
        f"{now.batch_size} images, and as long with more.",
    )
