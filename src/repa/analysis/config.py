"""Configurations of the analyses, and the choice of checkpoints. Torch-free."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from repa.base.config import Config, refuse_idle
from repa.base.errors import UserError
from repa.base.registry import Spec
from repa.encoders import ENCODERS
from repa.encoders.loading import LocalWeights
from repa.runs import layout

if TYPE_CHECKING:
    import torch

    from repa.runs import LoadedRun

FOLDER = layout.ANALYSIS  # in a run folder: the results of `repa analyse` and its cache


class ImagesConfig(Config):
    """The images, the batch size, and the cache of their features."""

    # not `num`: torchrun takes --num for an abbreviation of its --numa-binding
    num_images: int = Field(10_000, ge=0)
    """Number of images, evenly spaced over the data; 0: all. The paper compares 10,000, and probes all."""
    batch_size: int = Field(64, ge=1)
    """Images per batch."""
    cache: str = ""
    """Folder for collected features, which a second call reuses; empty: RUN/analysis/cache, or the user's cache."""
    store: Literal["float32", "float16"] = "float32"
    """Precision of stored features; float16 takes half the space."""


class HiddenConfig(ImagesConfig):
    """Which hidden states of a run."""

    depths: tuple[int, ...] = ()
    """Blocks, counted from 1; empty: all."""
    times: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field((0.5,), min_length=1)
    """Noise levels t in [0, 1]; 0 is data."""
    seed: int = 0
    """Seed of the noise, and of the split for the probe."""


class SimilarityConfig(HiddenConfig):
    """CKNNA or CKA between hidden states and an encoder's patches, both averaged over tokens."""

    encoder: Annotated[str, Spec(ENCODERS)] = "tiny"
    """Encoder to compare with, by its averaged patches."""
    encoder_weights: str = ""
    """Local weights of that encoder; empty takes the hub's or the package's."""
    measure: Literal["cknna", "cka", "cka-unbiased"] = "cknna"
    """cknna: over nearest neighbours; cka: over all pairs; cka-unbiased: with the estimator that does not grow with width."""
    neighbours: int = Field(10, ge=2)
    """CKNNA: k."""
    variant: Literal["paper", "platonic", "platonic-clamped"] = "paper"
    """CKNNA: paper (the printed formula), platonic (the function most people call), platonic-clamped (its script, which cuts outliers)."""

    @model_validator(mode="after")
    def _of_cknna(self) -> Self:
        refuse_idle(self.idle(), self.changed)
        return self

    def idle(self) -> dict[str, str]:
        return dict.fromkeys(("neighbours", "variant") if self.measure != "cknna" else (), "without --measure cknna")


class DepthConfig(HiddenConfig):
    """Change of the prediction without a block."""

    num_images: int = Field(256, ge=0)
    """Number of images, evenly spaced over the data; 0: all. Each needs one forward pass, and one more per block."""


class HeadsConfig(Config):
    """Training of the linear classifiers of a probe."""

    epochs: int = Field(90, ge=1)
    """Epochs."""
    learning_rates: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field((1e-3,), min_length=1)
    """Peak learning rates of Adam: one classifier per rate, all trained in the same pass."""
    probe_batch: int = Field(0, ge=0)
    """Batch size; 0: the paper's 16,384 for ImageNet, proportionally smaller for fewer images, at least 256."""


class ProbeConfig(HeadsConfig, HiddenConfig):
    """A linear probe of hidden states."""

    num_images: int = Field(0, ge=0)
    """Number of training images, evenly spaced over the data; 0: all, as in the paper."""


class EncodersConfig(HeadsConfig, ImagesConfig):
    """The encoders to compare."""

    encoders: tuple[Annotated[str, Spec(ENCODERS)], ...] = ("tiny", "tiny-classifier")
    """Vision encoders."""
    encoder_weights: LocalWeights = Field({})
    """Local weights of encoders, written ENCODER=PATH."""
    grid: int = Field(0, ge=0)
    """Side of the token grid; 0: each encoder's default for this resolution."""
    neighbours: int = Field(10, ge=2)
    """CKNNA: k."""
    variant: Literal["paper", "platonic", "platonic-clamped"] = "paper"
    """CKNNA: paper, platonic or platonic-clamped."""
    seed: int = 0
    """Seed of the split for the probe."""

    @field_validator("encoders")
    @classmethod
    def _known(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        if not specs or len(set(specs)) < len(specs):
            raise ValueError(f"encoders {list(specs)} must name at least one encoder, each once")
        return specs

    def idle(self) -> dict[str, str]:
        unread = ("neighbours", "variant") if len(self.encoders) == 1 else ()
        return dict.fromkeys(unread, "with a single encoder, which has none to compare with")


class NeighboursConfig(Config):
    """Comparison of samples with training images."""

    features: Annotated[str, Spec(ENCODERS)] = "tiny-classifier"
    """Encoder whose features define the distance of two images."""
    features_weights: str = ""
    """Local weights of that encoder; empty takes the hub's or the package's."""
    num_images: int = Field(0, ge=0)
    """Number of training images, evenly spaced; 0: all, which is needed to find all copies."""
    num_held_out: int = Field(10_000, ge=20)
    """Largest number of held-out images, evenly spaced."""
    neighbours: int = Field(4, ge=1, le=16)
    """Number of nearest images shown beside each sample."""
    batch_size: int = Field(64, ge=1)
    """Images at a time."""


def meaning_of(measure: str, chance: float | None) -> str:
    """Reference values for "cknna", "cka", "cka-unbiased" or "probe"; `chance`: k / images, or the share of the
    largest class."""
    return {
        "cknna": f"1: the encoder itself; about {chance or 0:.4f}, neighbours / images: unrelated features",
        "cka": "1: the encoder itself, also turned or scaled; unrelated features: more than 0, the more the fewer images",
        "cka-unbiased": "1: the encoder itself, also turned or scaled; about 0: unrelated features",
        "probe": f"guessing the largest class: {chance or 0:.4f}",
    }[measure]


class RunCheckpoint(NamedTuple):
    """One network of a run."""

    label: str  # the run's folder name, or its path where several have that name
    run: Path
    step: int | None  # None: the newest at loading time, because training may remove the current newest before that

    def load(self, weights: str, autoencoder_weights: str, device: "torch.device | str") -> "LoadedRun":
        """The network with these weights: averaged (ema), raw (model), or another average by its name."""
        from repa.runs import load_run

        return load_run(self.run, weights, step=self.step, autoencoder_weights=autoencoder_weights, device=device)


def checkpoints_of(runs: Sequence[str | Path], steps: Sequence[int] = (), most: int = 1) -> list[RunCheckpoint]:
    """The checkpoints of these steps of every run; without steps at most `most` per run, evenly spaced, including the newest.

    Raises:
        UserError: a folder is not a run, or lacks a requested checkpoint.
    """
    names = [Path(run).resolve().name for run in runs]
    labels = [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)]
    return [
        RunCheckpoint(label, Path(run), step)
        for run, label in zip(runs, labels, strict=True)
        for step in _steps_of(Path(run), steps, most)
    ]


def _steps_of(run: Path, asked: Sequence[int], most: int) -> Sequence[int | None]:
    layout.read_config(run)
    steps = layout.checkpoint_steps(run)
    if not steps:
        raise UserError(f"{run} has no checkpoint yet: train it first (repa train ... --out {run}).")
    if missing := [step for step in asked if step not in steps]:
        raise UserError(f"{run} has no checkpoint of step {missing[0]}: choose one of {', '.join(map(str, steps))}.")
    return asked or ([None] if most == 1 else layout.evenly_spaced(steps, most))
