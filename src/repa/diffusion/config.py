"""Settings of the diffusion room. Torch-free."""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from repa.base.config import Config
from repa.base.errors import UserError, choices
from repa.base.registry import Spec, parse_spec
from repa.diffusion import DDPM_SAMPLERS, GUIDANCES, PATHS, PREDICTIONS, SAMPLERS, TIMESTEPS


def check_prediction(prediction: str) -> str:
    """The name, if it is one of PREDICTIONS; otherwise raises UserError."""
    if prediction not in PREDICTIONS:
        raise UserError(f"Unknown prediction {prediction!r}{choices(prediction, PREDICTIONS)}")
    return prediction


def canonical_guidances(specs: tuple[str, ...]) -> tuple[str, ...]:
    """Guidances in canonical form, for comparisons: without defaults and guidances without effect, such as scale 1."""
    kept = []
    for spec in specs:
        name, _ = parse_spec(spec)
        guidance = GUIDANCES.build(spec) if name in GUIDANCES else None
        changes = getattr(guidance, "changes", None)  # None: a private guidance, which has only `needs` and `mix`
        if changes is None:
            kept.append(spec)
        elif changes:
            # Defaults of a dataclass are attributes of its class.
            values = {
                key: value for key, value in vars(guidance).items() if value != getattr(type(guidance), key, None)
            }
            settings = [
                f"{key}={value if isinstance(value, str) else f'{value:.12g}'}" for key, value in values.items()
            ]
            kept.append(f"{name}:{','.join(settings)}")
    return tuple(kept)


Guidances = Annotated[tuple[Annotated[str, Spec(GUIDANCES)], ...], AfterValidator(canonical_guidances)]


def check_trained(guidances: Iterable[str], label_dropout: float | None, path_drop: float | None) -> None:
    """Raises UserError for guidance with an untrained prediction: without a class, or without the routed blocks.

    None: the value of the training run is unknown; or path_drop for a network without a route, which sampling reports later.
    """
    for spec in guidances:
        name = parse_spec(spec)[0]
        if label_dropout == 0 and name in ("cfg", "path_drop"):
            raise UserError(
                f"The guidance {spec} needs a network trained with label dropout, but this one has "
                "label_dropout 0: leave this guidance out, or train with --label-dropout 0.1."
            )
        if path_drop == 0 and name == "path_drop":
            raise UserError(
                f"The guidance {spec} skips the routed blocks, but the network was never trained without them: leave "
                "it out, or train with --model.path-drop 0.1."
            )


def check_shift(shift: float) -> float:
    """The shift, if it is at least 1: a smaller one is usually the inverse, from code with t = 1 at the data."""
    if not 1 <= shift < math.inf:
        inverse = f"; a shift of {shift} written for t = 1 at the data is {1 / shift:.4g} here" if shift > 0 else ""
        raise UserError(
            f"A time shift must be at least 1, which pushes times towards noise (t = 1), but got {shift}{inverse}."
        )
    return shift


def latent_shift(shape: Sequence[int], base: int = 4096) -> float:
    """sqrt(C H W / base): the time shift at which latents (C, H, W) are as corrupted as latents of `base` numbers without a shift
    (arXiv 2403.03206, 2510.11690). RAE's (768, 16, 16): 6.93; SD-VAE's (4, 32, 32): 1; smaller latents: less."""
    return math.sqrt(math.prod(shape) / base)


