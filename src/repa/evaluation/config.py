"""What to measure and in whose features."""

from typing import Literal

from pydantic import Field, field_validator

from repa.base.config import Config
from repa.encoders import ENCODERS

Metric = Literal["fd", "kd", "precision", "recall"]


class EvaluateConfig(Config):
    """Metrics of samples against a reference in the pooled features of an encoder."""

    features: str = "tiny-judge"
    """Encoder whose pooled features are compared: choose one that the model was not aligned to."""
    features_weights: str = ""
    """Local folder of that encoder's weights; empty takes the hub's or the package's."""
    metrics: tuple[Metric, ...] = ("fd", "precision", "recall")
    """fd: Fréchet distance; kd: kernel distance; precision and recall: by nearest neighbours."""
    batch_size: int = Field(256, ge=1)
    """Images at a time."""

    @field_validator("features")
    @classmethod
    def _known(cls, spec: str) -> str:
        return ENCODERS.check(spec)
