"""A trained network back from its run folder alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.autoencoders import AUTOENCODERS, load_autoencoder
from repa.autoencoders.contract import Autoencoder, require_same_autoencoder
from repa.base.errors import UserError, printable
from repa.base.files import read_object
from repa.base.precision import Float32Default
from repa.base.registry import parse_spec
from repa.base.trust import contents_of
from repa.conditions import TEXT_ENCODERS, Text
from repa.diffusion import GUIDANCES, Denoiser, Interpolant, Layout, Process, build_process, guided
from repa.diffusion.config import DiffusionConfig, check_trained
from repa.models import Backbone, Condition, build
from repa.models.config import ModelConfig
from repa.runs import layout
from repa.runs.checkpoint import load_weights, recorded_settings, weights_checksum
from repa.runs.predictions import Guide, Predictions, Sharing

OWN = ("dit", "ddt", "jit", "mmdit")  # backbones whose sizes the configuration tells
NEEDED = ("model", "diffusion", "autoencoder", "autoencoder_weights")  # of the configuration


@dataclass(frozen=True)
class Prompts:
    """Texts in turn: image i is of text i modulo their number.

    Args:
        texts: P of them.
        encode: their tokens, by their numbers 0 ... P - 1.
        negative: tokens (1, S, E) of what guidance walks away from; None: the empty text.
    """

    texts: Sequence[str]
    encode: Callable[[Sequence[int]], Text]
    negative: Text | None = None

    def of(self, indices: Sequence[int]) -> Text:
        """Tokens (N, S, E) of the texts of N images."""
        return self.encode([int(index) % len(self.texts) for index in indices])

    def texts_of(self, indices: Sequence[int]) -> list[str]:
        """The texts themselves."""
        return [self.texts[int(index) % len(self.texts)] for index in indices]


@dataclass(frozen=True)
class LoadedRun:
    """What sampling and analysis need: the network, how it was trained to predict, and the way back to pixels."""

    model: Backbone
    diffusion: DiffusionConfig
    autoencoder: Autoencoder
    step: int
    weights: str  # "ema" or "model"
    class_names: tuple[str, ...] = ()
    folder: Path | None = None
    label_dropout: float | None = None  # that it was trained with; None: not known
    class_counts: tuple[int, ...] = ()  # training images of each class; (): not known
    weak: "LoadedRun | None" = None  # a weaker run, for autoguidance
    guide: Guide | None = None  # a loss, for representation guidance
    sharing: Sharing | None = None  # when the encoder of a DDT runs; None: always
    text: str = ""  # text encoder of the captions that it was trained on
    text_weights: str = ""  # where its weights lay then
    text_identity: dict[str, Any] | None = None  # its name and checksums
    prompts: Prompts | None = None  # what samples shall be of

    @cached_property
    def process(self) -> Process:
        """Path, prediction, and what the network is given for t."""
        return build_process(self.diffusion)

    @cached_property
    def trained_classes(self) -> tuple[int, ...]:
        """Classes that have training images, which alone are drawn; all where nothing is known."""
        known = tuple(label for label, count in enumerate(self.class_counts) if count)
        return known or tuple(range(self.model.num_classes))

    @cached_property
    def weights_sha256(self) -> str | None:
        """Checksum of the file that the network was read from; None of one that is in memory only."""
        return None if self.folder is None else weights_checksum(self.folder, self.weights, self.step)

    @property
    def path(self) -> Interpolant:
        return self.process.path

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.model.state_shapes["x"]
        return channels, height, width

    @property
    def identity(self) -> dict[str, Any]:
        """Which weights samples are made by, for their record."""
        own = {
            "run": str(self.folder),
            "step": self.step,
            "weights": self.weights,
            "weights_sha256": self.weights_sha256,
        }
        weak = {} if self.weak is None else {"weak_step": self.weak.step, "weak_sha256": self.weak.weights_sha256}
        shared = {} if self.sharing is None else {"encoder_evaluations": self.sharing.chosen}
        return own | weak | shared | ({} if self.guide is None else {"guide_image_sha256": self.guide.sha256})

    @cached_property
    def layout(self) -> Layout:
        """Of what a sampler integrates: the latents, and the streams."""
        return Layout(self.model.state_shapes)

    def denoiser(
        self,
        labels: Tensor,
        guidances: Sequence[str] = (),
        *,
        text: Text | None = None,
        negative: Text | None = None,
        most: int | None = None,
    ) -> Denoiser:
        """The denoiser of states as `layout` packs them, for given labels (N,), with guidances (specs of GUIDANCES) closed over.

        Args:
            text: tokens of N texts, for a network that reads text.
            negative: those of one text (1, S, E), which stands for "no text" in guidance.
            most: rows that a pass of the network takes; None: any number.

        Raises:
            UserError: guidance by a null class that never trained, or by a weaker run of another kind.
        """
        check_trained(guidances, self.label_dropout, getattr(self.model.route, "path_drop", None))
        if self.process.prediction != "velocity" and any(parse_spec(spec)[0] == "representation" for spec in guidances):
            raise UserError(
                f"The guidance representation moves a velocity, but this network predicts {self.process.prediction}: leave it out."
            )
        null = negative and _condition(labels, negative)
        predictions = replace(self.predictions(_condition(labels, text), null), most=most)
        fn = guided(predictions, [GUIDANCES.build(spec) for spec in guidances], self.layout)
        process = self.process
        return Denoiser(fn, process.path, process.prediction, sigma_min=process.sigma_min, shift=process.shift)

    def predictions(self, condition: Condition, null: Condition | None = None) -> Predictions:
        """The network's predictions by name, for N samples of a condition; `null` in place of the network's own "none"."""
        weak = None if self.weak is None else self.weak.predictions(condition)
        condition = self.model.completed(condition)
        # A fresh one for each sampling: what the encoder found for one batch is of no use to the next.
        sharing = None if self.sharing is None else self.sharing.fresh()
        return Predictions(
            self.model, self.process.network_time, condition, self.layout, weak, self.guide, null, sharing
        )

    def with_weak(self, weak: "LoadedRun") -> "LoadedRun":
        """This run, guided by a weaker one; raises UserError unless both predict the same of the same state."""
        for what in ("path", "prediction", "objective"):
            if (own := getattr(self.diffusion, what)) != (other := getattr(weak.diffusion, what)):
                raise UserError(
                    f"The weaker run {weak.folder} has the {what} {other!r}, but {self.folder} has {own!r}: autoguidance needs the same."
                )
        if self.text_identity != weak.text_identity:
            raise UserError(
                f"The weaker run {weak.folder} reads texts of another encoder than {self.folder}: autoguidance needs the same."
            )
        if self.layout.shapes != weak.layout.shapes or self.model.num_classes != weak.model.num_classes:
            raise UserError(
                f"The weaker run {weak.folder} has other latents, streams or classes than {self.folder}: autoguidance needs the same."
            )
        return replace(self, weak=weak)


@Float32Default()
def load_run(
    path: str | Path,
    weights: str = "ema",
    *,
    step: int | None = None,
    autoencoder_weights: str = "",
    autoencoder: Autoencoder | None = None,
    device: torch.device | str = "cpu",
) -> LoadedRun:
    """Load a run for inference: nothing but the folder is needed (and the autoencoder's own weights).

    Args:
        path: the run folder.
        weights: "ema" (what the paper reports) or "model" (the raw weights).
        step: which checkpoint; the highest when None.
        autoencoder_weights: where the autoencoder's weights are now; empty: where training found them, otherwise the hub's.
        autoencoder: one that is loaded already; None loads the run's.
    """
    run = Path(path)
    config = layout.read_config(run, NEEDED)
    model_config = ModelConfig.parse(config["model"], where=str(run / layout.CONFIG))
    diffusion = DiffusionConfig.parse(config["diffusion"], where=str(run / layout.CONFIG))
    diffusion.check_model(model_config.name, model_config.learn_sigma)
    step, state = load_weights(run, weights, step)
    model = network_of(run, model_config, step, state)
    data = read_object(run / layout.DATA, class_names=list) if (run / layout.DATA).is_file() else {}
    autoencoder = autoencoder or _autoencoder(run, config, autoencoder_weights, device)
    require_same_autoencoder(data.get("autoencoder"), autoencoder, run)
    layout.require_settings(run, step, recorded_settings(run, step), config)
    names = tuple(printable(str(name)) for name in data.get("class_names", ()))
    return LoadedRun(
        model.to(device).eval().requires_grad_(False), diffusion, autoencoder, step, weights, names, run,
        config.get("label_dropout"), counts_of(run, data, len(names)), **_text(run, config, data),
    )  # fmt: skip


def network_of(run: Path, config: ModelConfig, step: int, state: Mapping[str, Tensor]) -> Backbone:
    """The network that the configuration of a run describes, with weights of a checkpoint; UserError where they do not fit."""
    try:
        _require_size(config, state)
        model = build(config)
        model.load_state_dict(state)
    except (OtherNetwork, RuntimeError):
        raise UserError(
            f"The weights of {layout.checkpoint_folder(run, step)} are of another network than {run / layout.CONFIG} "
            "describes: restore the configuration that the run was trained with."
        ) from None
    return model


class OtherNetwork(Exception):
    """A configuration is of a network that the weights cannot be of."""


def _require_size(config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Raises OtherNetwork, before memory is taken, for a network of no size, or larger than its weights can be.

    Loose bounds of our own networks: each has a tensor for each block, a number for each token, class and channel, and a
    product of its width with itself.
    """
    if parse_spec(config.backbone)[0] not in OWN:
        return
    numbers, dims = sum(x.numel() for x in state.values()), config.dims()
    tokens = (config.latent_size // dims.patch_size) ** 2
    largest = max(tokens, config.num_classes, config.latent_channels, dims.hidden_dim**2)
    if min(config.latent_size, config.latent_channels) < 1:  # left to the data, which a run of ours has filled in
        raise OtherNetwork
    if largest > numbers or max(dims.depth, len(config.heads), len(config.streams)) > len(state):
        raise OtherNetwork


def _condition(labels: Tensor, text: Text | None) -> Condition:
    """Of N samples; one text is that of all."""
    if text is None:
        return Condition(labels)
    return Condition(labels, *text.map(lambda x: x.expand(len(labels), *x.shape[1:])))


def _text(run: Path, config: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The text encoder that a run was trained with, from its configuration and the record of its data."""
    spec, weights, identity = config.get("text", ""), config.get("text_weights", ""), data.get("text")
    if not isinstance(identity, dict | None):
        raise UserError(f"{run / layout.DATA} is damaged: its text is not what `repa train` wrote.")
    if spec:
        with contents_of(run / layout.CONFIG):
            TEXT_ENCODERS.check(spec)
    return {"text": spec, "text_weights": weights if Path(weights).exists() else "", "text_identity": identity}


def counts_of(run: Path, data: dict[str, Any], num_classes: int) -> tuple[int, ...]:
    """Training images of each class, without flipped copies; () where data.json does not say."""
    counts = data.get("class_counts", [])
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise UserError(f"{run / layout.DATA}: class_counts must be a list of numbers of images.")
    if counts and not (len(counts) == num_classes and any(counts)):
        raise UserError(
            f"{run / layout.DATA}: class_counts must hold images of the {num_classes} classes of class_names."
        )
    return tuple(counts)


def _autoencoder(run: Path, config: dict[str, Any], given: str, device: torch.device | str) -> Autoencoder:
    """By the weights that are given, else those that the run was trained with, else the hub's."""
    spec, recorded = config["autoencoder"], config["autoencoder_weights"]
    with contents_of(run / layout.CONFIG):
        AUTOENCODERS.check(spec)
    # A relative path may be meant from another folder; an absolute one that is gone was moved, which a refusal must say.
    moved = bool(recorded) and Path(recorded).is_absolute() and not Path(recorded).exists()
    try:
        return load_autoencoder(spec, weights=given or ("" if moved else recorded) or None, device=device)
    except UserError as error:
        if not moved or given:
            raise
        raise UserError(
            f"The weights of the autoencoder {spec!r} that {run} was trained with are no longer in {recorded}: give their folder "
            "as --autoencoder-weights FOLDER."
        ) from error
