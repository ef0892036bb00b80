"""The results of REPA's tables (arXiv 2410.06940) as recipes: configuration, commands and published results."""

from dataclasses import dataclass
from typing import Any

from repa.alignment.config import AlignmentConfig
from repa.autoencoders import AUTOENCODER
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.recipes.recipe import (
    FACTOR,
    PUBLISHED,
    PublishedResult,
    Recipe,
    commands,
    first_and_last,
    paragraphs,
    printed,
    results_table,
    steps_text,
)
from repa.sampling.config import SampleConfig
from repa.training.config import TrainConfig

GROUP = "REPA, the results of its paper"
DIFFERENCES = (
    "As in the paper: no augmentation, AdamW 1e-4, batch 256, gradients clipped at 1, EMA 0.9999.",
    "Differences: bf16 or float32, unless --precision fp16 selects the paper's fp16 with a loss scaler; labels are dropped",
    "once, with probability 0.1, but some published runs may have dropped them twice (0.19 in total).",
)


@dataclass(frozen=True)
class Row:
    """A training run of the paper. All other settings are the same for all runs."""

    name: str
    table: str
    model: str
    target: str = ""
    """Encoder of the alignment; empty: no alignment."""
    depth: int = 8
    loss: str = "cosine"
    weight: float = 0.5
    resolution: int = 256
    steps_per_second: float | None = None
    """On 8 H100, if the paper reports it."""
    note: str = ""

    @property
    def figures(self) -> tuple[PublishedResult, ...]:
        return PUBLISHED.get(self.name, ())

    @property
    def alignment(self) -> dict[str, Any] | None:
        """The settings of its alignment term."""
        if not self.target:
            return None
        return {"target": self.target, "depth": self.depth, "loss": self.loss, "weight": self.weight}

    @property
    def objective(self) -> str:
        """flow for SiT, ddpm (improved DDPM) for DiT."""
        return "ddpm" if self.model.startswith("DiT") else "flow"

    @property
    def unguided(self) -> list[PublishedResult]:
        """Results without guidance."""
        return [figures for figures in self.figures if figures.guidance == "none"]

    @property
    def num_steps(self) -> int:
        """The steps of its first result: 400K, or more if there is no result at 400K."""
        return max(400_000, min((figures.step for figures in self.figures), default=0))


_SWAPPED = "Table 6 of the paper swaps the columns of the depths: 4 belongs to B, as in appendix G, and 8 to L and XL."
_L = "Table 3 prints 9.7 for SiT-L/2, which is NT-Xent's result: sit-l2-repa-dinov2-b-ntxent."
_INTERVAL = "A guidance with high=0.7 is on for t in [0, 0.7], where t = 0 is data; without high it is always on."
_512 = "Results of the paper's final version, by epochs (80 are 400K steps); the sampling settings are unknown."
_NEGATIVES = (
    "The paper gives neither the temperature nor the negatives of NT-Xent: docs/methods.md gives those used here."
)
_ENCODERS = {  # of Table 2, with notes
    "mae-l": "", "dino-b": "", "mocov3-l": "", "ijepa-h": "", "clip-l": "",
    "siglip-b": "SigLIP is only in the final version's table; its size and its results are unknown.",
    "dinov2-b": "Table 3 prints this result for SiT-L/2 too.", "dinov2-l": "", "dinov2-g": "",
}  # fmt: skip


def _nt_xent(name: str, target: str, depth: int = 8, note: str = "") -> Row:
    """Table 2: encoders and depths on SiT-L/2."""
    note = f"{note} {_NEGATIVES}".strip()
    return Row(f"sit-l2-repa-{name}", "Table 2", "SiT-L/2", target, depth, "nt_xent", note=note)


def _lambda(weight: float) -> Row:
    name = f"sit-xl2-repa-lambda{weight:g}"
    return Row(name, "the ablation of lambda", "SiT-XL/2", "dinov2-b", weight=weight, steps_per_second=5.4)


