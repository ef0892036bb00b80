"""Settings of the diffusion room. Torch-free."""

from pydantic import Field, field_validator

from repa.base.config import Config
from repa.base.errors import UserError, nearest
from repa.diffusion import PATHS, PREDICTIONS, TIMESTEPS


def check_prediction(prediction: str) -> str:
    """The name itself when it is one of PREDICTIONS, else UserError."""
    if prediction not in PREDICTIONS:
        allowed = ", ".join(PREDICTIONS)
        raise UserError(f"Unknown prediction {prediction!r}: allowed are {allowed}.{nearest(prediction, PREDICTIONS)}")
    return prediction


class DiffusionConfig(Config):
    """What the network learns to undo, and what it answers."""

    path: str = "linear"
    """Path from data (t = 0) to noise (t = 1): linear, trigonometric or vp[:beta_min=..,beta_max=..]."""
    prediction: str = "velocity"
    """What the network answers: velocity, noise, data or score."""
    timesteps: str = "uniform"
    """Distribution of the training times: uniform or logit_normal[:mean=..,std=..,shift=..,path=..]."""

    @field_validator("path")
    @classmethod
    def _path(cls, value: str) -> str:
        return PATHS.check(value)

    @field_validator("timesteps")
    @classmethod
    def _timesteps(cls, value: str) -> str:
        return TIMESTEPS.check(value)

    @field_validator("prediction")
    @classmethod
    def _prediction(cls, value: str) -> str:
        return check_prediction(value)


class GuidanceConfig(Config):
    """Classifier-free guidance."""

    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Strength: 1 is off, above 1 sharpens, 0 is the unconditional network."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guide only while low <= t <= high; t = 0 is data, 1 is noise."""
    channels: int = Field(0, ge=0)
    """Guide only the first so many channels; 0 guides all."""

    @field_validator("interval")
    @classmethod
    def _interval(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0 <= low <= high <= 1:
            raise UserError(f"the guidance interval must satisfy 0 <= low <= high <= 1, but got {low}, {high}.")
        return value
