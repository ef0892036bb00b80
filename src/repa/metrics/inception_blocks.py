"""The parts of Inception-v3 (Szegedy et al. 2015), with the parameter names of the published weights.

N batch, H W height and width. A branch called dbl has one more convolution than the branch beside it.
"""

from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Side(TypedDict):
    """A kernel of one row or column, padded to keep the size."""

    kernel: tuple[int, int]
    padding: tuple[int, int]


ROW: Side = {"kernel": (1, 7), "padding": (0, 3)}
COLUMN: Side = {"kernel": (7, 1), "padding": (3, 0)}


def average_pool(x: Tensor) -> Tensor:
    """3 x 3 at stride 1; at the border the mean is over the pixels that exist, as in TensorFlow."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """35 x 35: (N, in, H, W) -> (N, 224 + pool, H, W)."""

    def __init__(self, in_channels: int, *, pool_channels: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3, self.branch_pool(average_pool(x))], 1)


class InceptionB(nn.Module):
    """35 x 35 -> 17 x 17: (N, in, H, W) -> (N, 480 + in, (H - 1) / 2, (W - 1) / 2)."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """17 x 17, factored 7 x 7 convolutions: (N, in, H, W) -> (N, 768, H, W)."""

    def __init__(self, in_channels: int, *, channels: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(in_channels, channels, 1)
        self.branch7x7_2 = BasicConv2d(channels, channels, **ROW)
        self.branch7x7_3 = BasicConv2d(channels, 192, **COLUMN)
        self.branch7x7dbl_1 = BasicConv2d(in_channels, channels, 1)
        self.branch7x7dbl_2 = BasicConv2d(channels, channels, **COLUMN)
        self.branch7x7dbl_3 = BasicConv2d(channels, channels, **ROW)
        self.branch7x7dbl_4 = BasicConv2d(channels, channels, **COLUMN)
        self.branch7x7dbl_5 = BasicConv2d(channels, 192, **ROW)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def with_branch1x1(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the part of it that sFID compares."""
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([branch1x1, branch7x7, double, self.branch_pool(average_pool(x))], 1), branch1x1

    def forward(self, x: Tensor) -> Tensor:
        return self.with_branch1x1(x)[0]


class InceptionD(nn.Module):
    """17 x 17 -> 8 x 8: (N, in, H, W) -> (N, 512 + in, (H - 1) / 2, (W - 1) / 2)."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, **ROW)
        self.branch7x7x3_3 = BasicConv2d(192, 192, **COLUMN)
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([branch3x3, branch7x7, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """8 x 8, branches that fork at their end: (N, in, H, W) -> (N, 2048, H, W). The last of the two pools by maximum."""

    def __init__(self, in_channels: int, *, average: bool):
        super().__init__()
        row: Side = {"kernel": (1, 3), "padding": (0, 1)}
        column: Side = {"kernel": (3, 1), "padding": (1, 0)}
        self.average = average
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, **row)
        self.branch3x3_2b = BasicConv2d(384, 384, **column)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, **row)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, **column)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = average_pool(x) if self.average else F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([
            self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled),
        ], 1)  # fmt: skip