_ROWS = (
    Row("sit-b2", "Table 3", "SiT-B/2"),
    Row("sit-b2-repa", "Table 3, appendix G", "SiT-B/2", "dinov2-b", depth=4, note=_SWAPPED),
    Row("sit-l2", "Table 3", "SiT-L/2"),
    Row("sit-l2-repa", "Table 7, appendix G", "SiT-L/2", "dinov2-b", note=_L),
    Row("sit-xl2", "Table 3", "SiT-XL/2"),
    Row("sit-xl2-repa", "Table 3, Table 4, appendix G", "SiT-XL/2", "dinov2-b", steps_per_second=5.4, note=_INTERVAL),
    Row("dit-l2", "Table 3", "DiT-L/2"),
    Row("dit-l2-repa", "Table 3", "DiT-L/2", "dinov2-b"),
    Row("dit-xl2", "Table 3", "DiT-XL/2"),
    Row("dit-xl2-repa", "Table 3", "DiT-XL/2", "dinov2-b"),
    *(_nt_xent(f"{encoder}-ntxent", encoder, note=note) for encoder, note in _ENCODERS.items()),
    Row("sit-l2-repa-dinov2-l", "Table 2", "SiT-L/2", "dinov2-l"),
    *(_nt_xent(f"depth{depth}", "dinov2-l", depth) for depth in (6, 8, 10, 12, 14, 16)),
    *map(_lambda, (0.25, 0.5, 0.75, 1.0)),
    Row("sit-xl2-512", "the results at 512 pixels", "SiT-XL/2", resolution=512, note=_512),
    Row("sit-xl2-repa-512", "the results at 512 pixels", "SiT-XL/2", "dinov2-b", resolution=512, note=_512),
)
ROWS = {row.name: row for row in _ROWS}


def paper_recipes() -> dict[str, Recipe]:
    return {name: _recipe(row) for name, row in ROWS.items()}


def _recipe(row: Row) -> Recipe:
    samplings = dict.fromkeys(SampleConfig.parse(figures.sampling) for figures in row.figures if figures.sampler)
    about = f"{subject(row)} ({row.table}): {_headline(row)}"
    return Recipe(lambda: train_config(row), about, promise(row, next(iter(samplings), None)), tuple(samplings), GROUP)


def train_config(row: Row) -> TrainConfig:
    """The configuration of a run; other settings are the defaults of TrainConfig, which are the paper's."""
    alignments = (AlignmentConfig(**row.alignment),) if row.alignment else ()
    # at 256 the size comes from the data, so that the recipe also trains on others; at 512 other data would be a mistake
    latent_size = row.resolution // FACTOR if row.resolution != 256 else 0
    return TrainConfig(
        model=ModelConfig(name=row.model, latent_size=latent_size),
        diffusion=DiffusionConfig(objective=row.objective),
        alignments=alignments,
        num_steps=row.num_steps,
    )


def subject(row: Row) -> str:
    """'SiT-XL/2 aligned to dinov2-b after block 8, cosine, lambda 0.5'."""
    size = f" at {row.resolution} pixels" if row.resolution != 256 else ""
    if not row.target:
        return f"{row.model}{size} without alignment"
    return f"{row.model}{size} aligned to {row.target} after block {row.depth}, {row.loss}, lambda {row.weight:g}"


def _headline(row: Row) -> str:
    """'FID 7.9 at 400K, 5.9 at 4M, 1.42 guided': the first result from 400K steps, the last, and the best guided one."""
    whole = [f for f in row.figures if f.guidance in ("none", "not stated") and f.step >= row.num_steps]
    guided = [f.fid for f in row.figures if f.guidance not in ("none", "not stated")]
    if not whole:
        return "no figure known"
    return f"FID {first_and_last(whole)}" + (f", {printed(min(guided))} guided" if guided else "")


def promise(row: Row, sampling: SampleConfig | None) -> str:
    """The text that `repa show` prints above the configuration."""
    longer = [figures.step for figures in row.figures if figures.step > row.num_steps]
    return paragraphs(
        [
            f"{row.name}: {subject(row)}.",
            f"It reproduces {row.table} of REPA, arXiv 2410.06940; the results below are the paper's.",
        ],
        [*DIFFERENCES, *([row.note] if row.note else [])],
        commands_of(row.name, row.resolution, sampling.sampler if sampling else "euler_maruyama"),
        [
            f"Hardware and time: {expected_time(row)}",
            *([f"For the results after more steps add --num-steps {max(longer)} to `train`."] if longer else []),
        ],
        results_table(row.figures),
    )


def commands_of(name: str, resolution: int = 256, sampler: str = "euler_maruyama", guidance: str = "") -> list[str]:
    data, guided = f"imagenet{resolution}", f" --guidance {guidance}" if guidance else ""
    prepare = f"--resolution {resolution} --autoencoder {AUTOENCODER}"
    return [
        *commands(name, data, prepare, f"--sampler {sampler} --steps 250{guided}"),
        f"The paper's reference is ADM's file of {resolution} pixels: give its .npz instead of {data} to compare with the results below.",
    ]


def expected_time(row: Row) -> str:
    """Hours on 8 GPUs, from the speed in the paper."""
    if row.steps_per_second is None:
        return "not stated in the paper."
    hours = row.num_steps / row.steps_per_second / 3600
    return f"{row.steps_per_second:g} steps per second on 8 H100, {hours:.1f} h for {steps_text(row.num_steps)} steps."
