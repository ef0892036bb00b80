"""A few thousand images of your own: from scratch at 64 and 256 pixels, and fine-tuning of a trained network.

What they share, because the data is small: rates after a warm-up, averages that remember a thousand steps and not ten thousand,
an end after a number of passes over the data, checkpoints from before it is memorised, and alignment that stops when it has
nothing more to teach.
"""

from repa.alignment.config import AlignmentConfig
from repa.autoencoders import AUTOENCODER
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.recipes.recipe import Recipe
from repa.training.config import OptimizerConfig, PreviewConfig, TrainConfig

GROUP = "A few thousand images of your own"
STOP = "plateau:span=500,gain=0.002"  # HASTE's early stop, found by the loss itself
SHARED = {
    "batch_size": 64,
    "ema_decay": 0.999,
    "log_every": 50,
    "save_every": 1000,
    "keep_every": 5000,
    "preview": PreviewConfig(every=1000, num_images=16),
}
NOTES = (
    "Passes over the data end it, 50,000 steps at most: with 3,000 images and their mirrored copies 300 passes are 28,000 steps.",
    "Look at the previews: the network memorises images sooner or later, and `repa analyse neighbours` shows copies. Not tuned: the",
    "rates are those that the papers and common practice give for this size, and no figure is promised.",
)


def own_images_64() -> TrainConfig:
    """SiT-S on pixels, 256 tokens of 4 x 4; it predicts the image, as a patch of 48 numbers is much of a width of 384."""
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
    """SiT-B/2 on latents, aligned at the depth that REPA gives for B."""
    return TrainConfig(
        model=ModelConfig(name="SiT-B/2"),
        alignments=(AlignmentConfig(target="dinov2-b", depth=4, schedule=STOP),),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=500),
        epochs=300,
        num_steps=50_000,
        **SHARED,
    )


def finetune_256() -> TrainConfig:
    """SiT-XL/2 from a released checkpoint or a run, all weights or a LoRA; the alignment is of relations between tokens."""
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
            own_images_64, "a SiT-S on the pixels of a few thousand images, 64 x 64, from scratch",
            (prepare.format(64), "repa train own-images-64 --data mine --out runs/mine"),
        ),
        "own-images-256": (
            own_images_256, "a SiT-B/2 on a few thousand images, 256 x 256, from scratch",
            (latents, "repa train own-images-256 --data mine --out runs/mine"),
        ),
        "finetune-256": (
            finetune_256, "a trained network (--init) goes on with a few thousand images, 256 x 256; --lora.rank 16 for a LoRA",
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
