"""Everything that defines a training run. The resolved form is written into the run folder and is itself a recipe."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from repa.alignment import LOSSES, SCHEDULES
from repa.alignment.config import AlignmentConfig
from repa.autoencoders import AUTOENCODERS
from repa.base.config import Config
from repa.base.errors import UserError, choices
from repa.base.registry import Spec, parse_spec
from repa.conditions import TEXT_ENCODERS
from repa.diffusion import SAMPLERS
from repa.diffusion.config import DiffusionConfig, Guidances, check_trained
from repa.encoders import ENCODERS
from repa.encoders.loading import LocalWeights
from repa.models import BACKBONES
from repa.models.config import ModelConfig, reads_text


class OptimizerConfig(Config):
    """AdamW with a constant learning rate, as the paper trains, or what was asked for instead."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of attention and MLP, AdamW for everything else."""
    learning_rate: float = Field(1e-4, gt=0)
    """Learning rate, after the warm-up and before the decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """constant, or how the learning rate falls to 0 at num_steps: in a straight line, or along half a cosine."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0 in a straight line."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global L2 norm when they exceed it."""


class LoRAConfig(Config):
    """Fine-tuning that trains a low-rank update next to each matrix of attention and MLP, and the table of labels."""

    rank: int = Field(0, ge=0)
    """Rank of the updates, such as 16; 0 trains all weights. Needs --init."""


class PreviewConfig(Config):
    """Samples of the EMA network while it trains, always from the same initial noise."""

    every: int = Field(0, ge=0)
    """Steps between previews; 0 makes none."""
    num_images: int = Field(16, ge=1)
    """Images that are kept and drawn."""
    num_scored: int = Field(0, ge=0)
    """Samples that are measured against the training images; 0 measures none."""
    score_every: int = Field(0, ge=0)
    """Steps between measurements; 0 measures at every preview."""
    metrics: tuple[str, ...] = ("fd",)
    """What is measured, as in `repa evaluate --metrics`; fd is the Fréchet distance."""
    features: Annotated[str, Spec(ENCODERS, also=("inception",))] = "tiny-classifier"
    """Features in which samples are measured: inception, or an encoder that the run is not aligned to."""
    sampler: Annotated[str, Spec(SAMPLERS)] = "heun"
    """Sampler of the previews."""
    num_steps: int = Field(25, ge=1)
    """Steps of that sampler."""
    guidance: Guidances = ()
    """Guidances of the previews, as in `repa sample`; not autoguidance, which needs another run."""
    decoder: Annotated[str, Spec(AUTOENCODERS, also=("",))] = ""
    """Autoencoder that decodes the previews faster, such as taesd; empty takes the run's own."""
    decoder_weights: str = ""
    """Local folder of that decoder's weights; empty takes the hub's."""

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
                "--preview.num-scored is 1, and a distribution needs two samples: give more, or 0 to measure none"
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
        """Steps between measurements; 0: there are none."""
        return (self.score_every or self.every) if self.num_scored else 0


class StreamConfig(Config):
    """A vector that is noised, predicted and sampled with the latents (REG, arXiv 2507.01467)."""

    name: str = Field("class", pattern=r"^[a-z][a-z0-9_]*$")
    """Names the stream in logs and checkpoints."""
    source: Annotated[str, Spec(ENCODERS)]
    """Encoder whose vector for the whole image it is, such as dinov2-b."""
    weight: float = Field(0.03, ge=0)
    """How much its denoising loss counts."""


