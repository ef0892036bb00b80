"""Inputs of sampling besides the noise: classes or texts, a guide image, the evaluations that share a DDT's encoder.

A guide image is for representation guidance: samples whose aligned hidden states resemble its features (REPA-G, arXiv
2602.03753). Shared evaluations reuse the last output of the encoder (arXiv 2504.05741).
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from repa.alignment import Alignment, AlignmentConfig, ProjectorContext
from repa.alignment.targets import EncoderTarget
from repa.base import dist, files
from repa.base.errors import UserError, listed, nearest
from repa.base.images import adm_centre_crop, open_image, to_tensor
from repa.base.registry import parse_spec
from repa.base.rng import SampleStreams
from repa.conditions import load_text_encoder
from repa.conditions.loading import prompts_in
from repa.data import open_data
from repa.encoders.loading import by_encoder, load_encoder
from repa.models import DDT, Condition, Output
from repa.runs import LoadedRun, layout
from repa.runs.checkpoint import load_projectors
from repa.runs.loading import Prompts
from repa.runs.predictions import Guide, Sharing
from repa.sampling.config import SampleConfig

DRAWN = ("uniform", "balanced")
NUMBER = re.compile(r"#?[0-9]{1,9}")
PROBES = 4  # images that are sampled to choose the evaluations


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


def guide_of(run: LoadedRun, config: SampleConfig, device: torch.device | str) -> Guide:
    """The alignment term that `--guidance representation` names, its trained projector, and the features of `--guide-image`.

    Raises:
        UserError: the run has no folder, no such term or no projector for it, or the image cannot be read.
    """
    if run.folder is None:
        raise UserError("The guidance representation needs a run folder, which holds the projectors.")
    term = _term(
        run.folder, next(settings for name, settings in map(parse_spec, config.guidance) if name == "representation")
    )
    encoder_name, _ = term.encoder
    recorded = by_encoder(layout.read_config(run.folder).get("feature_weights", {}))
    weights = config.guide_weights or recorded.get(encoder_name)
    encoder = load_encoder(encoder_name, weights=weights or None, device=device)
    # Cropped like training images: the features must have the same framing as the targets.
    path = Path(config.guide_image)
    side = run.latent_shape[1] * run.autoencoder.factor
    image = to_tensor(adm_centre_crop(open_image(path), side))[None].to(device)  # (1, 3, H, W)
    with torch.no_grad():
        features = encoder(image, run.model.grid[0])
    alignment = Alignment.of(term, run.model, {encoder_name: features.patches.shape[-1]})
    prefix = f"{(term.projector_of or term.key).replace('.', '_')}."  # as `AlignmentConfig.module`
    stored = load_projectors(run.folder, run.step).items()
    state = {name.removeprefix(prefix): tensor for name, tensor in stored if name.startswith(prefix)}
    try:
        alignment.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            f"{run.folder} has no projector of the alignment {term.key!r} at step {run.step}: choose another run."
        ) from None
    alignment = alignment.to(device).eval().requires_grad_(False)
    assert isinstance(alignment.target, EncoderTarget)  # see `_term`
    target = alignment.target.of(features)  # (1, M, F)

    def loss(output: Output, t: Tensor, condition: Condition) -> Tensor:
        student = output.taps[alignment.tap]  # (N, P + T, D)
        if not alignment.target.prefix:
            student = student[:, alignment.prefix_tokens :]  # (N, T, D)
        same = target.expand(len(student), -1, -1)  # (N, M, F), the same image for all samples
        return alignment.compare(student, same, context=ProjectorContext(t, condition))  # (N,)

    return Guide((alignment.tap,), loss, files.sha256(path))


def _term(folder: Path, settings: dict[str, object]) -> AlignmentConfig:
    """The term named `term`, or the only one, among terms that compare tokens with an encoder."""
    given, where = layout.read_config(folder).get("alignments", ()), str(folder / layout.CONFIG)
    parsed = [AlignmentConfig.parse(values, where=where) for values in given]
    terms = {term.key: term for term in parsed if term.encoder[0] and term.tap == "hidden"}
    asked = str(settings.get("term", ""))
    if asked in terms or (not asked and len(terms) == 1):
        return terms[asked] if asked else next(iter(terms.values()))
    has = f"it has {', '.join(terms)}" if terms else "it has none"
    raise UserError(
        f"The guidance representation needs exactly one alignment of {folder} to an encoder, but {has}: choose one with term=NAME, or "
        "choose a run that was trained with one."
    )


def shared_evaluations(errors: np.ndarray, count: int) -> list[int]:
    """The `count` evaluations, including 0, that minimise the sum of errors if each output is reused until the next one.

    Args:
        errors: (K, K) error at evaluation j of reusing the output of evaluation i <= j.

    By dynamic programming: best[c, j] is the lowest error of the first j evaluations with c encoder runs.
    """
    num = len(errors)
    # Infinite for j <= i: an output serves at least its own evaluation, so these combinations are never chosen.
    serves = np.full((num + 1, num + 1), np.inf)  # [i, j]: the output of i is used for i ... j - 1
    for i in range(num):
        serves[i, i + 1 :] = np.cumsum(errors[i, i:])
    best, before = serves[0], []
    for _ in range(count - 1):
        costs = best[:, None] + serves  # the last one is i, and those before it end there
        before.append(costs.argmin(0))
        best = costs.min(0)
    # Backtrack from the end.
    chosen, end = [], num
    for places in reversed(before):
        end = int(places[end])
        chosen.append(end)
    return sorted({0, *chosen})


def differences(features: list[Tensor]) -> np.ndarray:
    """(K, K) one minus the cosine of the encoder's tokens (N, T, D) at two evaluations, over all of them."""
    num, tokens, _ = features[0].shape
    cosines = torch.zeros(len(features), len(features), dtype=torch.float64, device=features[0].device)
    # one image at a time, in float64: neighbouring evaluations differ in the last digits of float32
    for n in range(num):
        units = torch.stack([F.normalize(each[n].double(), dim=-1).flatten() for each in features])  # (K, T D)
        cosines = cosines + units @ units.T / (num * tokens)
    return (1 - cosines).cpu().numpy()


