"""The two networks of this package: `tiny`, an alignment target, and `tiny-classifier`, a feature extractor for metrics.

docs/tiny-encoder.md describes their training.
"""

import math
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from repa.base import faults
from repa.base.errors import UserError
from repa.encoders.contract import Features, VisionEncoder, resize


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
