"""The configuration of a training run. Its resolved form in the run folder is itself a recipe."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from repa.alignment import LOSSES, SCHEDULES
from repa.alignment.config import AlignmentConfig
from repa.autoencoders import AUTOENCODERS
from repa.base.config import Config
from repa.base.errors import UserError, choices
from repa.base.files import near
from repa.base.registry import Spec, parse_spec
from repa.conditions import TEXT_ENCODERS
from repa.diffusion import SAMPLERS
from repa.diffusion.config import DiffusionConfig, Guidances, check_trained
from repa.encoders import ENCODERS
from repa.encoders.loading import LocalWeights
from repa.models import BACKBONES
from repa.models.config import ModelConfig, reads_text
from repa.runs.layout import SAMPLING


class OptimizerConfig(Config):
    """The optimizer; by default the paper's AdamW with a constant learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of attention and MLP, AdamW for everything else."""
    learning_rate: float = Field(1e-4, gt=0)
    """Learning rate, after the warm-up and before the decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate: constant, or falling to 0 at num_steps, linearly or as a cosine."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's beta1, the decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's beta2, the decay of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip gradients to this global L2 norm."""


class LoRAConfig(Config):
    """LoRA: fine-tune low-rank updates of the matrices of attention and MLP, and the label table."""

    rank: int = Field(0, ge=0)
    """Rank of the updates, such as 16; 0 trains all weights. Needs --init."""


class PreviewConfig(Config):
    """Samples of the EMA network during training, always from the same initial noise."""

    every: int = Field(0, ge=0)
    """Steps between previews; 0: none."""
    num_images: int = Field(16, ge=1)
    """Number of images in a preview."""
    num_scored: int = Field(0, ge=0)
    """Number of samples to compare with the training images; 0: none."""
    score_every: int = Field(0, ge=0)
    """Steps between evaluations; 0: at every preview."""
    metrics: tuple[str, ...] = ("fd",)
    """Metrics, as in `repa evaluate --metrics`; fd is the Fréchet distance."""
    features: Annotated[str, Spec(ENCODERS, also=("inception",))] = "tiny-classifier"
    """Feature extractor of the metrics: inception, or an encoder that the run is not aligned to."""
    sampler: Annotated[str, Spec(SAMPLERS)] = "heun"
    """Sampler of the previews."""
    num_steps: int = Field(25, ge=1)
    """Steps of that sampler."""
    guidance: Guidances = ()
    """Guidances of the previews, as in `repa sample`; autoguidance, which needs another run, is not possible."""
    decoder: Annotated[str, Spec(AUTOENCODERS, also=("",))] = ""
    """Autoencoder that decodes the previews faster, such as taesd; empty: the run's autoencoder."""
    decoder_weights: str = ""
    """Local folder of that decoder's weights; empty: the hub's."""

    @model_validator(mode="after")
    def _something_to_score(self) -> Self:
        if outside := {"autoguidance", "representation"} & {parse_spec(spec)[0] for spec in self.guidance}:
            raise ValueError(
                f"the guidance {min(outside)} needs another run or an image, which previews do not have: leave it out of --preview.guidance"
            )
        if self.score_every and not self.num_scored:
            raise ValueError(
                f"--preview.score-every is {self.score_every}, but --preview.num-scored is 0: give it a number of samples"
            )
        if self.num_scored == 1:
            raise ValueError(
                "--preview.num-scored is 1, but a distribution needs at least two samples: give more, or 0"
            )
        return self

    def idle(self) -> dict[str, str]:
        scoring = {name: "without --num-scored" for name in ("metrics", "features") if not self.scored_every}
        if not (self.every or self.scored_every):
            switches = {"every", "score_every", *([] if self.num_scored else ["num_scored"])}  # which may be turned off
            return dict.fromkeys(type(self).model_fields.keys() - switches, "without --every")
        drawing = {} if self.every else {"num_images": "without --every"}
        return scoring | drawing | ({} if self.decoder else {"decoder_weights": "without --decoder"})

    @property
    def scored_every(self) -> int:
        """Steps between evaluations; 0: none."""
        return (self.score_every or self.every) if self.num_scored else 0


