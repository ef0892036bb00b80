"""FID's Inception-v3: the network of TensorFlow's inception-2015-12-05 graph (Szegedy et al. 2015), and its weights.

It differs from the network of the same name in image classification libraries by its 1008 outputs, by average pooling
without padding, and by max-pooling in the last block. Parameter names are those of the published weights, which
`load_inception` finds or downloads. Letters: N batch, C channels, H W height and width. A branch called dbl has one more
convolution than the other branch.
"""

from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repa.base import dist, files
from repa.base.device import autocast, exact_float32
from repa.base.errors import UserError
from repa.base.pretrained import Frozen
from repa.base.weights import read_weights

SIDE = 299  # pixels of the network's input
SPATIAL_CHANNELS = 7  # of mixed_6/conv, as in the ADM evaluator
FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
ALSO = "pt_inception-2015-12-05-6726825d.pth"  # the same file, as pytorch-fid names it
SHA256 = "6726825d"  # first digits of the file's checksum, as in its name


class ImageFeatures(NamedTuple):
    """Features of a batch of images for the metrics, float32. Only Inception has the last two."""

    pooled: Tensor
    """(N, D), for Inception pool_3 (N, 2048): for Fréchet and kernel distances, precision and recall."""
    spatial: Tensor | None = None
    """(N, 2023): the first 7 channels of mixed_6/conv on their 17 x 17 grid in the order H, W, C, for sFID."""
    logits: Tensor | None = None
    """(N, 1008): logits without the bias of the last layer, for the inception score."""


class InceptionV3(Frozen):
    """uint8 images of any side -> features; `load_inception` loads the weights.

    Frozen, because the statistics of its batch normalisation are part of the metric.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, same=True)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pool_channels=32)
        self.Mixed_5c = InceptionA(256, pool_channels=64)
        self.Mixed_5d = InceptionA(288, pool_channels=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels=128)
        self.Mixed_6c = InceptionC(768, channels=160)
        self.Mixed_6d = InceptionC(768, channels=160)
        self.Mixed_6e = InceptionC(768, channels=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average=True)
        self.Mixed_7c = InceptionE(2048, average=False)
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, images: Tensor, precision: str = "fp32") -> ImageFeatures:
        """Features of uint8 (N, 3, H, W), independent of the caller's autocast.

        Args:
            images: of any side.
            precision: of the convolutions and the layers between them, fp32 or bf16. Resize, mean and logits are float32.

        Raises:
            UserError: images of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"Inception needs uint8 images (N, 3, H, W), but got {images.dtype} {tuple(images.shape)}.")
        device = self.fc.weight.device
        with exact_float32(device):
            x = (resize_as_tensorflow(images.to(device).float(), SIDE) - 128) / 128  # (N, 3, 299, 299)
            with autocast(device, precision):
                x, branch1x1 = self._convolve(x)
            pool = x.float().mean((2, 3))  # (N, 2048)
            spatial = branch1x1[:, :SPATIAL_CHANNELS].float().permute(0, 2, 3, 1).flatten(1)  # (N, 17 * 17 * 7)
            return ImageFeatures(pool, spatial, pool @ self.fc.weight.T)  # without the bias, as in the ADM evaluator

    def _convolve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, 299, 299) -> the feature map before pooling, and the one that sFID compares."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (N, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (N, 768, 17, 17)
        x, branch1x1 = self.Mixed_6d.with_branch1x1(x)  # (N, 768, 17, 17), (N, 192, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (N, 2048, 8, 8)
        return x, branch1x1


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Bilinear resizing of TensorFlow 1: (N, C, H, W) -> (N, C, side, side).

    Output pixel i is at i * H / side of the input, without a shift by half a pixel and without antialiasing. F.interpolate
    has no such mode, so this code interpolates between the two nearest rows and columns.
    """
    return _interpolate(_interpolate(images, 3, side), 2, side)  # the width first, as in TensorFlow


def _interpolate(images: Tensor, dim: int, side: int) -> Tensor:
    size = images.shape[dim]
    place = torch.arange(side, device=images.device, dtype=torch.float32) * (size / side)  # float32 as in TensorFlow
    low = place.long().clamp(max=size - 1)  # rounding may put the last position beyond the last pixel
    high = (low + 1).clamp(max=size - 1)
    share = (place - low).view([-1 if d == dim else 1 for d in range(images.ndim)])
    first, second = images.index_select(dim, low), images.index_select(dim, high)
    return first + (second - first) * share


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation, ReLU. `same`: padded to keep the size."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int | tuple[int, int], *, stride: int = 1, same: bool = False
    ):
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2, width // 2) if same else 0  # all kernels are odd
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x: Tensor) -> Tensor:
    """3 x 3 at stride 1; at the border the mean excludes padding, as in TensorFlow."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """35 x 35: (N, in, H, W) -> (N, 224 + pool, H, W)."""

    def __init__(self, in_channels: int, *, pool_channels: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, same=True)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, same=True)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, same=True)
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
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, same=True)
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
        self.branch7x7_2 = BasicConv2d(channels, channels, (1, 7), same=True)
        self.branch7x7_3 = BasicConv2d(channels, 192, (7, 1), same=True)
        self.branch7x7dbl_1 = BasicConv2d(in_channels, channels, 1)
        self.branch7x7dbl_2 = BasicConv2d(channels, channels, (7, 1), same=True)
        self.branch7x7dbl_3 = BasicConv2d(channels, channels, (1, 7), same=True)
        self.branch7x7dbl_4 = BasicConv2d(channels, channels, (7, 1), same=True)
        self.branch7x7dbl_5 = BasicConv2d(channels, 192, (1, 7), same=True)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def with_branch1x1(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and its branch that sFID compares."""
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
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), same=True)
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), same=True)
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([branch3x3, branch7x7, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """8 x 8, branches that fork at their end: (N, in, H, W) -> (N, 2048, H, W). The last of the two blocks uses max-pooling."""

    def __init__(self, in_channels: int, *, average: bool):
        super().__init__()
        self.average = average
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), same=True)
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), same=True)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, same=True)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), same=True)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), same=True)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = average_pool(x) if self.average else F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([
            self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled),
        ], 1)  # fmt: skip


