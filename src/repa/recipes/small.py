"""Small runs that a CPU can train: those of `repa quickstart`, two on CIFAR-10's pixels, and one on captions."""

from repa.alignment.config import AlignmentConfig
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.training.config import OptimizerConfig, PreviewConfig, TrainConfig

SIZE = {"hidden_dim": 128, "depth": 6, "num_heads": 2}
SHORT = {"batch_size": 32, "ema_decay": 0.98, "log_every": 10}  # of a training of minutes


def _quickstart(*, measure_only: bool) -> TrainConfig:
    """The small SiT of `repa quickstart`: 32-pixel images, 64 tokens, 1.9M parameters.

    It departs from the paper where minutes on two CPU cores ask for it: it predicts data, because a patch of 48 numbers is
    much of a width of 128, its patches overlap, or their edges would be seen, and Muon learns faster than AdamW in small
    batches. It is aligned as in iREPA (arXiv 2512.10794). docs/quickstart.md holds what it shows, over several seeds.
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
    """The baseline of `repa quickstart`; its alignment is measured by a projector without influence on the network."""
    return _quickstart(measure_only=True)


def quickstart_repa() -> TrainConfig:
    """The aligned run of `repa quickstart`: the same network, seeds and budget, aligned to the embedded encoder."""
    return _quickstart(measure_only=False)


def _cifar10(*, measure_only: bool) -> TrainConfig:
    """A small SiT on 32-pixel images: 256 tokens of 2 x 2 pixels, velocity prediction and everything else as in the paper.

    It departs in width, depth, batch and learning rate, so that a thousand steps take a quarter of an hour on one core.
    docs/results.md holds what it shows.
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
    """A small SiT on 32-pixel images without alignment, 256 tokens; a projector without influence on the network measures it."""
    return _cifar10(measure_only=True)


def cifar10_repa() -> TrainConfig:
    """The same as cifar10, aligned to the embedded encoder `tiny`, which learned on CIFAR-10 without labels."""
    return _cifar10(measure_only=False)


def quickstart_text() -> TrainConfig:
    """A small MMDiT on 32-pixel photographs with captions, aligned to the embedded encoder; docs/text.md shows that it follows words."""
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
