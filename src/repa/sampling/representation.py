"""Representation guidance: samples whose aligned hidden states resemble the features of one image (REPA-G, arXiv 2602.03753)."""

from pathlib import Path

import torch
from torch import Tensor

from repa.alignment import Alignment, AlignmentConfig, ProjectorContext
from repa.alignment.targets import EncoderTarget
from repa.base import files
from repa.base.errors import UserError
from repa.base.images import adm_centre_crop, open_image, to_tensor
from repa.base.registry import parse_spec
from repa.encoders.loading import by_encoder, load_encoder
from repa.models import Condition, Output
from repa.runs import LoadedRun, layout
from repa.runs.checkpoint import load_projectors
from repa.runs.predictions import Guide
from repa.sampling.config import SampleConfig


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
