"""Configuration of one term of the loss: tap, target, projector, loss and weight. Torch-free."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from repa.alignment import LOSSES, PROJECTORS, SCHEDULES, TARGETS, TIME_WEIGHTS, TOKEN_NORMS
from repa.base.config import Config
from repa.base.errors import UserError
from repa.base.registry import Registry, Spec, parse_spec
from repa.encoders import ENCODERS, canonical

PARTS = ("part", "layer")  # settings of a target that is an encoder: which of its features
PRIVATE = Registry("target or encoder", {})  # a dotted name may be either, so its errors must not name only one


class AlignmentConfig(Config):
    """One term of Eq. 9; a run may have several, each with its own projector and weight."""

    target: str
    """An encoder: dinov2-b, dinov2-b:part=attention,layer=9; or ema:depth=20, block:depth=16, run:path=RUN,depth=16, latent, text, none."""

    depth: int = Field(ge=1)
    """Block whose output is aligned, counted from 1 (the paper: 8 for the sizes L and XL; 4 for B)."""

    tap: Literal["hidden", "attention"] = "hidden"
    """The aligned part of the block: its output tokens (hidden), or its attention logits."""

    name: str = ""
    """Name of the term in logs and checkpoints; empty: target and depth, such as "dinov2-b@8"."""

    weight: float = Field(default=0.5, ge=0)
    """Lambda of Eq. 9, the weight of this term relative to the denoising loss."""

    schedule: Annotated[str, Spec(SCHEDULES)] = "constant"
    """Multiplier of the weight by step: constant, stop:step=250000, warmup, linear, cosine:steps=400000, exponential, plateau."""

    times: tuple[float, float] = (0.0, 1.0)
    """The term counts only for images whose time lies between these two; t = 0 is data, 1 is noise."""

    time_weight: Annotated[str, Spec(TIME_WEIGHTS)] = "constant"
    """Weight by time: constant; or smaller with more noise: linear, loglinear, cosine, sigmoid:slope=10."""

    loss: Annotated[str, Spec(LOSSES)] = "cosine"
    """Loss between projected tokens and target: cosine, nt_xent:temperature=0.07, ... (`repa list losses`)."""

    projector: Annotated[str, Spec(PROJECTORS)] = "mlp"
    """Map from the tap to the target's width: mlp:width=2048, linear, conv:kernel=3, adapter:masked=0.2, none."""

    projector_of: str = ""
    """Name of an earlier term whose projector this term shares."""

    pool: bool = False
    """Compare the mean of the tap's tokens, one vector per image, with a target of one vector or with the mean of its tokens."""

    token_norm: Annotated[str, Spec(TOKEN_NORMS)] = "none"
    """Normalisation of the target's tokens within an image: none, zscore:alpha=0.6, layernorm."""

    resample: Literal["student", "target"] = "student"
    """Token grid of the comparison, if tap and target have different grids."""

    measure_only: bool = False
    """Train only the projector, on a detached tap: measures the alignment of a baseline without changing it."""

    @property
    def key(self) -> str:
        """Identifier of the term: `name`, or target and tap, as in "dinov2-b@8"."""
        return self.name or f"{self.target}@{self.depth}{'.attention' if self.tap == 'attention' else ''}"

    @property
    def module(self) -> str:
        """The key as a module name, without dots; the projector's keys in a checkpoint start with it."""
        return self.key.replace(".", "_")

    @property
    def encoder(self) -> tuple[str, dict[str, Any]]:
        """The target's encoder and its feature settings, e.g. ("dinov2-b", {"part": "all"}); ("", {}): no encoder."""
        return _encoder_of(self.target)

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        if not value.strip():
            raise UserError(
                "the target is empty: give the name of an encoder or of another target (`repa list targets`)."
            )
        name, _ = parse_spec(value)
        if name in TARGETS.table or _is_private_target(name):
            return TARGETS.check(value)
        ENCODERS.check(_encoder_of(value)[0])
        # Normalised, because features are stored and computed under this spelling.
        return canonical(value)

    @field_validator("times")
    @classmethod
    def _times(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise UserError(f"times must satisfy 0 <= low < high <= 1, but got {value[0]}, {value[1]}.")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        encoder, settings = self.encoder
        part, layer = settings.get("part", "patches"), settings.get("layer")
        if part not in ("patches", "attention", "all"):
            raise UserError(f"part must be patches, attention or all, but the target has part={part!r}.")
        is_block = type(layer) is int and layer >= 1
        if not is_block if part == "attention" else layer is not None:
            raise UserError(
                f"the target {self.target!r} has layer={layer!r}: with part=attention give a block of its encoder, counted from "
                "1, such as layer=9; otherwise leave layer out."
            )
        if encoder and (part == "attention") != (self.tap == "attention"):
            raise UserError(
                f"the target {self.target!r} does not fit the tap {self.tap!r}: use the tap attention with a target that has "
                "part=attention and layer=N, and only with such a target."
            )
        places = part == "all" or parse_spec(self.projector)[0] in ("conv", "adapter")
        if self.pool and (self.tap == "attention" or places):
            raise UserError(
                "pool reduces an image to one vector, which has no attention and no grid: use the tap hidden, the projector mlp and "
                "a target without part=all."
            )
        if parse_spec(self.target)[0] == "text" and not self.pool:
            raise UserError(
                "The target text is one vector per image: set pool to true, which averages the tap's tokens."
            )
        if self.tap == "attention" and self.projector != "none":
            raise UserError(
                f"attention logits have no projector, but got {self.projector!r}: set the projector to none."
            )
        return self

    def idle(self) -> dict[str, str]:
        return {"projector": "with --projector-of, which shares another term's"} if self.projector_of else {}


def _encoder_of(target: str) -> tuple[str, dict[str, Any]]:
    """See `AlignmentConfig.encoder`."""
    name, settings = parse_spec(target)
    if name in TARGETS.table or _is_private_target(name):
        return "", {}
    items = target.partition(":")[2].split(",")
    own = ",".join(item for item in items if item.partition("=")[0].strip() not in PARTS)
    return f"{name}:{own}" if own else name, {key: settings[key] for key in PARTS if key in settings}


def _is_private_target(name: str) -> bool:
    """Whether this dotted name is a target, marked by `is_target = True`. Any other is an encoder."""
    return "." in name and bool(getattr(PRIVATE.load(name), "is_target", False))
