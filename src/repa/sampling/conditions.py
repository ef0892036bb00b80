"""Conditions of samples: classes with training images, by name or number; or texts, encoded like the run's captions."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.base import files
from repa.base.errors import UserError, listed, nearest
from repa.base.rng import SampleStreams
from repa.conditions import load_text_encoder
from repa.conditions.loading import prompts_in
from repa.data import open_data
from repa.runs import LoadedRun
from repa.runs.loading import Prompts
from repa.sampling.config import SampleConfig

DRAWN = ("uniform", "balanced")
NUMBER = re.compile(r"#?[0-9]{1,9}")


def draw_labels(protocol: str, indices: Sequence[int], streams: SampleStreams, run: LoadedRun) -> Tensor:
    """(N,) class labels on the device of `streams`: "uniform", "balanced" (index modulo classes), or the given classes in turn.

    Only classes with training images are used: the embedding of any other class was never trained.
    """
    classes = torch.tensor(drawn_classes(protocol, run), device=streams.device)
    if protocol == "uniform":  # from each image's stream, so that the class does not depend on the batch
        return classes[streams.randint(len(classes))]
    return classes[[index % len(classes) for index in indices]]


def drawn_classes(protocol: str, run: LoadedRun) -> tuple[int, ...]:
    """The classes in use: all with training images, or the named ones."""
    if protocol in DRAWN:
        return run.trained_classes or (run.model.null_label,)
    return tuple(label for _, label in classes_named(protocol, run))


def classes_named(text: str, run: LoadedRun) -> list[tuple[str, int]]:
    """The classes in a comma-separated text of names or numbers: each as written, and its number.

    If a name and a number match, the name wins; #3 is always number 3. Raises UserError for unknown classes, and for classes
    without images.
    """
    by_name = {name: label for label, name in enumerate(run.class_names)}
    text = unicodedata.normalize("NFC", text).strip()  # as `prepare` writes names
    parts = [text] if text in by_name else [part.strip() for part in text.split(",")]  # a name may hold commas
    found = []
    for part in parts:
        number = int(part.removeprefix("#")) if NUMBER.fullmatch(part) else -1
        label = by_name.get(part, number)
        # ImageNet's class names come from WordNet, which has two classes named crane.
        if run.class_names.count(part) > 1:
            numbers = [f"#{number}" for number, name in enumerate(run.class_names) if name == part]
            raise UserError(f"{len(numbers)} classes have the name {part}: choose by number, {listed(numbers)}.")
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
    """A sentence on a choice of classes that a user may not expect; otherwise empty."""
    num = run.model.num_classes
    if protocol in DRAWN:
        missing = num - len(drawn_classes(protocol, run))
        return f"{missing:,} of {num:,} classes have no training images and are not sampled." if missing > 0 else ""
    for part, label in classes_named(protocol, run):
        if part.isdecimal() and label != int(part) < num:
            return f"--labels {part} is the class named {part}, which has number {label}: write #{part} for class number {int(part)}."
        name = run.class_names[label] if label < len(run.class_names) else part
        if part.isdecimal() and name != part and NUMBER.fullmatch(name):
            return f"--labels {part} is class number {part}, which is named {name}: no class is named {part}."
    return ""


def prompts_of(run: LoadedRun, config: SampleConfig, device: torch.device | str) -> Prompts | None:
    """The encoded prompts of `config`; None for a run that reads no text.

    Raises:
        UserError: prompts do not fit the run, a file cannot be read, or the text encoder is not the run's.
    """
    asked = bool(config.prompt or config.prompt_file or config.prompt_data)
    if not run.text:
        if asked or config.negative_prompt or config.text_weights:
            raise UserError(f"{run.folder} was trained on labels, not on captions: give --labels instead of prompts.")
        return None
    if not asked:
        raise UserError(
            f"{run.folder} was trained on captions: give prompts, such as --prompt 'a photograph of a cat', "
            "--prompt-file FILE or --prompt-data DATA."
        )
    if "labels" in config.changed and not run.model.num_classes:
        raise UserError(f"{run.folder} was trained on captions, not on labels: leave --labels out.")
    if config.negative_prompt and not config.guidance:
        raise UserError("A negative prompt needs guidance: give --guidance cfg:scale=4 too.")
    # Texts first: an unreadable file is reported before gigabytes of weights are loaded.
    texts = read_prompts(config)
    encoder = load_text_encoder(run.text, weights=config.text_weights or run.text_weights or None, device=device)
    # The network was never trained with another encoder's vectors.
    changed = [key for key, value in encoder.identity.items() if (run.text_identity or {}).get(key) != value]
    if run.text_identity and changed:
        raise UserError(
            f"{run.folder} was trained with other weights of {run.text} (different: {', '.join(changed)}): give the folder of its "
            "weights as --text-weights."
        )
    negative = encoder([config.negative_prompt]) if config.negative_prompt else None
    return Prompts(texts, lambda numbers: encoder([texts[number] for number in numbers]), negative)


def prompts_record(run: LoadedRun) -> dict[str, Any]:
    """The prompts for the record of the samples; empty for a run that reads no text."""
    if run.prompts is None:
        return {}
    checksum = hashlib.sha256(json.dumps(list(run.prompts.texts)).encode()).hexdigest()
    return {"num_prompts": len(run.prompts.texts), "prompts_sha256": checksum}


def read_prompts(config: SampleConfig) -> Sequence[str]:
    """The requested texts, in order."""
    if config.prompt:
        return tuple(map(files.well_formed, config.prompt))
    if config.prompt_file:
        return prompts_in(Path(config.prompt_file))
    data = open_data(config.prompt_data)
    return [next(iter(texts), "") for texts in data.captions(data.originals)]
