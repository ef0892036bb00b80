"""Networks for other latents, or with an encoder and a head: LightningDiT on VA-VAE, DDT, DiT^DH on RAE.

docs/methods/latents.md and docs/methods/ddt.md explain them: equation, picture, when to use them, what they cost.
"""

from collections.abc import Callable
from typing import NamedTuple

from repa.alignment.config import AlignmentConfig
from repa.autoencoders import AUTOENCODER
from repa.diffusion.config import DiffusionConfig
from repa.models.config import SIZES, ModelConfig
from repa.recipes.published import PUBLISHED, figures_table, headline
from repa.recipes.recipe import Recipe, commands, paragraphs
from repa.training.config import OptimizerConfig, TrainConfig

EPOCH = 1251  # steps of 1024 images in ImageNet's 1.28 million
LARGE_BATCH = {"batch_size": 1024, "optimizer": OptimizerConfig(learning_rate=2e-4, beta2=0.95)}
SMALL_BATCH = {"batch_size": 256, "optimizer": OptimizerConfig(learning_rate=1e-4, beta2=0.95)}
RAE_HEAD = "ddt:head_depth=2,head_dim=2048,head_heads=16,positions=true,times=fourier,silu_twice=true"
DDT_HEAD = "ddt:head_depth={depth},final_norm=layer,extent=16,max_period=10"


def lightningdit(size: str) -> TrainConfig:
    """DiT with RMSNorm, SwiGLU and rotary positions on VA-VAE's 16 x 16 x 32 latents; the XL with the batch of its paper."""
    return TrainConfig(
        model=ModelConfig(name=f"SiT-{size}/1", norm="rms", mlp="swiglu", rotary=True),
        diffusion=DiffusionConfig(timesteps="logit_normal", velocity_cosine=1.0),
        autoencoder="va-vae",
        num_steps=64 * EPOCH if size == "XL" else 400_000,
        **_unclipped(LARGE_BATCH if size == "XL" else SMALL_BATCH),
    )


def ddt(size: str) -> TrainConfig:
    """22 + 6 blocks of an XL, 8 + 4 of a B, aligned to DINOv2-B inside the encoder."""
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
        **SMALL_BATCH,
    )


def rae(size: str) -> TrainConfig:
    """An encoder of the named size and two blocks of width 2048, on DINOv2-B's 16 x 16 x 768 tokens."""
    blocks = {"norm": "rms", "mlp": "swiglu", "rotary": True, "depth": SIZES[size][1] + 2}
    return TrainConfig(
        model=ModelConfig(name=f"SiT-{size}/1", backbone=RAE_HEAD, **blocks),
        diffusion=DiffusionConfig(shift="auto"),
        autoencoder="rae-dinov2-b",
        num_steps={"XL": 80 * EPOCH, "S": 14 * EPOCH}.get(size, 400_000),
        ema_decay=0.9999 if size == "B" else 0.9995,
        **(SMALL_BATCH if size == "B" else LARGE_BATCH),
    )


class PaperNetwork(NamedTuple):
    """A network of a paper in the sizes that are here."""

    title: str
    paper: str
    page: str
    make: Callable[[str], TrainConfig]
    names: dict[str, tuple[str, str]]
    """Name of the recipe -> size, and the model as PUBLISHED calls it."""
    sampling: str
    flip: bool
    notes: tuple[str, ...]


_OF_B = (
    "The B is trained here with batches of 256, 1e-4 and 400K steps, as SiT-B/2 is; the paper's figures are of the XL."
)
_STARTS = "Blocks start as the identity (adaLN-Zero) and matrices by Xavier, as in DiT; the released code leaves some at PyTorch's default."
FAMILIES = {
    "lightningdit": PaperNetwork(
        "LightningDiT on VA-VAE", "2501.01423", "latents.md", lightningdit,
        {"lightningdit-b1": ("B", "LightningDiT-B/1"), "lightningdit-xl1": ("XL", "LightningDiT-XL/1")},
        "--sampler euler:shift=3.3333 --steps 250 --guidance cfg:scale=10,high=0.89,channels=3",
        True,
        (
            "As in the paper: batch 1024, AdamW 2e-4 with beta2 0.95, no clipping, mirrored images, times by the logit-normal law.",
            "For 800 epochs add --num-steps 1000800 to `train`; the paper then guides with cfg:scale=6.7,high=0.875,channels=3.",
            "The shift 1 / 0.3 is of the sampler alone, and guidance is of 3 of the 32 channels, as in the released code.",
            _OF_B,
        ),
    ),
    "ddt": PaperNetwork(
        "DDT", "2504.05741", "ddt.md", ddt,
        {"ddt-b2": ("B", "DDT-B/2"), "ddt-xl2": ("XL", "DDT-XL/2")},
        "--sampler euler --steps 250 --guidance cfg:scale=2,high=0.7",
        False,
        (
            "As in the paper: batch 256, AdamW 1e-4 with beta2 0.95, times by the logit-normal law, a projector of the network's width.",
            "The paper's target of other grids is resized bilinearly; here the grids are the same.",
            f"{_OF_B} Its aligned block, 4, is chosen here.",
            _STARTS,
        ),
    ),
    "rae": PaperNetwork(
        "DiT^DH on RAE", "2510.11690", "latents.md", rae,
        {"rae-dh-s": ("S", "DiT-DH-S"), "rae-dh-b": ("B", "DiT-DH-B"), "rae-dh-xl": ("XL", "DiT-DH-XL")},
        "--sampler euler --steps 50 --labels balanced",
        True,
        (
            "As in the paper: batch 1024, AdamW 2e-4 with beta2 0.95, clip 1, EMA 0.9995, mirrored images, the shift of the latents' size.",
            "Not as there: the paper lowers the rate from epoch 40 to a tenth at epoch 800; these 80 epochs have it constant.",
            "The S is the weak network of autoguidance: --guidance autoguidance:scale=1.42 --weak runs/rae-dh-s.",
            f"{_OF_B} It has batches of 256 and EMA 0.9999.",
            _STARTS,
        ),
    ),
}  # fmt: skip


def latent_recipes() -> dict[str, Recipe]:
    """`lightningdit-b1`, `ddt-xl2`, `rae-dh-xl` and so on."""
    return {name: _recipe(name, key) for key, family in FAMILIES.items() for name in family.names}


def _recipe(name: str, key: str) -> Recipe:
    family, figures = FAMILIES[key], PUBLISHED[key]
    size, model = family.names[name]
    autoencoder, flip = family.make(size).autoencoder, " --flip true" if family.flip else ""
    parts = [
        [f"{name}: {family.title}, size {size}, arXiv {family.paper}. docs/methods/{family.page} explains it."],
        list(family.notes),
        commands(
            name, f"imagenet256-{autoencoder}", f"--resolution 256 --autoencoder {autoencoder}{flip}", family.sampling
        ),
        figures_table(figures),
    ]
    return Recipe(
        lambda: family.make(size),
        f"{model}, {family.title} (arXiv {family.paper}): {headline(figures, model)}",
        paragraphs(*parts),
        group="Other latents, and DDT",
    )


def _unclipped(settings: dict) -> dict:
    return {**settings, "optimizer": settings["optimizer"].override(max_grad_norm=1e9)}
