"""JiT, diffusion on the pixels themselves (arXiv 2511.13720), and PixelREPA's alignment of it (arXiv 2603.14366).

docs/methods/pixels.md explains both: equation, where it looks, when to use it, what it costs.
"""

from repa.alignment.config import AlignmentConfig
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig, dimensions
from repa.recipes.published import PUBLISHED, figures_table, headline
from repa.recipes.recipe import Recipe, commands, paragraphs
from repa.recipes.small import cifar10
from repa.training.config import OptimizerConfig, TrainConfig

BATCH, EPOCH = 1024, 1251  # images of a step, and steps in ImageNet's 1.28 million images
GUIDANCE = {  # scales of the papers, for data times from 0.1 to 1, which are 0 to 0.9 here
    "jit": {"B": 2.9, "H": 2.2},
    "pixelrepa": {"B": 3.1, "L": 2.8, "H": 2.4},
}
NOTES = (
    "As in the papers: the clean image is predicted and the velocity that it implies compared, batch 1024, AdamW 2e-4 after 5 epochs",
    "of warm-up, beta2 0.95, gradients not clipped, two averages, mirrored images, 600 epochs of 1.28 million images.",
    "Not as there: the mirrored copies are stored; their figures are of torch-fidelity, with its own reference.",
)
OF_H = "The released H also drops a fifth of the outputs of its middle blocks in training; a network here draws no random numbers."
OF_TARGET = "The target's tokens are those of DINOv2 at 224 pixels, 16 x 16; the released code cuts 256 pixels into patches of 16."


def jit(size: str) -> TrainConfig:
    """JiT-B/16 and so on, as trained on ImageNet at 256 pixels."""
    return TrainConfig(
        model=ModelConfig(name=f"JiT-{size}/16", backbone="jit"),
        diffusion=of_clean_images(),
        autoencoder="pixels",
        optimizer=OptimizerConfig(
            learning_rate=5e-5 * BATCH / 256, warmup_steps=5 * EPOCH, beta2=0.95, max_grad_norm=1e9
        ),
        batch_size=BATCH,
        num_steps=600 * EPOCH,
        ema_decay=0.9999,
        ema_decays=(0.9996,),
    )


def pixelrepa(size: str) -> TrainConfig:
    """The tap is the last block before the class tokens come in, a third of the depth."""
    sizes = dimensions(f"JiT-{size}/16")
    adapter = f"adapter:masked=0.2,heads={sizes.num_heads}"
    return jit(size).override(alignments=(aligned("dinov2-b", sizes.depth // 3, adapter),))


def cifar10_jit() -> TrainConfig:
    """The recipe cifar10 with a small JiT on patches of 4 x 4 pixels in place of the SiT."""
    model = {"backbone": "jit:bottleneck=16,class_tokens=4", "patch_size": 4}
    baseline = cifar10()
    return baseline.override(alignments=(), model=baseline.model.override(**model), diffusion=of_clean_images())


def cifar10_pixelrepa() -> TrainConfig:
    """The same as cifar10-jit, aligned to the embedded encoder `tiny` through an adapter."""
    return cifar10_jit().override(alignments=(aligned("tiny", 2, "adapter:masked=0.2,class_tokens=4"),))


def of_clean_images() -> DiffusionConfig:
    """JiT's mean of -0.8 is of data times, which run the other way."""
    return DiffusionConfig(prediction="data", loss_weight="velocity", timesteps="logit_normal:mean=0.8,std=0.8")


def aligned(encoder: str, depth: int, adapter: str) -> AlignmentConfig:
    return AlignmentConfig(target=encoder, depth=depth, projector=adapter, weight=0.1)


def pixel_recipes() -> dict[str, Recipe]:
    """`jit-b16`, `jit-h16`, `jit-b16-pixelrepa` and so on, and two for a CPU."""
    full = {f"jit-{size.lower()}16": _full("jit", size) for size in GUIDANCE["jit"]}
    full |= {f"jit-{size.lower()}16-pixelrepa": _full("pixelrepa", size) for size in GUIDANCE["pixelrepa"]}
    small = {"cifar10-jit": Recipe.of(cifar10_jit), "cifar10-pixelrepa": Recipe.of(cifar10_pixelrepa)}
    return full | small


def _full(key: str, size: str) -> Recipe:
    name = f"jit-{size.lower()}16" + ("-pixelrepa" if key == "pixelrepa" else "")
    paper = {"jit": "2511.13720", "pixelrepa": "2603.14366"}[key]
    subject = f"JiT-{size}/16" + (" with PixelREPA's adapter" if key == "pixelrepa" else "")
    sampling = f"--sampler heun --steps 50 --labels balanced --guidance cfg:scale={GUIDANCE[key][size]},high=0.9"
    notes = [*NOTES, *[OF_H] * (size == "H"), *[OF_TARGET] * (key == "pixelrepa")]
    parts = [
        [f"{name}: {subject}, arXiv {paper}. docs/methods/pixels.md explains it."],
        notes,
        commands(name, "imagenet256-pixels", "--resolution 256 --flip true", sampling),
        figures_table(PUBLISHED[key]),
    ]
    return Recipe(
        lambda: {"jit": jit, "pixelrepa": pixelrepa}[key](size),
        f"{subject} (arXiv {paper}): {headline(PUBLISHED[key], f'JiT-{size}/16', guided=True)}",
        paragraphs(*parts),
        group="JiT, on pixels",
    )
