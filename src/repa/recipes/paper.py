"""From a row of the paper's tables to a recipe: the configuration, and the promise with commands and figures."""

from repa.alignment.config import AlignmentConfig
from repa.autoencoders import AUTOENCODER
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.recipes.paper_tables import FACTOR, SAMPLINGS, Figures, Row, printed, steps_text
from repa.recipes.recipe import Recipe, commands, paragraphs
from repa.sampling.config import SampleConfig
from repa.training.config import TrainConfig

GROUP = "REPA, the rows of its paper"
DIFFERENCES = (
    "As in the paper: no augmentation, AdamW 1e-4, batch 256, gradients clipped at 1, EMA 0.9999.",
    "Not as there: bf16 or float32, unless --precision fp16 asks for the paper's fp16 with a loss scaler; labels are dropped",
    "once, with probability 0.1, where some published runs may have dropped them twice (0.19 in all).",
)


def paper_recipe(name: str, row: Row) -> Recipe:
    samplings = {
        figures.sampling: SampleConfig.parse(SAMPLINGS[figures.sampling]) for figures in row.figures if figures.sampling
    }
    return Recipe(
        lambda: train_config(row),
        f"{subject(row)} ({row.table}): {headline(row)}",
        promise(name, row),
        samplings,
        GROUP,
    )


def train_config(row: Row) -> TrainConfig:
    """Whatever the row does not name is the paper's, which the defaults of TrainConfig are."""
    alignments = (AlignmentConfig(**row.alignment),) if row.alignment else ()
    # at 256 the size is left to the data, so that a recipe also trains on others; at 512 other data would be a mistake
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


def headline(row: Row) -> str:
    """'FID 7.9 at 400K, 5.9 at 4M, 1.42 guided': the first result of the full length, the last, the best guided one."""
    whole = [figures for figures in row.figures if figures not in row.guided and figures.step >= row.num_steps]
    guided = [figures.fid for figures in row.guided]
    ends = dict.fromkeys([*whole[:1], *whole[-1:]])
    parts = [f"{printed(figures.fid)} at {steps_text(figures.step)}" for figures in ends]
    parts += [f"{printed(min(guided))} guided"] if guided else []
    return f"FID {', '.join(parts)}" if parts else "no figure known"


def promise(name: str, row: Row) -> str:
    """What `repa show` prints above the configuration."""
    sampling = next((figures.sampling for figures in row.figures if figures.sampling), "sde")
    return paragraphs(
        [
            f"{name}: {subject(row)}.",
            f"It reproduces {row.table} of REPA, arXiv 2410.06940; the figures are the paper's.",
        ],
        [*DIFFERENCES, *([row.note] if row.note else [])],
        commands_of(name, row.resolution, sampling),
        [f"Hardware and time: {expected_time(row)}", *_longer(row)],
        figures_table(row),
    )


def commands_of(name: str, resolution: int = 256, sampling: str = "sde", guidance: str = "") -> list[str]:
    data, guided = f"imagenet{resolution}", f" --guidance {guidance}" if guidance else ""
    return [
        *commands(name, data, f"--resolution {resolution} --autoencoder {AUTOENCODER}", f"{options(sampling)}{guided}"),
        f"The paper's reference is ADM's file of {resolution} pixels: give its .npz in place of {data} to compare with the figures below.",
    ]


def options(sampling: str) -> str:
    """The settings of SAMPLINGS as options of `repa sample`."""
    config = SampleConfig.parse(SAMPLINGS[sampling])
    text = f"--sampler {config.sampler} --steps {config.steps}"
    return f"{text} {_guidance_options(config)}".rstrip()


def expected_time(row: Row) -> str:
    """8 GPUs: the paper gives one speed."""
    if row.steps_per_second is None:
        return "not stated in the paper."
    hours = row.num_steps / row.steps_per_second / 3600
    return f"{row.steps_per_second:g} steps per second on 8 H100, {hours:.1f} h for {steps_text(row.num_steps)} steps."


def figures_table(row: Row) -> list[str]:
    """The paper's figures, one line each."""
    if not row.figures:
        return ["The paper's figures are not known here."]
    heads = ("steps", "FID", "sFID", "IS", "precision", "recall", "probe %", "guidance")
    cells = [[f"{f.step:,}", *map(printed, f[1:7]), _how(f)] for f in row.figures]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads) - 1)]
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
        for line in [heads, *cells]
    ]


def _longer(row: Row) -> list[str]:
    steps = [figures.step for figures in row.figures if figures.step > row.num_steps]
    return [f"For the figures after more steps add --num-steps {max(steps)} to `train`."] if steps else []


def _how(figures: Figures) -> str:
    if not figures.sampling:
        return "not known"
    return _guidance_options(SampleConfig.parse(SAMPLINGS[figures.sampling])) or "none"


def _guidance_options(config: SampleConfig) -> str:
    return " ".join(f"--guidance {spec}" for spec in config.guidance)