class DiffusionConfig(Config):
    """The noising process, what the network predicts, and its training times."""

    objective: Literal["flow", "ddpm"] = "flow"
    """flow: SiT's, with the settings below. ddpm: DiT's, with discrete timesteps and a learned variance."""
    path: Annotated[str, Spec(PATHS)] = "linear"
    """Path from data (t = 0) to noise (t = 1): linear, trigonometric or vp[:beta_min=..,beta_max=..]."""
    prediction: Annotated[str, AfterValidator(check_prediction)] = "velocity"
    """What the network predicts: velocity, noise, data or score."""
    timesteps: Annotated[str, Spec(TIMESTEPS)] = "uniform"
    """Distribution of the training times: uniform[:low=..,high=..] or logit_normal[:mean=..,std=..,path=..]."""
    shift: Literal["auto"] | float = 1.0
    """Time shift s, t -> s t / (1 + (s - 1) t), of training times and samplers' grids; auto: sqrt(C H W / 4096), and at least 1."""
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    """Loss weight over t: none (error of the prediction), velocity (error of the implied velocity: SiT, JiT), likelihood (SiT's)."""
    sigma_min: float = Field(0.05, gt=0, lt=1)
    """Lower bound of sigma where the loss and the samplers divide by it, for data prediction with loss_weight velocity (JiT)."""
    contrastive: float = Field(0.0, ge=0)
    """Weight of contrastive flow matching: the velocity is also pushed away from that of another image (arXiv 2506.05350)."""
    contrastive_times: Literal["constant", "linear"] = "constant"
    """Dependence of that weight on time: constant, or linear (multiplied by t, SR-DiT)."""
    velocity_cosine: float = Field(0.0, ge=0)
    """Weight of 1 - cosine over the channels of predicted and true velocity (LightningDiT)."""
    token_times: float = Field(0.0, ge=0, lt=1)
    """Share of an image's tokens at a first time; the others have a second time (SRA, Self-Flow). 0: one time per image."""

    @field_validator("shift")
    @classmethod
    def _shift(cls, value: str | float) -> str | float:
        return value if isinstance(value, str) else check_shift(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.objective == "ddpm":
            for name in type(self).model_fields.keys() - {"objective"}:
                default = type(self).model_fields[name].default
                if getattr(self, name) != default:
                    raise UserError(
                        f"{name} {getattr(self, name)!r} applies only to the objective flow, but the objective is "
                        "ddpm: leave it out, or choose the objective flow."
                    )
        if self.loss_weight != "none":
            self._check_weight()
        for name in ("contrastive", "velocity_cosine"):
            of_data = (self.prediction, self.loss_weight) == ("data", "velocity")  # its division by sigma is bounded
            if getattr(self, name) and self.prediction != "velocity" and not of_data:
                raise UserError(
                    f"{name} compares velocities, which a {self.prediction} prediction does not determine at every t: "
                    "choose the prediction velocity, or data with loss_weight velocity, or leave it out."
                )
        return self

    def _check_weight(self) -> None:
        """Raises UserError if the loss weight has no meaning, or is infinite at an end of the time interval."""
        if (self.prediction, self.loss_weight) == ("data", "velocity"):
            return  # sigma_min bounds it
        if self.prediction not in ("noise", "score"):
            raise UserError(
                f"loss_weight {self.loss_weight!r} weights the errors of noise and score, but prediction is "
                f"{self.prediction!r}: leave it out."
            )
        name, settings = parse_spec(self.timesteps)
        reaches = settings.get("low", 0) == 0 or (settings.get("high", 1) == 1 and parse_spec(self.path)[0] != "vp")
        if name == "uniform" and reaches:
            raise UserError(
                f"loss_weight {self.loss_weight!r} is infinite at the ends of [0, 1]: give timesteps "
                "uniform:low=0.001,high=0.999, as SiT does (on its path vp uniform:low=0.00001)."
            )

    def idle(self) -> dict[str, str]:
        of_data = (self.prediction, self.loss_weight) == ("data", "velocity")
        unread = {} if of_data else {"sigma_min": "without --prediction data and --loss-weight velocity"}
        return unread if self.contrastive else unread | {"contrastive_times": "without --contrastive"}

    def for_latents(self, shape: Sequence[int]) -> Self:
        """A copy with the shift `auto` resolved for latents (C, H, W)."""
        if self.shift != "auto":
            return self
        return self.override(shift=max(1.0, latent_shift(shape)))

    def check_model(self, name: str, learn_sigma: bool) -> None:
        """Raises UserError unless the network predicts a variance (learn_sigma) exactly if the objective trains one."""
        size = name.partition("-")[2]
        if learn_sigma and self.objective == "flow":
            raise UserError(
                f"{name} also predicts a variance, which the objective flow does not train: choose "
                f"--diffusion.objective ddpm, or 'SiT-{size}', the same network without it."
            )
        if not learn_sigma and self.objective == "ddpm":
            with_variance = "" if name.startswith("JiT") else f"'DiT-{size}', the same network with it, or "
            raise UserError(
                f"The objective ddpm also trains a variance, which {name} does not predict: choose {with_variance}"
                "--diffusion.objective flow."
            )

    def check_sampler(self, spec: str) -> str:
        """The spec, if this sampler works with a network of this objective; otherwise raises UserError."""
        name, _ = parse_spec(spec)
        if name in DDPM_SAMPLERS and self.objective != "ddpm":
            others = ", ".join(other for other in SAMPLERS.names() if other not in DDPM_SAMPLERS)
            raise UserError(
                f"The sampler {name} needs a network trained with the objective ddpm, but this network was trained "
                f"with the objective {self.objective}: choose one of {others}."
            )
        return spec