class LoadedInception(NamedTuple):
    """The network, and the checksum of its weights."""

    net: InceptionV3
    weights_sha256: str

    @property
    def is_published(self) -> bool:
        """Whether these are the weights of published results."""
        return self.weights_sha256.startswith(SHA256)


def load_inception(weights: str | Path | None = None, device: torch.device | str = "cpu") -> LoadedInception:
    """Inception-v3 with the weights of a local file, else from the caches of this package, torch-fidelity and pytorch-fid,
    else downloaded by the main process into the first of these caches.

    Raises:
        UserError: no such file, no network access, a damaged file, or weights of another network.
    """
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"There is no file {weights} with Inception's weights: give the path of {FILE}.")
    path = Path(weights) if weights is not None else _cached_or_downloaded()
    # Recorded with every result: only results with the published weights are comparable with papers.
    checksum = files.sha256(path)
    if weights is None and not checksum.startswith(SHA256):
        raise UserError(
            f"{path} is damaged: its checksum does not begin with {SHA256}. Remove it and run the command again."
        )
    net = InceptionV3()
    try:
        net.load_state_dict(read_weights(path, f"Give {FILE}."))
    # The tensors do not fit, or the file has no dictionary of tensors.
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not contain the weights of Inception-v3 ({reason}): give {FILE}.") from error
    # 1.4 times as fast as (N, C, H, W) on a CPU (docs/evaluation.md); on CUDA half precision needs no transposition
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return LoadedInception(net, checksum)


def _cached_or_downloaded() -> Path:
    """The first cached file; if there is none, the main process downloads it."""
    # One process downloads, and all processes get its error; otherwise the others would wait for the file for ever.
    problem = _download() if dist.is_main() and _cached_file() is None else ""
    problem = dist.from_main(problem)
    if (path := _cached_file()) is not None:
        return path
    raise UserError(
        f"The weights of Inception-v3 are not on this machine and could not be downloaded from {URL} "
        f"({problem or 'they were downloaded to another machine'}): give --features-weights FILE (for `repa train`: "
        f"--feature-weights inception=FILE), put the file at {_cache_paths()[0]}, or use the extractor of this package, "
        "--features tiny-classifier (for `repa train`: --preview.features tiny-classifier)."
    )


def _cache_paths() -> list[Path]:
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [files.cache_folder() / "metrics" / FILE, hub / FILE, hub / ALSO]


def _cached_file() -> Path | None:
    return next((place for place in _cache_paths() if place.is_file()), None)


def _download() -> str:
    """Download the file and verify its checksum; returns the error, or an empty string."""
    try:
        with files.atomic_path(_cache_paths()[0]) as temporary:
            torch.hub.download_url_to_file(URL, str(temporary), hash_prefix=SHA256, progress=False)
    except (OSError, RuntimeError, HTTPException) as error:  # no network access; wrong checksum; interrupted
        return str(error)
    return ""
