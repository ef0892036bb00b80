"""Resolve a configuration with the data and the machine; report every mismatch before slow work."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from repa.base import dist, files, launch
from repa.base.config import difference, option
from repa.base.device import resolved
from repa.base.errors import UserError
from repa.base.registry import parse_spec
from repa.data import DataSet, dataset
from repa.diffusion import DDPM_SAMPLERS, ImprovedDDPM
from repa.models.cost import model_cost
from repa.runs import layout
from repa.training.config import TrainConfig
from repa.training.inputs import encoder_needs, text_encoder_of
from repa.training.parallel import mesh_sides
from repa.training.scaling import faster


def strategy(config: TrainConfig, device: torch.device) -> str:
    """Resolve parallel "auto": on several GPUs the strategy with the faster prediction, elsewhere ddp; other values stay.

    The configuration must be complete.
    """
    if config.parallel != "auto":
        return config.parallel
    if device.type != "cuda" or not dist.active() or config.optimizer.name == "muon":
        return "ddp"
    # Every process computes the same result from the same configuration, without communication.
    cost = model_cost(config.model, token_times=config.diffusion.token_times > 0)
    sides = (1, *mesh_sides(dist.world(), launch.place(strict=False).local_world))[-2:]
    return faster(cost.parameters, cost.training, config.batch_size / dist.world(), *sides)


class FirstChoices(NamedTuple):
    """Choices that depend on the machine or on other runs, as made at the start of the run; now they could differ."""

    precision: str
    """What "auto" stands for."""
    targets: dict[str, str]
    """Of a run in training, without its step -> with it."""

    def applied(self, config: TrainConfig) -> TrainConfig:
        """A configuration with its open choices filled in."""
        alignments = [term.override(target=self.targets.get(term.target, term.target)) for term in config.alignments]
        precision = self.precision if config.precision == "auto" else config.precision
        return config.override(precision=precision, alignments=alignments)


def first_choices(config: TrainConfig, run: Path, device: torch.device) -> FirstChoices:
    """Determined by the main process for all, because "auto" times a CPU."""
    if not (path := run / layout.CONFIG).is_file():
        return FirstChoices(resolved(config.precision, device), {})
    before = TrainConfig.load(path)
    pinned = {term.target.rpartition(",step=")[0]: term.target for term in before.alignments}
    return FirstChoices(before.precision, pinned)


def resolve(config: TrainConfig, data: DataSet, device: torch.device) -> TrainConfig:
    """Fill in what is left to the data (latent size, channels, classes, autoencoder) and to the machine (precision)."""
    facts = {"latent_size": data.latent_size, "latent_channels": data.latent_channels, "num_classes": data.num_classes}
    for name, value in facts.items():
        asked = getattr(config.model, name)
        if asked and asked != value:
            raise UserError(
                f"{option(f'model.{name}')} is {asked}, but the data in {data.folder} has {value}: give the data of the run to "
                "continue it; for a new run leave the option out, or prepare other data."
            )
    if config.autoencoder and config.autoencoder != data.autoencoder:
        raise UserError(
            f"--autoencoder is {config.autoencoder!r}, but the data in {data.folder} was prepared with {data.autoencoder!r}: "
            f"leave it out, or run `repa prepare` with --autoencoder {config.autoencoder}."
        )
    sampler, _ = parse_spec(config.preview.sampler)
    # An invalid number of steps is reported now, not by the first preview hours later.
    if (config.preview.every or config.preview.scored_every) and sampler in DDPM_SAMPLERS:
        ImprovedDDPM().respaced(config.preview.num_steps, integer_stride=sampler == "ddim")
    alignments = [term.override(target=_with_step(term.target)) for term in config.alignments]
    encoders = [*(need.encoder for need in encoder_needs(config)), config.preview.features]
    for name in config.feature_weights:
        if name not in encoders:
            raise UserError(
                f"--feature-weights names {name!r}, but this run uses {', '.join(dict.fromkeys(encoders))}: leave it out, or name one "
                "of these."
            )
    return config.override(
        model=config.model.override(**facts),
        diffusion=config.diffusion.for_latents((data.latent_channels, data.latent_size, data.latent_size)),
        alignments=alignments,
        autoencoder=data.autoencoder,
        autoencoder_weights=dataset.autoencoder_weights(data, config.autoencoder_weights),
        feature_weights=dataset.feature_weights(data, config.feature_weights, encoders),
        **_text_settings(config, data),
        precision=resolved(config.precision, device),
        num_steps=steps_of_epochs(config, len(data)),
    )


def steps_of_epochs(config: TrainConfig, num_images: int) -> int:
    """Number of steps of `epochs` passes over the data, if smaller than num_steps."""
    passes = math.ceil(config.epochs * num_images / config.batch_size)
    return min(config.num_steps, max(1, passes)) if config.epochs else config.num_steps


def _text_settings(config: TrainConfig, data: DataSet) -> dict[str, str]:
    """The text encoder, and where its weights lay when the data was prepared by it."""
    text = text_encoder_of(config, data)
    of_data = data.manifest.config
    known = of_data.text_weights if data.text and of_data.text == text and Path(of_data.text_weights).exists() else ""
    return {"text": text, "text_weights": config.text_weights or known}


def _with_step(target: str) -> str:
    """A target "run:path=..." with the current step of its newest checkpoint, so that a resumed run uses the same network."""
    name, settings = parse_spec(target)
    if name != "run" or settings.get("step", -1) >= 0:
        return target
    run = Path(str(settings["path"])) if "path" in settings else None
    steps = layout.checkpoint_steps(run) if run else []
    if not steps:
        raise UserError(
            f"The target {target!r} needs the folder of a trained run, written run:path=RUN,depth=BLOCK: give one that has a checkpoint."
        )
    return f"{target},step={max(steps)}"


def with_streams(config: TrainConfig, dims: Mapping[str, int]) -> TrainConfig:
    """Fill in the widths of the network's streams; `dims`: encoder -> width of its features."""
    streams = tuple((stream.name, dims[stream.source]) for stream in config.streams)
    return config.override(model=config.model.override(streams=streams))