class TrainConfig(Config):
    """One training run."""

    model: ModelConfig = ModelConfig()
    """The network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Objective, path, prediction and distribution of training times."""
    alignments: tuple[AlignmentConfig, ...] = ()
    """The alignment terms; none trains the baseline."""
    streams: tuple[StreamConfig, ...] = ()
    """Vectors that are noised and predicted with the latents; none, unless the run is a REG."""
    denoising_schedule: Annotated[str, Spec(SCHEDULES)] = "constant"
    """Multiplier of all denoising losses over training; warmup:steps=50000 trains the alignments first (REED)."""
    head_weight: float = Field(0.5, ge=0)
    """Weight of the denoising loss of each head in model.heads."""
    autoencoder: Annotated[str, Spec(AUTOENCODERS, also=("",))] = ""
    """Autoencoder of the latents; empty takes the one that the data was prepared with."""
    autoencoder_weights: str = ""
    """Local folder of the autoencoder's weights; empty takes the hub's."""
    feature_weights: LocalWeights = ()
    """Local weights of encoders that run while training or measure previews, written ENCODER=PATH; the others come from the hub."""
    text: Annotated[str, Spec(TEXT_ENCODERS, also=("",))] = ""
    """Text encoder of the captions, e.g. clip-l, for networks that read text; empty takes that of the stored tokens."""
    text_weights: str = ""
    """Local folder of its weights, where it runs while training or sampling; empty takes the hub's."""
    init: str = ""
    """Start from these weights: run folder, folder of `repa export`, repa:FILE, sit:FILE, dit:FILE. Empty: random. ?: required."""
    lora: LoRAConfig = LoRAConfig()
    """Train updates of low rank instead of all weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    batch_size: int = Field(256, ge=1)
    """Images per step over all processes."""
    num_steps: int = Field(400_000, ge=1)
    """Steps to train in all, or fewer if epochs ends training earlier."""
    epochs: float = Field(0.0, ge=0)
    """Passes over the data after which training ends, if num_steps does not end it before; 0: num_steps alone."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that a label or a caption is replaced by the null label or the empty text, so that guidance is possible."""
    accumulate: int = Field(1, ge=1)
    """Parts into which a step's images are split to need less memory; the gradient stays that of all of them."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the work: each holds everything (ddp), or a part of weights and averages (fsdp); auto: the faster."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: less memory, about a third more arithmetic, the same gradients."""
    fused_norm: bool = False
    """Backward of each block's norm and modulation in one Triton kernel (on a CPU in plain PyTorch); not timed on a GPU yet."""
    fused_update: bool = False
    """AdamW and the first average in one Triton kernel (on a CPU one after the other, as without); not timed on a GPU yet."""
    fp8: bool = False
    """Multiply attention and MLP of all blocks but the first and the last in 8 bits; changes training, and is faster on H100 and newer."""
    compile: bool = False
    """Compile with torch.compile: faster steps on a GPU, last digits change."""
    compile_scope: Literal["blocks", "step"] = "blocks"
    """What is compiled: each block of the network by itself, in seconds, or the whole step as one graph, in minutes."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, per step."""
    ema_decays: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """Decays of further averages, kept with the first as `ema-DECAY`."""
    ema_widths: tuple[Annotated[float, Field(gt=0, le=0.28)], ...] = ()
    """Relative widths of averages with a power-function profile, kept as `ema-width-WIDTH`; 0.05 and 0.1 suit `repa ema`."""
    snapshot_every: int = Field(0, ge=0)
    """Steps between snapshots of these averages, from which `repa ema` makes an average of any width; 0 keeps none."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the matrix products; weights, norms and losses stay float32. auto: bf16 where the machine gains from it."""
    max_skipped_steps: int = Field(20, ge=0)
    """Steps in a row that may be skipped because their gradient is not finite; after more of them training stops."""
    seed: int = 0
    """Seed of everything: weights, data order, noise, times, dropped labels."""
    log_every: int = Field(100, ge=1)
    """Steps between rows in metrics.jsonl: only these wait for the device."""
    save_every: int = Field(10_000, ge=1)
    """Steps between checkpoints."""
    save_minutes: float = Field(0.0, ge=0)
    """Minutes after which a checkpoint is also written; 0 counts steps only."""
    keep_checkpoints: int = Field(2, ge=0)
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = Field(0, ge=0)
    """Steps between checkpoints that are kept for ever, in addition to the newest; 0 keeps none of them."""
    async_save: bool = False
    """Write checkpoints from a copy in memory while training goes on."""
    wandb: str = ""
    """Weights & Biases project that gets the rows of metrics.jsonl too; empty: none. WANDB_MODE=offline stays on this machine."""
    preview: PreviewConfig = PreviewConfig()
    """Samples and their distance while training."""

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
                "the targets ema and run share one pass of one other network: give all the same earlier and cleanest, or path, step "
                "and scale"
            )

    def _check_streams(self) -> None:
        names = [s.name for s in self.streams]
        if "x" in names or len(names) != len(set(names)):
            raise ValueError(
                f"the streams are called {', '.join(names)}: each needs a --streams.0.name that no other has, and none is x"
            )
        if self.diffusion.objective == "ddpm" and self.streams:
            raise ValueError(
                "the objective ddpm trains a variance too, which streams have none of: leave the streams out, or choose the objective flow"
            )
        if self.diffusion.token_times and self.streams:
            raise ValueError(
                "--diffusion.token-times gives every token of the grid a time, and the token of a stream is not in the grid: choose one"
            )

    def _check_lora(self) -> None:
        if not self.init:
            raise ValueError(
                f"--lora.rank is {self.lora.rank}, but --init is empty, and a LoRA updates a trained network: give a run or a checkpoint"
            )
        for name, given, instead in (
            ("--ema-widths", " ".join(map(str, self.ema_widths)), "--ema-decays"),
            ("--parallel", self.parallel == "fsdp" and "fsdp", "ddp"),
            ("--fp8", self.fp8, "bf16"),
            ("--optimizer.name", self.optimizer.name == "muon" and "muon", "adamw"),
        ):
            if given:
                raise ValueError(
                    f"{name} {given} does not go with --lora.rank {self.lora.rank}: choose {instead}, or train all weights"
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
                "the optimizer muon needs each matrix whole, and --parallel fsdp divides them: choose ddp, or adamw"
            )
        if self.fused_update and self.optimizer.name != "adamw":
            raise ValueError(
                f"--fused-update is AdamW's, but the optimizer is {self.optimizer.name}: choose adamw, or leave it out"
            )
        if self.snapshot_every and not self.ema_widths:
            raise ValueError(
                "--snapshot-every keeps the averages of --ema-widths, of which there are none: give some, such as 0.05 0.1"
            )

    def _check_accumulation(self) -> None:
        """A part of the batch is another batch to a loss that compares its images."""
        from repa.alignment.losses import looks_at_other_images

        for alignment in self.alignments:
            if looks_at_other_images(LOSSES.build(alignment.loss)):
                raise UserError(
                    f"--accumulate is {self.accumulate}, but the loss {alignment.loss!r} of the alignment {alignment.key!r} compares the "
                    "images of the whole batch: choose 1, or the loss cosine."
                )


def _other_pass(target: str) -> tuple:
    """What a target "ema:..." or "run:..." says of the pass that it looks at; only blocks of one pass may differ."""
    name, settings = parse_spec(target)
    # Defaults filled in: "ema:depth=4" and "ema:depth=8,earlier=0.0" look at one pass.
    defaults: dict[str, dict[str, Any]] = {
        "ema": {"earlier": 0.0, "cleanest": False},
        "run": {"path": "", "step": -1, "scale": 30.0},
    }
    return name, *(settings.get(key, value) for key, value in defaults[name].items())
