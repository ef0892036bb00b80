"""Configuration of sampling."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from repa.autoencoders import AUTOENCODERS
from repa.base.config import Config, OnDisk, refuse_idle
from repa.base.errors import UserError
from repa.base.files import require_path
from repa.base.registry import Spec, parse_spec
from repa.data.manifest import require_data
from repa.diffusion import SAMPLERS
from repa.diffusion.config import Guidances
from repa.runs.layout import SAMPLING, kind_of, require_run


class SampleConfig(Config):
    """Sampler, guidance, labels and seeds. The paper's figures: euler_maruyama, 250 steps, --guidance cfg:scale=1.8,high=0.7."""

    sampler: Annotated[str, Spec(SAMPLERS)] = "euler_maruyama"
    """Sampler, with settings as in euler_maruyama:last=0.04."""
    steps: int = Field(250, ge=1)
    """Steps of the sampler."""
    guidance: Guidances = ()
    """Guidances in order: cfg:scale=1.8,high=0.7, internal:head=8,scale=1.4, autoguidance:scale=1.5, path_drop:scale=3; empty: none."""
    encoder_steps: int = Field(0, ge=0)
    """For DDT: number of evaluations that run the encoder; the others reuse its last output. 0: all."""
    weak: Annotated[str, OnDisk(require_run)] = ""
    """Weaker run folder for autoguidance; the run itself, if only its checkpoint or weights differ."""
    weak_weights: str = "ema"
    """Weights of the weaker run, named as in --weights."""
    weak_checkpoint: int = Field(-1, ge=-1)
    """Checkpoint step of the weaker run; -1: the newest."""
    labels: str = "uniform"
    """uniform: random for each image; balanced: all classes in turn; or these classes in turn: 3,7 or cat,dog."""
    prompt: tuple[str, ...] = ()
    """Texts in turn, for a run that was trained on captions: --prompt "a cat" "a dog"."""
    prompt_file: Annotated[str, OnDisk(require_path)] = ""
    """File of prompts: one per line, or .jsonl with a "prompt" in each line."""
    prompt_data: Annotated[str, OnDisk(require_data)] = ""
    """Prepared data whose captions are the prompts: the first caption of each image, in order."""
    negative_prompt: str = ""
    """The text that guidance moves samples away from; empty: the empty text."""
    text_weights: str = ""
    """Location of the weights of the run's text encoder; empty: the recorded location, otherwise the hub's."""
    seed: int = 0
    """Seed; image i is a function of (seed, i)."""
    batch_size: int = Field(64, ge=1)
    """Images per batch in each process, and the largest batch of a network call; guidance takes two calls."""
    decoder: Annotated[str, Spec(AUTOENCODERS, also=("",))] = ""
    """Another autoencoder that decodes the same latents, such as taesd (fast) or sd-vae-ft-ema; empty: the run's autoencoder."""
    decoder_weights: str = ""
    """Local folder of that decoder's weights; empty: the hub's."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the network's matrix products; auto: bf16 if it is faster. The sampler's state is float64."""
    decoder_precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Precision of the decoder's convolutions; fp32 means TF32 on CUDA."""

    guide_image: Annotated[str, OnDisk(require_path)] = ""
    """Image for the guidance `representation`, such as --guidance representation:scale=5000,high=0.8."""
    guide_weights: str = ""
    """Local weights of that alignment's encoder; empty: the recorded location, otherwise the hub's."""

    @field_validator("labels")
    @classmethod
    def _readable(cls, labels: str) -> str:
        if not all(part.strip() for part in labels.split(",")):
            raise ValueError(f"labels {labels!r} must be uniform, balanced, or classes such as 3, cat or cat,dog")
        return labels

    @model_validator(mode="after")
    def _one_kind_of_prompt(self) -> Self:
        given = [name for name in ("prompt", "prompt_file", "prompt_data") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give only one of them")
        return self

    @model_validator(mode="after")
    def _has_what_guides(self) -> Self:
        asked = [parse_spec(spec)[0] for spec in self.guidance]
        if asked.count("representation") > 1:
            raise UserError("--guidance representation appears twice: give it once, for one image.")
        if "representation" in asked and not self.guide_image:
            raise UserError("The guidance representation needs an image: give its file as --guide-image FILE.")
        if "autoguidance" in asked and not self.weak:
            raise UserError("The guidance autoguidance needs a weaker network: give its run folder as --weak RUN.")
        refuse_idle(self.idle(), self.changed)
        return self

    def idle(self) -> dict[str, str]:
        asked = [parse_spec(spec)[0] for spec in self.guidance]
        of_others = (
            (("weak", "weak_weights", "weak_checkpoint"), "autoguidance" in asked, "guidance autoguidance"),
            (("guide_image", "guide_weights"), "representation" in asked, "guidance representation"),
            (("decoder_weights",), bool(self.decoder), "decoder"),
        )
        unread = {name: f"without --{other}" for names, is_used, other in of_others for name in names if not is_used}
        return super().idle() | unread

    def as_origin_of(self, run: str | Path) -> tuple[Self, str]:
        """For a converted run, the sampling defaults of the original code. Also a sentence on them, or an empty text."""
        kind = kind_of(Path(run))
        # Explicit settings win, even if they equal a default.
        given, recorded = self.model_dump(exclude_unset=True), dict(SAMPLING.get(kind, {}))
        channels = recorded.pop("channels", 0)
        used: dict[str, Any] = {name: value for name, value in recorded.items() if name not in given}
        guidance = tuple(_of_channels(spec, channels) for spec in self.guidance)
        if guidance != self.guidance:
            used["guidance"] = guidance
        if not used:
            return self, ""
        texts = {name: value if isinstance(value, str) else " ".join(value) for name, value in used.items()}
        words = " ".join(f"--{name} {value}" for name, value in texts.items())
        return (
            type(self).parse({**given, **used}),
            f"{run} was converted from a checkpoint of kind {kind}, so it uses the sampling defaults of that code: {words}.",
        )


def _of_channels(spec: str, channels: int) -> str:
    """The spec; with this number of channels if it is cfg without `channels`."""
    name, settings = parse_spec(spec)
    return f"{spec},channels={channels}" if channels and name == "cfg" and "channels" not in settings else spec
