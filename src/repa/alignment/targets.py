"""Targets of a tap: an encoder's features, another block, the averaged network, the clean latents, or none.

A target declares its inputs, so that a step computes only what the terms of a run need.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from repa.alignment import TARGETS
from repa.alignment.config import PARTS, AlignmentConfig
from repa.base.device import at_least_float32
from repa.base.errors import UserError
from repa.base.registry import parse_spec
from repa.encoders.contract import Features
from repa.models.contract import Backbone, Condition, Output, State, Tap, Times
from repa.models.layers import patchify


class Seen(NamedTuple):
    """All inputs that a term may read in a step."""

    output: Output
    """Of the network in training."""
    features: Mapping[str, Features]
    """Encoder -> its features of the clean images, without encoders that no term needs at this step."""
    averaged: Output | None
    """Of the averaged network, without gradient; None when no term asks for it."""
    clean: State
    """What was noised."""
    t: Times
    """Times of the noise, (N,), or two per image."""
    condition: Condition
    """The network's condition: the null condition where it was dropped."""
    given: Condition
    """The condition in the data, without dropout."""
    visible: Mapping[str, Tensor]
    """Term -> (N, T) bool: the tokens that its projector sees, if it masks some."""


class Need(NamedTuple):
    """The features that a target needs from one encoder."""

    encoder: str
    pooled: bool = False
    attention: tuple[int, ...] = ()

    @classmethod
    def of(cls, encoder: str, part: str = "patches", layer: int = 0) -> "Need":
        """The need that the settings of a target express."""
        return cls(encoder, part == "all", (layer,) if layer else ())


def merged_needs(needs: Iterable[Need]) -> tuple[Need, ...]:
    """The needs combined, one per encoder."""
    found: dict[str, Need] = {}
    for need in needs:
        other = found.get(need.encoder, Need(need.encoder))
        layers = tuple(sorted({*other.attention, *need.attention}))
        found[need.encoder] = Need(need.encoder, other.pooled or need.pooled, layers)
    return tuple(found.values())


class Target:
    """No target, for losses of the tap alone, such as `dispersive`. Base class of the other targets.

    Attributes:
        dim: width of the target's tokens; 0 if the projector has no width to match.
        need: the encoder's features that it reads, such as Need("tiny"), or None. Encoders are loaded before the network, so a
            run also reads it from the settings `encoder`, `part` and `layer` of the target's function.
        own: further taps of the same pass.
        averaged: taps of the averaged network.
        run: folder of a run that replaces the averaged network; "": the averaged network.
        scale: guidance scale of that network: null + scale (conditional - null); 1 needs only the conditional pass.
        earlier: largest time difference of the averaged network: its time is t - u * earlier, u ~ U(0, 1).
        cleanest: whether the averaged network sees all tokens at the least noisy time of the image.
        prefix: whether the target has a token for the stream token before the grid.
    """

    dim: int = 0
    need: Need | None = None
    own: tuple[Tap, ...] = ()
    averaged: tuple[Tap, ...] = ()
    run: str = ""
    scale: float = 1.0
    earlier: float = 0.0
    cleanest: bool = False
    prefix: bool = False

    def ready(self, seen: Seen) -> bool:
        """Whether its inputs were computed at this step."""
        return (self.need is None or self.need.encoder in seen.features) and not (self.averaged and not seen.averaged)

    def __call__(self, seen: Seen) -> Tensor | None:
        """(N, M, F) tokens or (N, h, M, M) attention logits, without gradient."""
        return None


class EncoderTarget(Target):
    """Features of a frozen encoder: `part` patches, attention (logits of block `layer`) or all ([pooled; patches])."""

    def __init__(self, encoder: str, dim: int, part: str = "patches", layer: int = 0):
        self.encoder, self.part, self.layer = encoder, part, layer
        self.dim, self.prefix = dim, part == "all"
        self.need = Need.of(encoder, part, layer)
        # Logits have the shape of the tap's and no projector, so no width is needed.
        if part == "attention":
            self.dim = 0

    def __call__(self, seen: Seen) -> Tensor:
        return self.of(seen.features[self.encoder])

    def of(self, features: Features) -> Tensor:
        """The compared part of an encoder's features."""
        if self.part == "attention":
            assert features.attention is not None  # asked for by `need`
            return features.attention[self.layer]
        if self.part == "all":
            if features.pooled is None:
                raise UserError(
                    f"The encoder {self.encoder} has no pooled vector, which part=all needs: use part=patches."
                )
            # Stored features are float16, which CPU autocast cannot concatenate.
            return torch.cat(
                [at_least_float32(features.pooled)[:, None], at_least_float32(features.patches)], dim=1
            )  # (N, 1 + M, F)
        return features.patches


class OwnTarget(Target):
    """A tap of the same pass, without gradient."""

    def __init__(self, tap: Tap, model: Backbone):
        self.tap, self.dim, self.own = tap, model.hidden_dim, (tap,)
        self.skip = model.prefix_tokens if tap.kind == "hidden" else 0

    def __call__(self, seen: Seen) -> Tensor:
        return seen.output.taps[self.tap][:, self.skip :].detach()


