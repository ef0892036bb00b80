"""How to sample."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator

from repa.autoencoders import AUTOENCODERS
from repa.base.config import Config
from repa.base.registry import Spec
from repa.diffusion import SAMPLERS
from repa.diffusion.config import GuidanceConfig
from repa.runs.origin import SAMPLING, kind_of


class SampleConfig(Config):
    """Sampler, guidance, labels and seeds. The paper's figures: euler_maruyama, 250 steps, guidance scale 1.8 in [0, 0.7]."""

    sampler: Annotated[str, Spec(SAMPLERS)] = "euler_maruyama"
    """Sampler, with settings as in euler_maruyama:last=0.04."""
    steps: int = Field(250, ge=1)
    """Steps of the sampler."""
    guidance: GuidanceConfig = GuidanceConfig()
    """Classifier-free guidance."""
    labels: str = "uniform"
    """uniform: drawn for each image; balanced: classes in turn; or classes in turn by number or name: 3,7 or cat,dog."""
    seed: int = 0
    """Image i is a function of (seed, i)."""
    batch_size: int = Field(64, ge=1)
    """Images at a time on each process."""
    decoder: Annotated[str, Spec(AUTOENCODERS, also=("",))] = ""
    """Another autoencoder that decodes the same latents, such as taesd (fast) or sd-vae-ft-ema; empty takes the run's own."""
    decoder_weights: str = ""
    """Local folder of that decoder's weights; empty takes the hub's."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Arithmetic of the network's matrix products; the sampler's state is float64."""

    @field_validator("labels")
    @classmethod
    def _readable(cls, labels: str) -> str:
        if not all(part.strip() for part in labels.split(",")):
            raise ValueError(f"labels {labels!r} must be uniform, balanced, or classes such as 3, cat or cat,dog")
        return labels

    def as_origin_of(self, run: str | Path) -> tuple[Self, str]:
        """Of a converted run: what nobody set is as its own code samples. Also a sentence that says so, or an empty one."""
        kind = kind_of(Path(run))
        given, recorded = self.model_dump(exclude_unset=True), SAMPLING.get(kind, {})
        used = {name: value for name, value in recorded.items() if name != "guidance" and name not in given}
        guidance = {
            name: value for name, value in recorded.get("guidance", {}).items() if name not in given.get("guidance", {})
        }
        if not used and not guidance:
            return self, ""
        merged = type(self).parse({**given, **used, "guidance": {**given.get("guidance", {}), **guidance}})
        words = [f"--{name} {value}" for name, value in used.items()] + [
            f"--guidance.{n} {v}" for n, v in guidance.items()
        ]
        return (
            merged,
            f"{run} was converted from a checkpoint of kind {kind}, so it is sampled as by that code: {' '.join(words)}.",
        )
