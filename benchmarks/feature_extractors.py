"""Measure how memory layout and precision change the time and the Fréchet distances of networks that evaluate samples.

    python benchmarks/feature_extractors.py DATA --num 500                         random Inception, and lite0
    python benchmarks/feature_extractors.py DATA --inception FILE --device cuda    the published Inception, on a GPU

The samples are noisy images of DATA; the reference is its other images. Random weights are normalised layer by layer on
images, so that activations have the spread of a trained network's. Without bf16 hardware its rounding is emulated: the
inputs and outputs that autocast would round are rounded, and products are summed in float32, as tensor cores do. The
emulation is first compared with PyTorch's own bf16 on two images.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from repa.base.device import best_precision
from repa.data import open_data
from repa.encoders import load_encoder
from repa.evaluation.extractors import EncoderExtractor, Extractor, InceptionExtractor
from repa.metrics import InceptionV3, Statistics, frechet_distance, load_inception
from repa.metrics.inception import LoadedInception

BATCH = 20
NOISE = 12.0  # grey levels
ROUNDED = {F.conv2d, F.batch_norm, F.avg_pool2d, F.linear, torch.conv2d}  # inexact on bf16 numbers


class Bf16(TorchFunctionMode):
    """Compute in float32, with arguments and results of the functions in ROUNDED rounded to bf16."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function not in ROUNDED:
            return function(*args, **(kwargs or {}))
        first, *others = args
        if function is not F.batch_norm:  # autocast leaves its constants in float32
            others = [_rounded(x) if isinstance(x, Tensor) else x for x in others]
        return _rounded(function(_rounded(first), *others, **(kwargs or {})))


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def random_inception(images: Tensor) -> InceptionV3:
    """Inception with random weights, each normalisation having the statistics of these images."""
    torch.manual_seed(0)
    net = InceptionV3()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum, module.training = 1.0, True
    net(images)
    for module in net.modules():
        module.training = False
    return net


def pooled(extractor: Extractor, images: Tensor, emulated: bool = False) -> tuple[Tensor, float]:
    """Features (N, D) and seconds per image: processor time, or wall time on CUDA."""
    clock = time.perf_counter if extractor.device.type == "cuda" else time.process_time
    begin, found = clock(), []
    for batch in images.split(BATCH):
        if emulated:
            with Bf16():
                found.append(extractor(batch).pooled.float().cpu())
        else:
            found.append(extractor(batch).pooled.cpu())
    return torch.cat(found), (clock() - begin) / len(images)


def distance(real: Tensor, samples: Tensor) -> float:
    moments = []
    for features in (real, samples):
        running = Statistics()
        running.update(features)
        moments += [running.mean, running.covariance]
    return frechet_distance(*moments)


def measure(name: str, make: Callable[[str], Extractor], real: Tensor, samples: Tensor) -> None:
    exact = make("fp32")
    native = best_precision(exact.device) == "bf16"
    few = samples[:2]
    half, fp32 = make("bf16")(few).pooled.float().cpu(), exact(few).pooled.cpu()
    print(
        f"\n{name}, {len(samples)} noisy images against {len(real)}; features of two images differ from float32's by:"
    )
    print(f"  PyTorch's bf16 {error(half, fp32):.2e}")
    if not native:
        print(f"  emulated bf16  {error(pooled(exact, few, emulated=True)[0], fp32):.2e}")
    features = {"float32": [pooled(exact, x) for x in (real, samples)]}
    features["bf16"] = [pooled(exact, x, True) if not native else pooled(make("bf16"), x) for x in (real, samples)]
    for what, ((a, first), (b, second)) in features.items():
        shown = "" if what == "bf16" and not native else f"   {1e3 * (first + second) / 2:.0f} ms an image"
        print(f"  {what + ' both':<28}{distance(a, b):>12.5f}{shown}")
    mixed = distance(features["float32"][0][0], features["bf16"][1][0])
    print(f"  {'float32 reference, bf16':<28}{mixed:>12.5f}")
    itself = distance(features["float32"][1][0], features["bf16"][1][0])
    print(f"  {'samples against themselves':<28}{itself:>12.5f}", flush=True)


def error(x: Tensor, exact: Tensor) -> float:
    """The error relative to the features' spread about their mean."""
    return float((x - exact).norm() / (exact - exact.mean()).norm())


def layouts(net: InceptionV3, images: Tensor, rounds: int) -> None:
    """Print milliseconds of processor time per image for each memory layout; the layouts take turns."""
    found: dict[str, list[float]] = {"contiguous_format": [], "channels_last": []}
    for _ in range(rounds):
        for name, seconds in found.items():
            net.to(memory_format=getattr(torch, name))  # type: ignore[call-overload]  # not in torch's types
            seconds.append(pooled(InceptionExtractor(LoadedInception(net, "")), images)[1])
    for name, seconds in found.items():
        print(
            f"  {name:<20}{1e3 * np.median(seconds):>8.0f} ms an image, {1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--num", type=int, default=500, help="images per set")
    parser.add_argument("--inception", help="file of Inception's weights; default: random weights")
    parser.add_argument("--encoder", default="lite0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    data, device = open_data(args.data), torch.device(args.device)
    images = torch.from_numpy(data.gather("images", data.originals[: 2 * args.num]))
    real, clean = images.chunk(2)
    noise = NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    samples = (clean + noise).clamp(0, 255).to(torch.uint8)
    if args.inception:
        loaded = load_inception(args.inception, device)
    else:
        loaded = LoadedInception(random_inception(real[:BATCH]).to(device), "random")
    print(f"{images.shape[-1]} pixels, {device}, torch {torch.__version__}; layout of Inception in float32:")
    layouts(loaded.net, real[:BATCH], args.rounds)
    measure(f"inception ({args.inception or 'random weights'})", lambda p: InceptionExtractor(loaded, p), real, samples)
    encoder = load_encoder(args.encoder, device=device)
    measure(args.encoder, lambda p: EncoderExtractor(encoder, p), real, samples)


if __name__ == "__main__":
    main()
