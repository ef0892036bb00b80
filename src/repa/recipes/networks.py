"""Recipes of networks other than the paper's SiT: for other latents, with an encoder and a head, for pixels, and for text.

LightningDiT on VA-VAE, DDT, DiT^DH on RAE, JiT with PixelREPA's alignment, MMDiT. docs/methods/latents.md, ddt.md and
pixels.md, and docs/text.md explain them: equation, picture, use and cost.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from repa.alignment.config import AlignmentConfig
from repa.autoencoders import AUTOENCODER
from repa.diffusion.config import DiffusionConfig
from repa.models.config import SIZES, ModelConfig, dimensions
from repa.recipes.recipe import EIGHT, PUBLISHED, Recipe, commands, headline, paragraphs, results_table
from repa.recipes.small import cifar10
from repa.training.config import OptimizerConfig, TrainConfig

EPOCH = 1251  # steps of 1024 images in ImageNet's 1.28 million
UNCLIPPED = 1e9  # a norm that no gradient exceeds
RAE_HEAD = "ddt:head_depth=2,head_dim=2048,head_heads=16,positions=true,times=fourier,silu_twice=true"
DDT_HEAD = "ddt:head_depth={depth},final_norm=layer,extent=16,max_period=10"
# JiT's mean is -0.8 because its time runs the other way.
CLEAN_IMAGES = DiffusionConfig(prediction="data", loss_weight="velocity", timesteps="logit_normal:mean=0.8,std=0.8")
CAPTIONS = "coco/annotations/captions_{}2014.json"


def _batch(size: int, max_grad_norm: float = 1.0) -> dict[str, Any]:
    """Batch size with its learning rate: 1e-4 for 256 images and 2e-4 for 1024."""
    rate = 2e-4 if size == 1024 else 1e-4
    return {
        "batch_size": size,
        "optimizer": OptimizerConfig(learning_rate=rate, beta2=0.95, max_grad_norm=max_grad_norm),
    }


def lightningdit(size: str) -> TrainConfig:
    """DiT with RMSNorm, SwiGLU and rotary positions on VA-VAE's 16 x 16 x 32 latents; the XL with its paper's batch size."""
    return TrainConfig(
        model=ModelConfig(name=f"SiT-{size}/1", norm="rms", mlp="swiglu", rotary=True),
        diffusion=DiffusionConfig(timesteps="logit_normal", velocity_cosine=1.0),
        autoencoder="va-vae",
        num_steps=64 * EPOCH if size == "XL" else 400_000,
        **_batch(1024 if size == "XL" else 256, UNCLIPPED),
    )


def ddt(size: str) -> TrainConfig:
    """DDT with 22 + 6 blocks for XL and 8 + 4 for B, aligned to DINOv2-B in the encoder."""
    hidden_dim = SIZES[size][0]
    term = AlignmentConfig(target="dinov2-b", depth=8 if size == "XL" else 4, projector=f"mlp:width={hidden_dim}")
    blocks = {"norm": "rms", "mlp": "swiglu", "qk_norm": "rms", "bias": False, "rotary": True}
    backbone = DDT_HEAD.format(depth=6 if size == "XL" else 4)
    return TrainConfig(
        model=ModelConfig(name=f"SiT-{size}/2", backbone=backbone, **blocks),
        diffusion=DiffusionConfig(timesteps="logit_normal"),
        alignments=(term,),
        autoencoder=AUTOENCODER,
        num_steps=2_000_000 if size == "XL" else 400_000,
        **_batch(256),
    )


def rae(size: str) -> TrainConfig:
    """DiT^DH: an encoder of the named size and a head of two blocks of width 2048, on DINOv2-B's 16 x 16 x 768 tokens."""
    blocks = {"norm": "rms", "mlp": "swiglu", "rotary": True, "depth": SIZES[size][1] + 2}
    return TrainConfig(
        model=ModelConfig(name=f"SiT-{size}/1", backbone=RAE_HEAD, **blocks),
        diffusion=DiffusionConfig(shift="auto"),
        autoencoder="rae-dinov2-b",
        num_steps={"XL": 80 * EPOCH, "S": 14 * EPOCH}.get(size, 400_000),
        ema_decay=0.9999 if size == "B" else 0.9995,
        **_batch(256 if size == "B" else 1024),
    )


def jit(size: str) -> TrainConfig:
    """JiT-B/16 and so on, as in the paper for ImageNet at 256 pixels."""
    return TrainConfig(
        model=ModelConfig(name=f"JiT-{size}/16", backbone="jit"),
        diffusion=CLEAN_IMAGES,
        autoencoder="pixels",
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=5 * EPOCH, beta2=0.95, max_grad_norm=UNCLIPPED),
        batch_size=1024,
        num_steps=600 * EPOCH,
        ema_decay=0.9999,
        ema_decays=(0.9996,),
    )