class AveragedTarget(Target):
    """A tap of the averaged network, which sees the same images with less noise."""

    def __init__(self, tap: Tap, model: Backbone, earlier: float, cleanest: bool):
        self.tap, self.dim, self.averaged = tap, model.hidden_dim, (tap,)
        self.earlier, self.cleanest = earlier, cleanest
        self.skip = model.prefix_tokens if tap.kind == "hidden" else 0

    def __call__(self, seen: Seen) -> Tensor:
        assert seen.averaged is not None  # see `ready`
        return seen.averaged.taps[self.tap][:, self.skip :]


class LatentTarget(Target):
    """The clean latents, cut into the network's patches: (N, T, p * p * C)."""

    def __init__(self, patch: tuple[int, int], dim: int):
        self.patch, self.dim = patch, dim

    def __call__(self, seen: Seen) -> Tensor:
        return patchify(seen.clean["x"], self.patch)


class TextTarget(Target):
    """The mean of the tokens of an image's caption, one vector per image: (N, 1, E)."""

    def __init__(self, width: int):
        self.dim = width

    def __call__(self, seen: Seen) -> Tensor:
        if seen.given.text is None:
            raise UserError(
                "A term has the target text, but the data has no caption tokens: prepare the data with `repa prepare --text`."
            )
        tokens = at_least_float32(seen.given.text)  # (N, S, E)
        if seen.given.text_mask is None:
            return tokens.mean(1, keepdim=True)
        # Padding is zero, so the mean is over the real tokens only; an empty caption has none.
        there = seen.given.text_mask[..., None].to(tokens.dtype)  # (N, S, 1)
        return (tokens * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)


def text(model: Backbone, tap: Tap, *, width: PositiveInt | None = None) -> Target:
    """The mean of the caption's stored tokens (REED, arXiv 2507.08980); needs `pool`, so that both sides are one vector.

    Args:
        width: E of the stored tokens; a run fills it in from its data.
    """
    if width is None:
        raise UserError(
            "The target text needs the width of the tokens, which a run reads from its data: use text:width=768."
        )
    return TextTarget(width)


def block(model: Backbone, tap: Tap, *, depth: PositiveInt) -> Target:
    """Another block of the same pass (LayerSync, arXiv 2510.12581)."""
    return OwnTarget(model.checked(Tap(depth, tap.kind)), model)


def ema(
    model: Backbone, tap: Tap, *, depth: PositiveInt, earlier: Annotated[float, Field(ge=0, le=1)] = 0.0, cleanest: bool = False
) -> Target:  # fmt: skip
    """A block of the averaged network at a less noisy time (SRA, arXiv 2505.02831: earlier=0.2; Self-Flow: cleanest)."""
    return AveragedTarget(model.checked(Tap(depth, tap.kind)), model, float(earlier), cleanest)


def run(
    model: Backbone, tap: Tap, *, path: str, depth: PositiveInt, step: int = -1, scale: NonNegativeFloat = 30.0
) -> Target:
    """Guided features of a frozen run (Self-Transcendence, arXiv 2601.07773, second stage).

    The run's averaged network, frozen, sees the same images, noise and times with their labels and without; the target is
    null + scale (conditional - null) at a block. It has the width and depth of the network in training.

    Args:
        path: run folder.
        step: step of its checkpoint; -1: the newest, whose step is then recorded in the configuration.
    """
    # It replaces the averaged network: a run reads the output of at most one other network.
    target = AveragedTarget(model.checked(Tap(depth, tap.kind)), model, 0.0, False)
    target.run, target.scale = str(path), float(scale)
    return target


def latent(model: Backbone, tap: Tap) -> Target:
    """The clean latents themselves (VAE-REPA, arXiv 2601.17830)."""
    channels, height, width = model.state_shapes["x"]
    patch = height // model.grid[0], width // model.grid[1]
    return LatentTarget(patch, patch[0] * patch[1] * channels)


def features(model: Backbone, tap: Tap) -> Target:
    """Features that your own loop passes to `Alignment.compare`; not a target of `repa train`."""
    raise UserError(
        "The target 'features' is only for Alignment.compare in your own loop: give a run the name of an encoder."
    )


def none(model: Backbone, tap: Tap) -> Target:
    """No target: the loss depends on the tap alone."""
    return Target()


def needs_of(alignments: Iterable[AlignmentConfig]) -> tuple[Need, ...]:
    """The encoder features that the terms need, known before the network is built."""
    return merged_needs(Need.of(encoder, **settings) for encoder, settings in map(_read_by, alignments) if encoder)


def _read_by(config: AlignmentConfig) -> tuple[str, dict[str, Any]]:
    """The encoder features of a term; a private target declares them by its settings `encoder`, `part` and `layer`."""
    if config.encoder[0] or parse_spec(config.target)[0] in TARGETS:
        return config.encoder
    known = inspect.signature(TARGETS.build(config.target)).parameters  # with the settings of the spec as defaults
    settings = {key: known[key].default for key in ("encoder", *PARTS) if key in known}
    return settings.pop("encoder", ""), settings


def build_target(config: AlignmentConfig, model: Backbone, dims: Mapping[str, int]) -> Target:
    """The target that a term names; `dims`: encoder -> width of its patches."""
    encoder, settings = config.encoder
    if encoder:
        return EncoderTarget(encoder, dims[encoder], **settings)
    target = TARGETS.build(config.target)(model, Tap(config.depth, config.tap))
    return TARGETS.instance(config.target, target, Target)