def with_shared_encoder(run: LoadedRun, config: SampleConfig, draw: Callable[..., object]) -> LoadedRun:
    """The run with the chosen evaluations of its encoder, from sampling a few images with the encoder at every evaluation.

    Args:
        draw: the function of `sampling/samples.py`.

    Raises:
        UserError: the network is not a DDT, or the sampler or the guidance is not supported.
    """
    if not isinstance(run.model, DDT):
        raise UserError(
            f"encoder_steps shares the encoder of a DDT, but {run.folder or 'this run'} has a {type(run.model).__name__}: leave it out."
        )
    names = {parse_spec(spec)[0] for spec in config.guidance}
    if parse_spec(config.sampler)[0] == "dopri5" or "internal" in names:
        head, steps = "internal guidance, whose head is in the encoder", "dopri5, whose steps are not known in advance"
        raise UserError(
            f"encoder_steps does not work with {head if 'internal' in names else steps}: leave one of them out."
        )
    recording = Sharing()  # records the encoder's tokens of every evaluation
    draw(replace(run, sharing=recording), config, range(PROBES))
    errors = differences(recording.self_conditions)
    if config.encoder_steps > len(errors):
        raise UserError(
            f"encoder_steps is {config.encoder_steps}, but the sampler makes only {len(errors)} evaluations: choose fewer."
        )
    chosen = shared_evaluations(errors, config.encoder_steps)
    chosen = dist.gather_objects(chosen)[0]  # of rank 0, because the last digits may differ between processes
    return replace(run, sharing=Sharing(frozenset(chosen)))
