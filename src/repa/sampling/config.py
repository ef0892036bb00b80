"""How to sample."""

from typing import Literal

from pydantic import Field, field_validator

from repa.base.config import Config
from repa.diffusion import SAMPLERS
from repa.diffusion.config import GuidanceConfig


class SampleConfig(Config):
    """Sampler, guidance, labels and seeds. The paper's figures: euler_maruyama, 250 steps, guidance scale 1.8 in [0, 0.7]."""

    sampler: str = "euler_maruyama"
    """Sampler, with settings as in euler_maruyama:last=0.04."""
    steps: int = Field(250, ge=1)
    """Steps of the sampler."""
    guidance: GuidanceConfig = GuidanceConfig()
    """Classifier-free guidance."""
    labels: str = "uniform"
    """uniform: drawn for each image; balanced: classes in turn; or class numbers in turn, as in 3 or 3,7."""
    seed: int = 0
    """Image i is a function of (seed, i)."""
    batch_size: int = Field(64, ge=1)
    """Images at a time on each process."""
    decoder: str = ""
    """Another autoencoder that decodes the same latents, such as taesd (fast) or sd-vae-ft-ema; empty takes the run's own."""
    decoder_weights: str = ""
    """Local folder of that decoder's weights; empty takes the hub's."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Arithmetic of the network's matrix products; the sampler's state is float64."""

    @field_validator("sampler")
    @classmethod
    def _known(cls, spec: str) -> str:
        return SAMPLERS.check(spec)

    @field_validator("labels")
    @classmethod
    def _readable(cls, labels: str) -> str:
        if labels not in ("uniform", "balanced") and not all(part.strip().isdecimal() for part in labels.split(",")):
            raise ValueError(f"labels {labels!r} must be uniform, balanced, or class numbers such as 3 or 3,7")
        return labels
