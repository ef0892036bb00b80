"""Everything that defines a training run. The resolved form is written into the run folder and is itself a recipe."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from repa.alignment.config import AlignmentConfig
from repa.base.config import Config
from repa.diffusion import SAMPLERS
from repa.diffusion.config import DiffusionConfig, GuidanceConfig
from repa.encoders import ENCODERS
from repa.encoders.loading import check_pairs
from repa.models.config import ModelConfig


class OptimizerConfig(Config):
    """AdamW with a constant learning rate, as the paper trains."""

    learning_rate: float = Field(1e-4, gt=0)
    """Learning rate, constant."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global L2 norm when they exceed it."""


class PreviewConfig(Config):
    """Samples of the EMA network while it trains, always from the same initial noise."""

    every: int = Field(0, ge=0)
    """Steps between previews; 0 makes none."""
    num_images: int = Field(16, ge=1)
    """Images that are kept and drawn."""
    num_scored: int = Field(0, ge=0)
    """Samples for the Fréchet distance to the training images; 0 measures none."""
    features: str = "tiny-judge"
    """Encoder whose pooled features the Fréchet distance compares; another one than the runs are aligned to."""
    sampler: str = "heun"
    """Sampler of the previews."""
    num_steps: int = Field(25, ge=1)
    """Steps of that sampler."""
    guidance: GuidanceConfig = GuidanceConfig()
    """Classifier-free guidance of the previews."""
    decoder: str = ""
    """Autoencoder that decodes the previews faster, such as taesd; empty takes the run's own."""
    decoder_weights: str = ""
    """Local folder of that decoder's weights; empty takes the hub's."""

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, spec: str) -> str:
        return SAMPLERS.check(spec)

    @field_validator("features")
    @classmethod
    def _known_features(cls, spec: str) -> str:
        return ENCODERS.check(spec)


class TrainConfig(Config):
    """One training run."""

    model: ModelConfig = ModelConfig()
    """The network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Objective, path, prediction and distribution of training times."""
    alignments: tuple[AlignmentConfig, ...] = ()
    """The alignment terms; none trains the baseline."""
    autoencoder: str = ""
    """Autoencoder of the latents; empty takes the one that the data was prepared with."""
    autoencoder_weights: str = ""
    """Local folder of the autoencoder's weights; empty takes the hub's."""
    feature_weights: tuple[str, ...] = ()
    """Local weights of encoders that run while training or judge previews, written ENCODER=PATH; the others come from the hub."""
    init: str = ""
    """Start from these weights: run folder, folder of `repa export`, or repa:FILE, sit:FILE, dit:FILE. Empty: from random."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    batch_size: int = Field(256, ge=1)
    """Images per step over all processes."""
    num_steps: int = Field(400_000, ge=1)
    """Steps to train in all."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that a label is replaced by the null label, so that guidance is possible."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, per step."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the matrix products; weights, norms and losses stay float32. auto: bf16 where the machine gains from it."""
    seed: int = 0
    """Seed of everything: weights, data order, noise, times, dropped labels."""
    log_every: int = Field(100, ge=1)
    """Steps between rows in metrics.jsonl: only these wait for the device."""
    save_every: int = Field(10_000, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=0)
    """Newest checkpoints that are kept; 0 keeps all."""
    preview: PreviewConfig = PreviewConfig()
    """Samples and their distance while training."""

    @field_validator("feature_weights")
    @classmethod
    def _pairs(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        check_pairs(pairs)
        return pairs

    @model_validator(mode="after")
    def _fits_together(self):
        self.diffusion.check_model(self.model.name, self.model.learn_sigma)
        self.diffusion.check_sampler(self.preview.sampler)
        depth = self.model.dims().depth
        for index, alignment in enumerate(self.alignments):
            if alignment.depth > depth:
                raise ValueError(
                    f"alignments.{index}.depth is {alignment.depth}, but {self.model.name} has {depth} blocks: choose 1 to {depth}"
                )
        names = [a.name for a in self.alignments]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two alignments go from {name!r}: give each pair of target and depth once")
        return self
