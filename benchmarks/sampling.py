"""Measure how half precision changes samples: pixel differences from float32, and Fréchet distances.

    python benchmarks/sampling.py RUN DATA --num-images 2000

Each precision samples the same images from the same noise. A Fréchet distance also depends on which images were drawn.
Rows with other seeds in float32 show this variation, with which the effect of precision should be compared.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from repa.base.launch import keep_freed_memory
from repa.data import open_data
from repa.evaluation import evaluate, load_extractor, reference_of
from repa.runs import LoadedRun, load_run
from repa.sampling import SampleConfig, generate


def sampled(run: LoadedRun, config: SampleConfig, num: int) -> tuple[Tensor, float]:
    """Images (num, 3, H, W) and images per second."""
    begin, size = time.perf_counter(), config.batch_size
    images = [generate(run, config, range(start, min(start + size, num))).images for start in range(0, num, size)]
    return torch.cat(images), num / (time.perf_counter() - begin)


def batches(images: Tensor) -> Iterator[Tensor]:
    yield from images.split(250)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sampler", default="euler_maruyama")
    parser.add_argument("--guidance", nargs="*", default=["cfg:scale=1.5"])
    parser.add_argument("--features", default="tiny-classifier")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    keep_freed_memory()
    device = torch.device(args.device)
    run, data, extractor = (
        load_run(args.run, device=device),
        open_data(args.data),
        load_extractor(args.features, device=device),
    )
    reference = reference_of(data, extractor, args.features)
    config = SampleConfig(sampler=args.sampler, steps=args.steps, guidance=args.guidance, batch_size=250)
    exact, rate = sampled(run, config.override(precision="fp32"), args.num_images)
    print(f"{args.num_images} images of {args.run}, {args.sampler}, {args.steps} steps, {' '.join(args.guidance)}")
    print(
        f"{'':<20}{'images/s':>10}{'mean':>8}{'99 %':>8}{'largest':>9}{'fd':>10}   grey levels against float32, of 255"
    )

    def row(name: str, images: Tensor, rate: float) -> None:
        difference = (images.int() - exact.int()).abs().flatten().float()
        high = difference.kthvalue(int(0.99 * len(difference))).values
        fd = evaluate(batches(images), extractor, reference, ("fd",))["fd"]
        print(f"{name:<20}{rate:>10.1f}{difference.mean():>8.2f}{high:>8.0f}{difference.max():>9.0f}{fd:>10.4f}")

    row("fp32", exact, rate)
    for precision in ("bf16", "fp16") if device.type == "cuda" else ("bf16",):
        row(precision, *sampled(run, config.override(precision=precision), args.num_images))
    for seed in (1, 2):
        row(f"fp32, seed {seed}", *sampled(run, config.override(precision="fp32", seed=seed), args.num_images))


if __name__ == "__main__":
    main()
