"""Recipes for a few thousand of your own images: from scratch at 64 and 256 pixels, and fine-tuning of a trained network.

Because the data are small, all have warm-up, averages over about a thousand steps instead of ten thousand, an end after a
number of epochs, checkpoints from before the network memorises images, and alignment that stops when its loss no longer falls.
"""

from repa.alignment.config import AlignmentConfig
from repa.autoencoders import AUTOENCODER
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.recipes.recipe import Recipe
from repa.training.config import OptimizerConfig, PreviewConfig, TrainConfig

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