def claim_folder(run: Path, config: TrainConfig, data: DataSet, text: dict[str, Any] | None = None) -> None:
    """Write config.yaml and data.json into a new run folder; refuse one that holds another run or other data.

    Only what `layout.CHANGEABLE` names may differ between continuations. `text` is the identity of the text encoder, where there is one.
    """
    path = run / layout.CONFIG
    files.refuse_links(run)
    if files.well_formed(str(run)) != str(run):
        raise UserError(f"--out is {run}, but TensorBoard needs a name in UTF-8: choose another name.")
    if path.is_file() and (lines := _changed_settings(run, config)):
        raise UserError(
            f"{run} holds a run with another configuration ({'; '.join(lines)}): to continue it with its settings run "
            f"`repa train {run} --data {data.folder} --out {run}`. For a new run from its weights with these settings, "
            f"give --init {run} and another --out."
        )
    layout.require_run_or_empty(run)
    summary = data.summary() | ({"text": text} if text else {})
    if path.is_file() and (before_data := files.read_object(run / layout.DATA)) != summary:
        changed = sorted(key for key in {*before_data, *summary} if before_data.get(key) != summary.get(key))
        raise UserError(
            f"{run} was trained on other data than {data.folder} (different: {', '.join(changed)}): "
            "choose another --out, or give its original data."
        )
    # data.json first: a kill in between leaves a folder without a configuration, which is not a run yet (see `require_run_or_empty`).
    files.write_sealed(run / layout.DATA, summary)
    files.write_text(path, config.to_yaml())


def _changed_settings(run: Path, config: TrainConfig) -> list[str]:
    """Differences from the run's configuration in settings that must not change."""
    before = TrainConfig.load(run / layout.CONFIG)
    same = config.override(**{name: before.model_dump()[name] for name in layout.CHANGEABLE})
    return difference(before, same)


def is_finished(config: TrainConfig, data: DataSet, run: Path, device: torch.device) -> bool:
    """Whether the run in this folder has all requested steps, from small files without building its network.

    Also False if the folder has another configuration or other data, which `claim_folder` reports.
    """
    if not (run / layout.CONFIG).is_file() or not (steps := layout.checkpoint_steps(run)):
        return False
    config = resolve(first_choices(config, run, device).applied(config), data, device)
    same_data = files.read_object(run / layout.DATA) == data.summary()
    return steps[-1] >= config.num_steps and same_data and not _changed_settings(run, config)


def require_equal_parts(batch_size: int, world: int, accumulate: int) -> None:
    """Raises UserError unless every process can split its share of the batch into equal parts."""
    parts = world * accumulate
    if batch_size % parts:
        raise UserError(
            f"A batch of {batch_size} images cannot be split into {parts} equal parts (processes: {world}, accumulate: "
            f"{accumulate}): choose a --batch-size that is a multiple of {parts}, or another --accumulate."
        )


def require_agreement(run: Path, config: TrainConfig, data: DataSet, step: int) -> None:
    """Require the same step, configuration and data on all processes; otherwise all stop before the first step."""
    mine = {"step": str(step), "configuration": config.to_yaml(), "data": json.dumps(data.summary(), sort_keys=True)}
    of_all = dist.gather_objects({name: hashlib.sha256(text.encode()).hexdigest() for name, text in mine.items()})
    different = [name for name in mine if len({each[name] for each in of_all}) > 1]
    if different:
        # All processes see the difference of the hashes, so all reach this second gather.
        steps = ", ".join(map(str, dist.gather_objects(step)))
        raise dist.SharedError(
            f"The processes differ in {', '.join(different)} (their steps: {steps}): give all of them the same command, and "
            f"a shared run folder; {run} may be another folder on each machine."
        )
