"""The metrics and the feature extractor."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from repa.base.config import Config, refuse_idle
from repa.base.errors import choices
from repa.base.registry import Registry, Spec
from repa.encoders import ENCODERS

INCEPTION = "inception"
OF_INCEPTION = ("fid", "sfid", "inception_score", "kid", "precision", "recall")
OF_ENCODERS = ("fd", "kd", "precision", "recall")
OF_CAPTIONS = ("caption_agreement", "clip_score", "clip_agreement")  # of samples that have prompts
OF_NEIGHBOURS = ("precision", "recall")
OF_CLIP = ("clip_score", "clip_agreement")
# of the user's own: f(samples (N, D), reference (M, D), *, settings) -> number
METRICS = Registry("metric", {}, takes=("samples", "reference"))
ON_REQUEST = ("kid", "kd", *OF_CAPTIONS)  # measured only on request: papers' tables do not have them


def metrics_of(features: str) -> tuple[str, ...]:
    """The metrics that these features allow."""
    return (*(OF_INCEPTION if features == INCEPTION else OF_ENCODERS), *OF_CAPTIONS)


def is_private(metric: str) -> bool:
    """Whether this is the dotted name of a private metric."""
    return "." in metric.partition(":")[0]


class FeaturesConfig(Config):
    """The network whose features are compared."""

    features: Annotated[str, Spec(ENCODERS, also=(INCEPTION,))] = INCEPTION
    """Feature extractor: inception, as in papers, or an encoder that the model was not aligned to, such as dinov2-l."""
    features_weights: str = ""
    """Local weights: Inception's file or the encoder's folder; empty: the cache, the package's or the hub's."""
    features_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the extractor. Papers use fp32; bf16 is for GPUs and changes results a little (docs/evaluation.md)."""
    batch_size: int = Field(64, ge=1)
    """Images per batch on each process."""


class EvaluateConfig(FeaturesConfig):
    """Metrics of samples against a reference."""

    metrics: tuple[str, ...] = ()
    """Inception: fid, sfid, is, kid, precision, recall; encoders: fd (Fréchet), kd (kernel), precision, recall; of samples with
    prompts caption_agreement, clip_score, clip_agreement; empty: all but k*d and those of prompts. Or a function of your own."""
    prompts: str = ""
    """File of the samples' prompts in order, .txt or .jsonl; empty: the file beside the samples, or the prompts of the run."""
    clip: str = "clip-l"
    """CLIP for clip_score and clip_agreement: clip-b, clip-l or clip-h."""
    clip_weights: str = ""
    """Local folder of CLIP's weights, as on the hub; empty: the hub's."""
    neighbours: Literal["float32", "float16"] = "float32"
    """Precision of the nearest-neighbour search; float16 rounds as the ADM evaluator does, for comparison with papers."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _short(cls, metrics: Any) -> Any:
        # "is" is what tables call it, and a word that Python keeps for itself.
        return tuple("inception_score" if name == "is" else name for name in metrics)

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        allowed = metrics_of(self.features)
        for name in self.metrics:
            if is_private(name):
                METRICS.check(name)
            elif name not in allowed:
                raise ValueError(
                    f"metrics {name!r} is not measured in the features of {self.features}{choices(name, allowed)}"
                )
        refuse_idle(self.idle(), self.changed)
        return self

    def idle(self) -> dict[str, str]:
        unread = {
            name: f"without {'one of ' * (len(metrics) > 1)}the metrics {', '.join(metrics)}"
            for names, metrics in (
                (("prompts",), OF_CAPTIONS),
                (("clip", "clip_weights"), OF_CLIP),
                (("neighbours",), OF_NEIGHBOURS),
            )
            for name in names
            if not set(metrics) & set(self.wanted)
        }
        return super().idle() | unread

    @property
    def wanted(self) -> tuple[str, ...]:
        """The metrics, chosen or usual."""
        return self.metrics or tuple(name for name in metrics_of(self.features) if name not in ON_REQUEST)


class ReferenceConfig(FeaturesConfig):
    """A reference file in the format of the ADM evaluator."""

    resolution: int = Field(0, ge=0)
    """Resolution in pixels to which images of a folder or zip are cropped, as ADM does; not for prepared data or .npz."""
