"""Which classes samples are of: only those that have training images, by name or by number."""

import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from repa.base.errors import UserError, nearest
from repa.base.rng import SampleStreams
from repa.runs import LoadedRun

DRAWN = ("uniform", "balanced")
NUMBER = re.compile(r"#?[0-9]{1,9}")


def draw_labels(protocol: str, indices: Sequence[int], streams: SampleStreams, run: LoadedRun) -> Tensor:
    """(N,) class labels on the device of `streams`: "uniform", "balanced" (index modulo classes), or given classes in turn.

    Only classes with training images are drawn: the vector of another one never trained.
    """
    classes = torch.tensor(drawn_classes(protocol, run), device=streams.device)
    if protocol == "uniform":
        return classes[streams.randint(len(classes))]
    return classes[[index % len(classes) for index in indices]]


def drawn_classes(protocol: str, run: LoadedRun) -> tuple[int, ...]:
    """The classes that are drawn: all that have training images, or those that are named."""
    if protocol in DRAWN:
        return run.trained_classes or (run.model.null_label,)
    return tuple(label for _, label in classes_named(protocol, run))


def classes_named(text: str, run: LoadedRun) -> list[tuple[str, int]]:
    """The classes that a text names, by name or number, with commas between them: each as it is named, and its number.

    A name comes first where both fit; #3 is always number 3. Raises UserError for unknown classes, and for those without images.
    """
    by_name = {name: label for label, name in enumerate(run.class_names)}
    text = unicodedata.normalize("NFC", text).strip()  # as `prepare` writes names
    parts = [text] if text in by_name else [part.strip() for part in text.split(",")]  # a name may hold commas
    found = []
    for part in parts:
        number = int(part.removeprefix("#")) if NUMBER.fullmatch(part) else -1
        label = by_name.get(part, number)
        if not 0 <= label < run.model.num_classes:
            known = f", such as {', '.join(run.class_names[:5])}" if run.class_names else ""
            raise UserError(
                f"Class {part} does not exist: the model has {run.model.num_classes} classes, numbered from 0{known}."
                f"{nearest(part, run.class_names[:1000])}"
            )
        if label not in run.trained_classes:
            raise UserError(f"Class {part} has no training images, so the network never learned it: choose another.")
        found.append((part, label))
    return found


def about_classes(protocol: str, run: LoadedRun) -> str:
    """A sentence about what was decided and a user may not expect; empty when there is nothing to tell."""
    num = run.model.num_classes
    if protocol in DRAWN:
        missing = num - len(drawn_classes(protocol, run))
        return f"{missing:,} of {num:,} classes without training images are not drawn." if missing > 0 else ""
    for part, label in classes_named(protocol, run):
        if part.isdecimal() and label != int(part) < num:
            return f"--labels {part} is the class named {part}, which has number {label}: write #{part} for class number {int(part)}."
        name = run.class_names[label] if label < len(run.class_names) else part
        if part.isdecimal() and name != part and NUMBER.fullmatch(name):
            return f"--labels {part} is class number {part}, which is named {name}: no class is named {part}."
    return ""
