"""The small networks whose weights come inside the package; docs/tiny-encoder.md tells how they were trained."""

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class ConvNetShape(NamedTuple):
    """What a network looks like: one (width, stride, residual blocks) for each stage, and the width of its tokens."""

    stages: tuple[tuple[int, int, int], ...]
    dim: int

    @property
    def patch_size(self) -> int:
        """Pixels per token side: the product of the strides."""
        return math.prod(stride for _, stride, _ in self.stages)


SHAPES = {
    "tiny": ConvNetShape(stages=((64, 2, 1), (128, 2, 2)), dim=192),
    "tiny-judge": ConvNetShape(stages=((32, 1, 0), (48, 2, 1), (96, 2, 1), (128, 2, 0)), dim=128),
}


class ResidualBlock(nn.Module):
    """Pre-activation residual block; batch normalisation exists while training and is folded into the convolutions."""

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
        # No activation in front of the first stage: its input are pixels, half of which are negative.
        for index, stage in enumerate(self.stages):
            x = stage(F.relu(x) if index else x)  # (N, width, H / strides, W / strides)
        tokens = self.head(F.relu(x)).flatten(2).transpose(1, 2)  # (N, h*w, dim)
        return F.layer_norm(tokens, tokens.shape[-1:])
