"""The two runs of `repa quickstart`."""

from repa.alignment.config import AlignmentConfig
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.training.config import OptimizerConfig, PreviewConfig, TrainConfig


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
        model=ModelConfig(name="SiT-S/4", hidden_dim=128, depth=6, num_heads=2, patch_overlap=2),
        diffusion=DiffusionConfig(prediction="data"),
        alignments=(alignment,),
        optimizer=OptimizerConfig(name="muon", learning_rate=4e-3),
        batch_size=32,
        num_steps=600,
        ema_decay=0.98,
        log_every=10,
        save_every=300,
        preview=PreviewConfig(every=150, num_images=16, num_scored=500, num_steps=8),
    )


def quickstart() -> TrainConfig:
    """The baseline of `repa quickstart`; its alignment is measured by a projector that the network does not feel."""
    return _quickstart(measure_only=True)


def quickstart_repa() -> TrainConfig:
    """The aligned run of `repa quickstart`: the same network, seeds and budget, aligned to the embedded encoder."""
    return _quickstart(measure_only=False)
