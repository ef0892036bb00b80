"""Two runs on CIFAR-10's pixels that a CPU can train: what alignment does at the paper's number of tokens."""

from repa.alignment.config import AlignmentConfig
from repa.models.config import ModelConfig
from repa.training.config import OptimizerConfig, PreviewConfig, TrainConfig


def _cifar10(*, measure_only: bool) -> TrainConfig:
    """A small SiT on 32-pixel images: 256 tokens of 2 x 2 pixels, velocity prediction and everything else as in the paper.

    It departs in width, depth, batch and learning rate, so that a thousand steps take a quarter of an hour on one core.
    docs/results.md holds what it shows.
    """
    alignment = AlignmentConfig(target="tiny", depth=2, projector="mlp:width=256", measure_only=measure_only)
    return TrainConfig(
        model=ModelConfig(name="SiT-S/2", hidden_dim=128, depth=6, num_heads=2),
        alignments=(alignment,),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        batch_size=32,
        num_steps=1000,
        ema_decay=0.98,
        log_every=10,
        save_every=250,
        preview=PreviewConfig(every=250, num_images=16, num_scored=500, num_steps=16),
    )


def cifar10() -> TrainConfig:
    """A small SiT on 32-pixel images without alignment, 256 tokens; a projector that the network does not feel measures it."""
    return _cifar10(measure_only=True)


def cifar10_repa() -> TrainConfig:
    """The same as cifar10, aligned to the embedded encoder `tiny`, which learned on CIFAR-10 without labels."""
    return _cifar10(measure_only=False)
