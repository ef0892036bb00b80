"""Load a trained network from its run folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.autoencoders import AUTOENCODERS, load_autoencoder
from repa.autoencoders.contract import Autoencoder, require_same_autoencoder
from repa.base.device import Float32Default, checked_device
from repa.base.errors import UserError, printable
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

OWN = ("dit", "ddt", "jit", "mmdit")  # backbones whose size follows from the configuration
NEEDED = ("model", "diffusion", "autoencoder", "autoencoder_weights")  # settings that a configuration must have


@dataclass(frozen=True)
class Prompts:
    """Prompts: image i has text i modulo P.

    Args:
        texts: P of them.
        encode: indices 0 ... P - 1 of texts -> their tokens.
        negative: tokens (1, S, E) of the negative prompt for guidance; None: the empty text.
    """

    texts: Sequence[str]
    encode: Callable[[Sequence[int]], Text]
    negative: Text | None = None

    def of(self, indices: Sequence[int]) -> Text:
        """Tokens (N, S, E) of the texts of N images."""
        return self.encode([int(index) % len(self.texts) for index in indices])

    def texts_of(self, indices: Sequence[int]) -> list[str]:
        """The texts of N images."""
        return [self.texts[int(index) % len(self.texts)] for index in indices]


@dataclass(frozen=True)
class LoadedRun:
    """A trained network with what sampling and analysis need: its diffusion process, autoencoder and classes."""

    model: Backbone
    diffusion: DiffusionConfig
    autoencoder: Autoencoder
    step: int
    weights: str  # "ema" or "model"
    class_names: tuple[str, ...] = ()
    folder: Path | None = None
    label_dropout: float | None = None  # of its training; None: unknown
    class_counts: tuple[int, ...] = ()  # number of training images per class; (): unknown
    weak: "LoadedRun | None" = None  # a weaker run, for autoguidance
    guide: Guide | None = None  # the loss of representation guidance
    sharing: Sharing | None = None  # evaluations that run the encoder of a DDT; None: all
    text: str = ""  # text encoder of its training captions
    text_weights: str = ""  # location of its weights during training
    text_identity: dict[str, Any] | None = None  # its name and checksums
    prompts: Prompts | None = None  # prompts of the samples

    @cached_property
    def process(self) -> Process:
        """Path, prediction, and the network's time input for t."""
        return build_process(self.diffusion)

    @cached_property
    def trained_classes(self) -> tuple[int, ...]:
        """Classes with training images, the only ones that are sampled; all classes if the counts are unknown."""
        known = tuple(label for label, count in enumerate(self.class_counts) if count)
        return known or tuple(range(self.model.num_classes))

    @cached_property
    def weights_sha256(self) -> str | None:
        """Checksum of the file of the weights; None if the network was not loaded from a file."""
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
        """Identity of the weights, for the record of samples."""
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
        """Layout of the sampler's state: the latents and the streams."""
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
        """The denoiser of states packed by `layout`, for labels (N,) and guidances (specs of GUIDANCES).

        Args:
            text: tokens of N texts, for a network that reads text.
            negative: tokens of one text (1, S, E), which replaces the empty text in guidance.
            most: largest batch of a forward pass; None: unlimited.

        Raises:
            UserError: guidance with a null class that was not trained, or with an incompatible weaker run.
        """
        check_trained(guidances, self.label_dropout, getattr(self.model.route, "path_drop", None))
        if self.process.prediction != "velocity" and any(parse_spec(spec)[0] == "representation" for spec in guidances):
            raise UserError(
                f"The guidance representation needs a velocity network, but this one predicts {self.process.prediction}: remove it."
            )
        null = negative and _condition(labels, negative)
        predictions = replace(self.predictions(_condition(labels, text), null), most=most)
        fn = guided(predictions, [GUIDANCES.build(spec) for spec in guidances], self.layout)
        process = self.process
        return Denoiser(fn, process.path, process.prediction, sigma_min=process.sigma_min, shift=process.shift)

    def predictions(self, condition: Condition, null: Condition | None = None) -> Predictions:
        """The network's predictions by name, for N samples of a condition; `null` replaces the network's null condition."""
        weak = None if self.weak is None else self.weak.predictions(condition)
        condition = self.model.completed(condition)
        # A fresh cache for each sampling: encoder outputs of one batch are useless for the next.
        sharing = None if self.sharing is None else self.sharing.fresh()
        return Predictions(
            self.model, self.process.network_time, condition, self.layout, weak, self.guide, null, sharing
        )

    def with_weak(self, weak: "LoadedRun") -> "LoadedRun":
        """This run with a weaker run for autoguidance; raises UserError unless both have the same prediction and state."""
        for what in ("path", "prediction", "objective"):
            if (own := getattr(self.diffusion, what)) != (other := getattr(weak.diffusion, what)):
                raise UserError(
                    f"The weaker run {weak.folder} has the {what} {other!r}, but {self.folder} has {own!r}: choose one with the same."
                )
        if self.text_identity != weak.text_identity:
            raise UserError(
                f"The weaker run {weak.folder} has another text encoder than {self.folder}: give --weak a run with the same."
            )
        if self.layout.shapes != weak.layout.shapes or self.model.num_classes != weak.model.num_classes:
            raise UserError(
                f"The weaker run {weak.folder} has other latents, streams or classes than {self.folder}: give --weak a run with the same."
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
    """Load a run for inference from its folder and the autoencoder's weights.

    Args:
        path: the run folder.
        weights: "ema" (as in the paper), "model" (the weights without averaging), or another average by name.
        step: which checkpoint; the highest when None.
        autoencoder_weights: location of the autoencoder's weights; empty: the recorded location, otherwise the hub's.
        autoencoder: a loaded autoencoder; None: load the run's.
    """
    run, device = Path(path), checked_device(device)
    config = layout.read_config(run, NEEDED)
    model_config = ModelConfig.parse(config["model"], where=str(run / layout.CONFIG))
    diffusion = DiffusionConfig.parse(config["diffusion"], where=str(run / layout.CONFIG))
    diffusion.check_model(model_config.name, model_config.learn_sigma)
    step, state = load_weights(run, weights, step)
    model = network_of(run, model_config, step, state)
    data = layout.read_data(run)
    autoencoder = autoencoder or _autoencoder(run, config, autoencoder_weights, device)
    require_same_autoencoder(data.get("autoencoder"), autoencoder, run)
    layout.require_settings(run, step, recorded_settings(run, step), config)
    names = tuple(map(printable, data.get("class_names", ())))
    return LoadedRun(
        model.to(device).eval().requires_grad_(False), diffusion, autoencoder, step, weights, names, run,
        config.get("label_dropout"), tuple(data.get("class_counts", ())), **_text(run, config, data),
    )  # fmt: skip


def network_of(run: Path, config: ModelConfig, step: int, state: Mapping[str, Tensor]) -> Backbone:
    """The network of a run's configuration with the weights of a checkpoint; raises UserError if they do not fit."""
    try:
        _require_size(config, state)
        model = build(config)
        model.load_state_dict(state)
    except (OtherNetwork, RuntimeError):
        raise UserError(
            f"The weights of {layout.checkpoint_folder(run, step)} do not fit the network of {run / layout.CONFIG}: "
            "restore the configuration of the training."
        ) from None
    return model


class OtherNetwork(Exception):
    """The configuration's network cannot have these weights."""


def _require_size(config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Raises OtherNetwork, before allocating memory, for a network without a size or larger than its weights.

    The bounds are loose: each network of this package has a tensor per block, a number per token, class and channel, and a
    matrix of width x width.
    """
    if parse_spec(config.backbone)[0] not in OWN:
        return
    numbers, dims = sum(x.numel() for x in state.values()), config.dims()
    tokens = (config.latent_size // dims.patch_size) ** 2
    largest = max(tokens, config.num_classes, config.latent_channels, dims.hidden_dim**2)
    if min(config.latent_size, config.latent_channels) < 1:  # training replaces 0, "from the data"
        raise OtherNetwork
    if largest > numbers or max(dims.depth, len(config.heads), len(config.streams)) > len(state):
        raise OtherNetwork


def _condition(labels: Tensor, text: Text | None) -> Condition:
    """The condition of N samples; a single text applies to all."""
    if text is None:
        return Condition(labels)
    return Condition(labels, *text.map(lambda x: x.expand(len(labels), *x.shape[1:])))


def _text(run: Path, config: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The text encoder of a run, from its configuration and the record of its data."""
    spec, weights, identity = config.get("text", ""), config.get("text_weights", ""), data.get("text")
    if spec:
        with contents_of(run / layout.CONFIG):
            TEXT_ENCODERS.check(spec)
    return {"text": spec, "text_weights": weights if Path(weights).exists() else "", "text_identity": identity}


def _autoencoder(run: Path, config: dict[str, Any], given: str, device: torch.device | str) -> Autoencoder:
    """The autoencoder with the given weights, else those of the training, else the hub's."""
    spec, recorded = config["autoencoder"], config["autoencoder_weights"]
    with contents_of(run / layout.CONFIG):
        AUTOENCODERS.check(spec)
    # A relative path may refer to another folder; an absolute path that is missing was moved, and the error must say so.
    moved = bool(recorded) and Path(recorded).is_absolute() and not Path(recorded).exists()
    try:
        return load_autoencoder(spec, weights=given or ("" if moved else recorded) or None, device=device)
    except UserError as error:
        if not moved or given:
            raise
        raise UserError(
            f"The weights of the autoencoder {spec!r} of {run} are no longer in {recorded}: give their folder as "
            "--autoencoder-weights FOLDER."
        ) from error
