"""Named training configurations. A recipe is a function that returns a complete one; its docstring is its promise.

`repa list recipes` names them, `repa show NAME` prints one, and any field can be overridden on the command line.
"""

from collections.abc import Callable
from pathlib import Path

from repa.alignment.config import AlignmentConfig
from repa.base.errors import UserError, nearest
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.runs import layout
from repa.training.config import OptimizerConfig, PreviewConfig, TrainConfig

# Depth of the alignment by size: 4 for B, 8 for L and XL (the paper's Table 6 has these columns swapped, its appendix G has not).
PAPER_DEPTH = {"B": 4, "L": 8, "XL": 8}


def paper(size: str, *, aligned: bool) -> TrainConfig:
    """A row of Table 3: SiT at patch 2, batch 256, 400K steps, DINOv2-B, cosine similarity, lambda 0.5."""
    alignments = (AlignmentConfig(target="dinov2-b", depth=PAPER_DEPTH[size], weight=0.5),) if aligned else ()
    return TrainConfig(model=ModelConfig(name=f"SiT-{size}/2"), alignments=alignments)


def sit_b2() -> TrainConfig:
    """SiT-B/2 without alignment. Table 3: FID 33.0 after 400K steps (ImageNet 256, SDE, 250 steps, no guidance)."""
    return paper("B", aligned=False)


def sit_b2_repa() -> TrainConfig:
    """SiT-B/2 + REPA. Table 3: FID 24.4 after 400K steps."""
    return paper("B", aligned=True)


def sit_l2() -> TrainConfig:
    """SiT-L/2 without alignment. Table 3: FID 18.8 after 400K steps."""
    return paper("L", aligned=False)


def sit_l2_repa() -> TrainConfig:
    """SiT-L/2 + REPA. Table 3: FID 9.7 (NT-Xent) and 10.0 (cosine) after 400K steps."""
    return paper("L", aligned=True)


def sit_xl2() -> TrainConfig:
    """SiT-XL/2 without alignment. Table 3: FID 17.2 after 400K steps, 8.3 after 7M."""
    return paper("XL", aligned=False)


def sit_xl2_repa() -> TrainConfig:
    """SiT-XL/2 + REPA. Table 3: FID 7.9 after 400K steps, 5.9 after 4M; 1.42 with guidance 1.8 in [0, 0.7]. 8 H100: 20.6 h."""
    return paper("XL", aligned=True)


def _quickstart(*, measure_only: bool) -> TrainConfig:
    """The small SiT of `repa quickstart`: 32-pixel images, 64 tokens, 1.9M parameters.

    It departs from the paper where minutes on two CPU cores ask for it: it predicts data, because a patch of 48 numbers is
    much of a width of 128, and learns fast in small batches. docs/quickstart.md holds what it shows, over several seeds.
    """
    alignment = AlignmentConfig(target="tiny", depth=2, projector="mlp:width=256", measure_only=measure_only)
    return TrainConfig(
        model=ModelConfig(name="SiT-S/4", hidden_dim=128, depth=6, num_heads=2),
        diffusion=DiffusionConfig(prediction="data"),
        alignments=(alignment,),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        batch_size=32,
        num_steps=1000,
        ema_decay=0.98,
        log_every=10,
        save_every=500,
        preview=PreviewConfig(every=200, num_images=16, num_scored=500, num_steps=8),
    )


def quickstart() -> TrainConfig:
    """The baseline of `repa quickstart`; its alignment is measured by a projector that the network does not feel."""
    return _quickstart(measure_only=True)


def quickstart_repa() -> TrainConfig:
    """The aligned run of `repa quickstart`: the same network, seeds and budget, aligned to the embedded encoder."""
    return _quickstart(measure_only=False)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "sit-b2": sit_b2,
    "sit-b2-repa": sit_b2_repa,
    "sit-l2": sit_l2,
    "sit-l2-repa": sit_l2_repa,
    "sit-xl2": sit_xl2,
    "sit-xl2-repa": sit_xl2_repa,
    "quickstart": quickstart,
    "quickstart-repa": quickstart_repa,
}


def load_recipe(name: str) -> TrainConfig:
    """A recipe by name, or a YAML file such as the config.yaml of a run folder."""
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return TrainConfig.load(path)
    if (path / layout.CONFIG).is_file():
        return TrainConfig.load(path / layout.CONFIG)
    raise UserError(
        f"There is no recipe {name!r}: allowed are {', '.join(RECIPES)}, a .yaml file, or a run folder.{nearest(name, RECIPES)}"
    )