class StreamConfig(Config):
    """A stream: a vector that is noised, predicted and sampled with the latents (REG, arXiv 2507.01467)."""

    name: str = Field("class", pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the stream in logs and checkpoints."""
    source: Annotated[str, Spec(ENCODERS)]
    """Encoder whose image vector it is, such as dinov2-b."""
    weight: float = Field(0.03, ge=0)
    """Weight of its denoising loss."""


class TrainConfig(Config):
    """One training run."""

    model: ModelConfig = ModelConfig()
    """The network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Objective, path, prediction and distribution of training times."""
    alignments: tuple[AlignmentConfig, ...] = ()
    """The alignment terms; none: the baseline."""
    streams: tuple[StreamConfig, ...] = ()
    """Vectors that are noised and predicted with the latents (REG)."""
    denoising_schedule: Annotated[str, Spec(SCHEDULES)] = "constant"
    """Multiplier of all denoising losses by step; warmup:steps=50000 trains the alignments first (REED)."""
    head_weight: float = Field(0.5, ge=0)
    """Weight of the denoising loss of each head in model.heads."""
    autoencoder: Annotated[str, Spec(AUTOENCODERS, also=("",))] = ""
    """Autoencoder of the latents; empty: that of the data."""
    autoencoder_weights: str = ""
    """Local folder of the autoencoder's weights; empty: the hub's."""
    feature_weights: LocalWeights = Field({})
    """Local weights of encoders for training or metrics, written ENCODER=PATH; others come from the hub."""
    text: Annotated[str, Spec(TEXT_ENCODERS, also=("",))] = ""
    """Text encoder of the captions, e.g. clip-l, for networks that read text; empty: that of the stored tokens."""
    text_weights: str = ""
    """Local folder of the text encoder's weights, if it runs in training or sampling; empty: the hub's."""
    init: str = ""
    """Initial weights: run folder, export, folder of a diffusers DiT, repa:FILE, sit:FILE, dit:FILE. Empty: random; ?: required."""
    lora: LoRAConfig = LoRAConfig()
    """Train low-rank updates instead of all weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    batch_size: int = Field(256, ge=1)
    """Images per step, over all processes."""
    num_steps: int = Field(400_000, ge=1)
    """Total number of steps, unless epochs ends training earlier."""
    epochs: float = Field(0.0, ge=0)
    """Passes over the data after which training ends, unless num_steps ends it earlier; 0: only num_steps counts."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Probability of replacing a label or a caption by the null label or the empty text, which guidance needs."""
    accumulate: int = Field(1, ge=1)
    """Number of micro-batches per step, to save memory; the gradient is that of the whole batch."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Strategy for several processes: ddp (each holds everything), fsdp (sharded weights and averages), or auto (the faster)."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, about a third more FLOPs, the same gradients."""
    fused_norm: bool = False
    """Backward pass of each block's norm and modulation in one Triton kernel (plain PyTorch on a CPU); not yet timed on a GPU."""
    fused_update: bool = False
    """AdamW and the first average in one Triton kernel (no effect on a CPU); not yet timed on a GPU."""
    fp8: bool = False
    """8-bit matrix products in attention and MLP of all blocks but the first and the last; changes training; for H100 and newer."""
    compile: bool = False
    """Compile with torch.compile: faster steps on a GPU; the last digits change."""
    compile_scope: Literal["blocks", "step"] = "blocks"
    """What to compile: each block separately (takes seconds), or the whole step as one graph (takes minutes)."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, per step."""
    ema_decays: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """Decays of further averages, saved as `ema-DECAY`."""
    ema_widths: tuple[Annotated[float, Field(gt=0, le=0.28)], ...] = ()
    """Relative widths of averages with power-function profiles, saved as `ema-width-WIDTH`; 0.05 and 0.1 suit `repa ema`."""
    snapshot_every: int = Field(0, ge=0)
    """Steps between snapshots of these averages, from which `repa ema` computes an average of any width; 0: none."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of matrix products; weights, norms and losses stay float32. auto: bf16 if it is faster on the machine."""
    max_skipped_steps: int = Field(20, ge=0)
    """Largest number of consecutive steps that may be skipped for a gradient that is not finite; then training stops."""
    seed: int = 0
    """Seed of weights, data order, noise, times and dropped labels."""
    log_every: int = Field(100, ge=1)
    """Steps between log entries in metrics.jsonl; only these steps wait for the device."""
    save_every: int = Field(10_000, ge=1)
    """Steps between checkpoints."""
    save_minutes: float = Field(0.0, ge=0)
    """Also write a checkpoint after this many minutes; 0: only by steps."""
    keep_checkpoints: int = Field(2, ge=0)
    """Number of newest checkpoints to keep; 0: all."""
    keep_every: int = Field(0, ge=0)
    """Steps between checkpoints that are kept for ever, in addition to the newest; 0: none."""
    async_save: bool = False
    """Write checkpoints from a copy in memory while training continues."""
    wandb: str = ""
    """Weights & Biases project for the log entries; empty: none. WANDB_MODE=offline keeps them on this machine."""
    preview: PreviewConfig = PreviewConfig()
    """Samples and metrics during training."""

    def require_init(self) -> None:
        """Raises UserError if the initial weights of a new run are not given, or do not exist."""
        if self.init == "?":
            raise UserError(
                "This recipe fine-tunes a network: give --init RUN, or --init sit:FILE, repa:FILE or dit:FILE."
            )
        kind, _, file = self.init.partition(":")
        path = Path(file if kind in SAMPLING else self.init)
        if kind in SAMPLING and path.is_dir():
            raise UserError(f"--init is {self.init!r}, but {path} is a folder: give --init {path}.")
        if not path.exists():
            raise UserError(
                f"--init is {self.init!r}, but {path} does not exist: give a run or a checkpoint.{near(path)}"
            )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self.diffusion.check_model(self.model.name, self.model.learn_sigma)
        self.diffusion.check_sampler(self.preview.sampler)
        if self.preview.every or self.preview.scored_every:
            check_trained(self.preview.guidance, self.label_dropout, self.model.path_drop)
        text = self.text or self.text_weights
        if text and not self._may_read_text:
            raise ValueError(
                f"--text is {text!r}, but the backbone {self.model.backbone!r} reads no text: choose --model.backbone mmdit"
            )
        self._check_alignments()
        self._check_streams()
        if self.lora.rank:
            self._check_lora()
        self._check_step()
        return self

    def idle(self) -> dict[str, str]:
        unread = (
            ("head_weight", not self.model.heads, "without --model.heads"),
            ("compile_scope", not self.compile, "without --compile"),
            ("keep_every", not self.keep_checkpoints, "with --keep-checkpoints 0, which keeps all"),
            ("model.text_shape", not self._may_read_text, "without a backbone that reads text"),
            ("model.separate_times", not self.diffusion.token_times, "without --diffusion.token-times"),
        )
        return super().idle() | {name: why for name, is_idle, why in unread if is_idle}

    @property
    def _may_read_text(self) -> bool:
        return parse_spec(self.model.backbone)[0] not in BACKBONES or reads_text(self.model.backbone)

    def _check_alignments(self) -> None:
        depth, keys = self.model.dims().depth, [a.key for a in self.alignments]
        for index, alignment in enumerate(self.alignments):
            if alignment.depth > depth:
                raise ValueError(
                    f"--alignments.{index}.depth is {alignment.depth}, but {self.model.name} has {depth} blocks: choose 1 to {depth}"
                )
            # The key names the projector in checkpoints and the curve in logs.
            if alignment.key in keys[:index]:
                raise ValueError(
                    f"two alignments are called {alignment.key!r}: give one of them another name, --alignments.0.name NAME"
                )
            if (other := alignment.projector_of) and other not in keys[:index]:
                remedy = choices(other, keys[:index]) if index else ", and it is the first: leave it out"
                raise ValueError(
                    f"--alignments.{index}.projector-of is {other!r}, which is not an alignment before it{remedy}"
                )
        if len({_other_pass(a.target) for a in self.alignments if parse_spec(a.target)[0] in ("ema", "run")}) > 1:
            raise ValueError(
                "the targets ema and run share one pass of another network: give all the same earlier and cleanest, or path, step "
                "and scale"
            )

    def _check_streams(self) -> None:
        names = [s.name for s in self.streams]
        if "x" in names or len(names) != len(set(names)):
            raise ValueError(
                f"the streams have the names {', '.join(names)}: give each a unique --streams.0.name other than x"
            )
        if self.diffusion.objective == "ddpm" and self.streams:
            raise ValueError(
                "the objective ddpm needs a variance, which streams lack: leave the streams out, or choose the objective flow"
            )
        if self.diffusion.token_times and self.streams:
            raise ValueError(
                "--diffusion.token-times works only on grid tokens, but a stream adds another token: choose one of the two"
            )

    def _check_lora(self) -> None:
        if not self.init:
            raise ValueError(
                f"--lora.rank is {self.lora.rank}, but LoRA needs a trained network: give --init a run or a checkpoint"
            )
        for name, given, instead in (
            ("--ema-widths", " ".join(map(str, self.ema_widths)), "--ema-decays"),
            ("--parallel", self.parallel == "fsdp" and "fsdp", "ddp"),
            ("--fp8", self.fp8, "bf16"),
            ("--optimizer.name", self.optimizer.name == "muon" and "muon", "adamw"),
        ):
            if given:
                raise ValueError(
                    f"{name} {given} does not work with --lora.rank {self.lora.rank}: choose {instead}, or train all weights"
                )

    def _check_step(self) -> None:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--batch-size {self.batch_size} is not divisible by --accumulate {self.accumulate}: choose a multiple of it"
            )
        if self.accumulate > 1:
            self._check_accumulation()
        if self.optimizer.name == "muon" and self.parallel == "fsdp":
            raise ValueError(
                "the optimizer muon needs unsharded matrices, but --parallel fsdp shards them: choose ddp, or adamw"
            )
        if self.fused_update and self.optimizer.name != "adamw":
            raise ValueError(
                f"--fused-update works only with AdamW, but the optimizer is {self.optimizer.name}: choose adamw, or leave it out"
            )
        if self.snapshot_every and not self.ema_widths:
            raise ValueError(
                "--snapshot-every saves the averages of --ema-widths, which is empty: give widths, such as 0.05 0.1"
            )

    def _check_accumulation(self) -> None:
        """Refuse losses that compare images with gradient accumulation: a micro-batch is another batch to them."""
        from repa.alignment.losses import compares

        for alignment in self.alignments:
            if compares("images", LOSSES.build(alignment.loss)):
                raise UserError(
                    f"--accumulate is {self.accumulate}, but the loss {alignment.loss!r} of the alignment {alignment.key!r} compares the "
                    "images of the whole batch: choose 1, or the loss cosine."
                )


def _other_pass(target: str) -> tuple:
    """The pass that a target "ema:..." or "run:..." needs; targets of one pass may differ only in their blocks."""
    name, settings = parse_spec(target)
    # Defaults filled in: "ema:depth=4" and "ema:depth=8,earlier=0.0" look at one pass.
    defaults: dict[str, dict[str, Any]] = {
        "ema": {"earlier": 0.0, "cleanest": False},
        "run": {"path": "", "step": -1, "scale": 30.0},
    }
    return name, *(settings.get(key, value) for key, value in defaults[name].items())
