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
    """The name itself when it is one of PREDICTIONS, otherwise UserError."""
    if prediction not in PREDICTIONS:
        raise UserError(f"Unknown prediction {prediction!r}{choices(prediction, PREDICTIONS)}")
    return prediction


def canonical_guidances(specs: tuple[str, ...]) -> tuple[str, ...]:
    """Guidances in one way of writing, so that records compare: defaults left out, and those that change nothing, as of scale 1."""
    found = []
    for spec in specs:
        name, _ = parse_spec(spec)
        guidance = GUIDANCES.build(spec) if name in GUIDANCES else None
        changes = getattr(guidance, "changes", None)  # None: written by others, who promise `needs` and `mix` alone
        if changes is None:
            found.append(spec)
        elif changes:
            # Defaults of a dataclass are attributes of its class.
            values = {
                key: value for key, value in vars(guidance).items() if value != getattr(type(guidance), key, None)
            }
            told = [f"{key}={value if isinstance(value, str) else f'{value:.12g}'}" for key, value in values.items()]
            found.append(f"{name}:{','.join(told)}")
    return tuple(found)


Guidances = Annotated[tuple[Annotated[str, Spec(GUIDANCES)], ...], AfterValidator(canonical_guidances)]


def check_trained(guidances: Iterable[str], label_dropout: float | None, path_drop: float | None) -> None:
    """UserError for guidance by a prediction that never trained: without a class, or without the blocks of the route.

    None is what is not known of the training, and path_drop of a network without a route, which is reported when it is asked for one.
    """
    for spec in guidances:
        name = parse_spec(spec)[0]
        if label_dropout == 0 and name in ("cfg", "path_drop"):
            raise UserError(
                f"The guidance {spec} needs a network that sometimes trained without labels, but this one has "
                "label_dropout 0: leave this guidance out, or train with --label-dropout 0.1."
            )
        if path_drop == 0 and name == "path_drop":
            raise UserError(
                f"The guidance {spec} skips the blocks of the route, but the network never trained without them: leave it out, or "
                "train with --model.path-drop 0.1."
            )


def check_shift(shift: float) -> float:
    """The shift itself. Code with t = 1 at the data writes the inverse number; refusing it here catches the commonest mix-up."""
    if not 1 <= shift < math.inf:
        inverse = f"; a shift of {shift} written for t = 1 at the data is {1 / shift:.4g} here" if shift > 0 else ""
        raise UserError(
            f"A time shift must be at least 1, which pushes times towards noise (t = 1), but got {shift}{inverse}."
        )
    return shift


def latent_shift(shape: Sequence[int], base: int = 4096) -> float:
    """sqrt(C H W / base): the time shift of latents (C, H, W) that keeps the noise as strong, for their size, as in `base` numbers
    (arXiv 2403.03206, 2510.11690). RAE's (768, 16, 16) have 6.93, SD-VAE's (4, 32, 32) have 1, smaller ones less."""
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
    """How much it counts at a time: constant, always the same; linear, t times as much (SR-DiT)."""
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
                        f"{name} {getattr(self, name)!r} is a setting of the objective flow, and the objective ddpm has its "
                        "own: leave it out, or choose the objective flow."
                    )
        if self.loss_weight != "none":
            self._check_weight()
        for name in ("contrastive", "velocity_cosine"):
            of_data = (self.prediction, self.loss_weight) == ("data", "velocity")  # whose division by sigma is bounded
            if getattr(self, name) and self.prediction != "velocity" and not of_data:
                raise UserError(
                    f"{name} compares velocities, which a prediction of {self.prediction} does not give at every t: choose the "
                    "prediction velocity, or data with loss_weight velocity, or leave it out."
                )
        return self

    def _check_weight(self) -> None:
        """UserError where the weight has no meaning, or is infinite at an end of the times."""
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
                f"loss_weight {self.loss_weight!r} is infinite at the ends of [0, 1]: give timesteps uniform:low=0.001,high=0.999, "
                "as SiT (on its path vp uniform:low=0.00001)."
            )

    def idle(self) -> dict[str, str]:
        of_data = (self.prediction, self.loss_weight) == ("data", "velocity")
        unread = {} if of_data else {"sigma_min": "without --prediction data and --loss-weight velocity"}
        return unread if self.contrastive else unread | {"contrastive_times": "without --contrastive"}

    def for_latents(self, shape: Sequence[int]) -> Self:
        """With the shift that `auto` stands for with latents of this shape (C, H, W)."""
        if self.shift != "auto":
            return self
        return self.override(shift=max(1.0, latent_shift(shape)))

    def check_model(self, name: str, learn_sigma: bool) -> None:
        """UserError unless the objective trains all that the named network answers: a variance (learn_sigma) or none."""
        size = name.partition("-")[2]
        if learn_sigma and self.objective == "flow":
            raise UserError(
                f"{name} also predicts a variance, which the objective flow does not train: choose --diffusion.objective "
                f"ddpm, or 'SiT-{size}', the same network without it."
            )
        if not learn_sigma and self.objective == "ddpm":
            with_variance = "" if name.startswith("JiT") else f"'DiT-{size}', the same network with it, or "
            raise UserError(
                f"The objective ddpm trains a variance too, which {name} does not predict: choose {with_variance}"
                "--diffusion.objective flow."
            )

    def check_sampler(self, spec: str) -> str:
        """The spec itself when a network of this objective can be sampled by it, otherwise UserError."""
        name, _ = parse_spec(spec)
        if name in DDPM_SAMPLERS and self.objective != "ddpm":
            others = ", ".join(other for other in SAMPLERS.names() if other not in DDPM_SAMPLERS)
            raise UserError(
                f"The sampler {name} walks the timesteps of the objective ddpm, but this network is trained by the "
                f"objective {self.objective}: choose one of {others}."
            )
        return spec