def pixelrepa(size: str) -> TrainConfig:
    """JiT aligned at the last block before the class tokens enter, at a third of the depth."""
    sizes = dimensions(f"JiT-{size}/16")
    adapter = f"adapter:masked=0.2,heads={sizes.num_heads}"
    term = AlignmentConfig(target="dinov2-b", depth=sizes.depth // 3, projector=adapter, weight=0.1)
    return jit(size).override(alignments=(term,))


def cifar10_jit() -> TrainConfig:
    """The recipe cifar10 with a small JiT on patches of 4 x 4 pixels instead of the SiT."""
    model = {"backbone": "jit:bottleneck=16,class_tokens=4", "patch_size": 4}
    baseline = cifar10()
    return baseline.override(alignments=(), model=baseline.model.override(**model), diffusion=CLEAN_IMAGES)


def cifar10_pixelrepa() -> TrainConfig:
    """The recipe cifar10-jit, aligned to the package's encoder `tiny` through an adapter."""
    adapter = "adapter:masked=0.2,class_tokens=4"
    return cifar10_jit().override(alignments=(AlignmentConfig(target="tiny", depth=2, projector=adapter, weight=0.1),))


def coco(*, aligned: bool) -> TrainConfig:
    """MMDiT with 24 blocks of width 768 and 24 heads, and PyTorch's default initialisation as in the released code."""
    return TrainConfig(
        model=ModelConfig(name="SiT-B/2", backbone="mmdit:reference_init=true", depth=24, num_heads=24),
        alignments=(AlignmentConfig(target="dinov2-b", depth=8),) if aligned else (),
        text="clip-l",
        num_steps=150_000,
    )


@dataclass(frozen=True)
class PaperNetwork:
    """A paper's network, in several sizes."""

    title: str
    """Description after the name of the model."""
    paper: str
    page: str
    make: Callable[[str], TrainConfig]
    names: Mapping[str, tuple[str, str]]
    """Name of the recipe -> size, and the model's name in the published results."""
    sampling: str
    """Options of `repa sample`; {scale} is the guidance scale."""
    notes: tuple[str, ...]
    flip: bool = True
    scales: Mapping[str, float] = field(default_factory=dict)
    """Size -> guidance scale, for papers that report only guided results."""
    group: str = "Other latents, and DDT"


_TRAINING_OF_B = "The B trains here with batch 256, learning rate 1e-4 and 400K steps, like SiT-B/2; the paper's results are of the XL."
_XAVIER = "Initialised as DiT, with adaLN-Zero and Xavier; the released code leaves some at PyTorch's default."
_NOTES_OF_JIT = (
    "As in the papers: prediction of the clean image with the loss of the implied velocity, batch 1024, AdamW 2e-4 after 5 epochs",
    "of warm-up, beta2 0.95, no gradient clipping, two averages, mirrored images, 600 epochs of 1.28 million images.",
    "Differences: mirrored copies are stored; their results are from torch-fidelity, with its own reference. The released H also",
    "drops a fifth of the outputs of its middle blocks in training; networks here have no dropout.",
)
# The papers guide at data times above 0.1, which are times below 0.9 here. One of 50 steps is at 0.9, and intervals here
# are closed.
_JIT_SAMPLING = "--sampler heun --steps 50 --labels balanced --guidance cfg:scale={scale},high=0.89"
NETWORKS = {
    "lightningdit": PaperNetwork(
        "on VA-VAE", "2501.01423", "latents.md", lightningdit,
        {"lightningdit-b1": ("B", "LightningDiT-B/1"), "lightningdit-xl1": ("XL", "LightningDiT-XL/1")},
        "--sampler euler:shift=3.3333 --steps 249 --guidance cfg:scale=10,high=0.89,channels=3",
        (
            "As in the paper: batch 1024, AdamW 2e-4 with beta2 0.95, no clipping, mirrored images, logit-normal times.",
            "For 800 epochs add --num-steps 1000800 to `train`; the paper then uses cfg:scale=6.7,high=0.875,channels=3.",
            "Only the sampler has the shift 1 / 0.3, and only 3 of the 32 channels are guided, as in the released code, whose 250 steps",
            "are 250 times, ends included: 249 steps here.",
            _TRAINING_OF_B,
        ),
    ),
    "ddt": PaperNetwork(
        "on the latents of SiT", "2504.05741", "ddt.md", ddt,
        {"ddt-b2": ("B", "DDT-B/2"), "ddt-xl2": ("XL", "DDT-XL/2")},
        # Guided at data times above 0.3, and one of 250 steps is at 0.7 here.
        "--sampler euler --steps 250 --guidance cfg:scale=2,high=0.699",
        (
            "As in the paper: batch 256, AdamW 1e-4 with beta2 0.95, logit-normal times, a projector of the network's width.",
            "The paper resizes targets of other grids bilinearly; here the grids are the same.",
            f"{_TRAINING_OF_B} Its aligned block 4 is chosen here.",
            _XAVIER,
        ),
        flip=False,
    ),
    "rae": PaperNetwork(
        "on RAE", "2510.11690", "latents.md", rae,
        {"rae-dh-s": ("S", "DiT-DH-S"), "rae-dh-b": ("B", "DiT-DH-B"), "rae-dh-xl": ("XL", "DiT-DH-XL")},
        "--sampler euler --steps 49 --labels balanced",
        (
            "As in the paper: batch 1024, AdamW 2e-4 with beta2 0.95, clip 1, EMA 0.9995, mirrored images, the shift of the latents' size.",
            "The released code's 50 steps are 50 times, ends included: 49 steps here.",
            "Difference: the paper decreases the learning rate from epoch 40 to a tenth at epoch 800; here it is constant for 80 epochs.",
            "The S is the weaker network of autoguidance: --guidance autoguidance:scale=1.42 --weak runs/rae-dh-s.",
            f"{_TRAINING_OF_B} It has batch 256 and EMA 0.9999.",
            _XAVIER,
        ),
    ),
    "jit": PaperNetwork(
        "on pixels", "2511.13720", "pixels.md", jit,
        {"jit-b16": ("B", "JiT-B/16"), "jit-h16": ("H", "JiT-H/16")}, _JIT_SAMPLING, _NOTES_OF_JIT,
        scales={"B": 2.9, "H": 2.2}, group="JiT, on pixels",
    ),
    "pixelrepa": PaperNetwork(
        "with PixelREPA's adapter", "2603.14366", "pixels.md", pixelrepa,
        {f"jit-{size.lower()}16-pixelrepa": (size, f"JiT-{size}/16") for size in "BLH"}, _JIT_SAMPLING,
        (
            *_NOTES_OF_JIT,
            "The target is DINOv2's 16 x 16 tokens at 224 pixels; the released code cuts 256 pixels into patches of 16.",
        ),
        scales={"B": 3.1, "L": 2.8, "H": 2.4}, group="JiT, on pixels",
    ),
}  # fmt: skip


def network_recipes() -> dict[str, Recipe]:
    """The recipes `lightningdit-b1`, `ddt-xl2`, `rae-dh-xl`, `jit-b16`, `coco-mmdit` and so on, and two for a CPU."""
    return {
        "coco-mmdit": _coco("coco-mmdit", "MMDiT on MS-COCO without alignment", aligned=False),
        "coco-mmdit-repa": _coco("coco-mmdit-repa", "MMDiT on MS-COCO aligned to dinov2-b after block 8", aligned=True),
        **{name: _recipe(name, key) for key, network in NETWORKS.items() for name in network.names},
        "cifar10-jit": Recipe.of(cifar10_jit, pixels=32),
        "cifar10-pixelrepa": Recipe.of(cifar10_pixelrepa, pixels=32),
    }


def _recipe(name: str, key: str) -> Recipe:
    network, figures = NETWORKS[key], PUBLISHED[key]
    size, model = network.names[name]
    autoencoder, flip = network.make(size).autoencoder, " --flip true" if network.flip else ""
    prepare = f"--resolution 256 --autoencoder {autoencoder}{flip}"
    sampling = network.sampling.format(scale=network.scales.get(size))
    parts = [
        [f"{name}: {model} {network.title}, arXiv {network.paper}. docs/methods/{network.page} explains it."],
        list(network.notes),
        commands(name, f"imagenet256-{autoencoder}", prepare, sampling),
        results_table(figures),
    ]
    known = headline(figures, model, guided=bool(network.scales))
    about = f"{model} {network.title} (arXiv {network.paper}): {known}"
    return Recipe(lambda: network.make(size), about, paragraphs(*parts), group=network.group)


def _coco(name: str, subject: str, *, aligned: bool) -> Recipe:
    figures = PUBLISHED[name]
    validation = "data/coco-val"
    parts = [
        [f"{name}: {subject}, 256 pixels, text by CLIP-L (arXiv 2410.06940, text-to-image). docs/text.md explains it."],
        [
            "As in the paper: 505,070,608 parameters, and 7,344,896 of the projector; AdamW 1e-4, batch 256, a random caption per image,",
            "replaced by the empty text with probability 0.1. Difference: bf16 or float32, unless --precision fp16 is given.",
        ],
        [
            *(
                f"repa prepare {CAPTIONS.format(split)} data/coco-{split} --resolution 256 --autoencoder {AUTOENCODER} --text clip-l"
                for split in ("train", "val")
            ),
            f"{EIGHT} train {name} --data data/coco-train --out runs/{name}",
            f"{EIGHT} sample runs/{name} --prompt-data {validation} --num-images 40192 --sampler euler_maruyama --steps 250 "
            f"--guidance cfg:scale=2 --out samples/{name}.npz",
            f"repa evaluate samples/{name}.npz --reference {validation} --metrics fid",
        ],
        [
            "FID of 40,192 samples, one for the first caption of each validation image, in order, against the validation images.",
            *results_table(figures),
            "Users of the released code report 8.35 instead of the paper's 4.73; the reason is unknown.",
        ],
    ]  # fmt: skip
    best = min(f.fid for f in figures)
    return Recipe(
        lambda: coco(aligned=aligned),
        f"{subject} (arXiv 2410.06940): FID {best} at 150K, guided",
        paragraphs(*parts),
        group="Text to image",
    )
