"""Measure what preparing one image costs, part by part, and predict how long ImageNet takes on GPUs.

    python benchmarks/prepare.py --images 4

The parts are: decoding a JPEG of ImageNet's mean size and cropping it to 256 pixels as ADM does; an autoencoder of
Stable Diffusion's size and an encoder of DINOv2-B's size, with random weights, in float32 and bf16; writing image,
moments and tokens, checksums included. Times are processor time of one thread, which other programs hardly affect, the
best of --rounds.

The prediction divides the models' FLOPs by the rate that the GPUs are assumed to reach, and decoding and writing by the
number of CPU cores. The longer of the two is the total time, because reading, encoding and writing overlap.
"""

import argparse
import functools
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import Dinov2Config, Dinov2Model

from data import photograph
from repa.autoencoders import load_autoencoder
from repa.base.device import autocast
from repa.base.images import adm_centre_crop, decode_image, to_tensor
from repa.base.launch import keep_freed_memory
from repa.data.writing import ShardWriter
from repa.encoders import load_encoder
from repa.performance.costs import SHAPES, autoencoder_cost, encoder_cost

IMAGENET, BYTES, SIZE = 1_281_167, 110_000, (500, 375)  # images; mean bytes and most common size of a file
CPU = torch.device("cpu")


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Processor time, the best of several runs."""
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        run()
        found.append(time.process_time() - begin)
    return min(found)


def jpeg() -> bytes:
    """A JPEG of about ImageNet's mean size, at the quality that gives this size."""
    image = photograph(np.random.default_rng(0), *SIZE)
    for quality in range(95, 30, -5):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= BYTES:
            break
    return buffer.getvalue()


def measured(images: int, rounds: int, work: Path) -> dict[str, float]:
    """Part -> seconds per image."""
    data, found = jpeg(), {}
    crop = lambda: to_tensor(adm_centre_crop(decode_image(data, "image"), 256))  # noqa: E731
    found["decode and crop"] = seconds(lambda: [crop() for _ in range(20)], rounds) / 20
    pixels = torch.stack([crop() for _ in range(images)])
    autoencoder = AutoencoderKL(**SHAPES["sd-vae-ft-mse"])
    autoencoder.save_pretrained(work / "vae")
    # The defaults are those of DINOv2-B.
    Dinov2Model(Dinov2Config(patch_size=14, image_size=518)).save_pretrained(work / "encoder")
    vae = load_autoencoder("sd-vae-ft-mse", weights=work / "vae")
    encoder = load_encoder("dinov2-b", weights=work / "encoder")
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        found[f"autoencoder, {name}"] = seconds(functools.partial(vae.encode, pixels, dtype), rounds) / images
    for name, precision in (("float32", "fp32"), ("bf16", "bf16")):
        with torch.inference_mode(), autocast(CPU, precision):
            found[f"encoder, {name}"] = seconds(lambda: encoder(pixels, 16), rounds) / images
    rows: dict[str, np.ndarray] = {
        "images": np.zeros((64, 3, 256, 256), np.uint8), "moments": np.zeros((64, 8, 32, 32), np.float16),
        "dinov2-b": np.zeros((64, 256, 768), np.float16),
    }  # fmt: skip

    def write() -> None:
        with ShardWriter(work, 0) as writer:
            writer.append(rows)

    found["write"] = seconds(write, rounds) / 64
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument(
        "--tflops", type=float, default=100.0, help="rate that a GPU reaches on convolutions in TF32 or bf16"
    )
    parser.add_argument("--cores", type=int, default=64, help="CPU cores for all GPUs together")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as work:
        found = measured(args.images, args.rounds, Path(work))
    print(f"torch {torch.__version__}, one thread, processor time for one image, the best of {args.rounds}")
    print("| part | ms | images/s |\n|---|---:|---:|")
    for part, took in found.items():
        print(f"| {part} | {1e3 * took:,.1f} | {1 / took:,.1f} |")
    flops = autoencoder_cost("sd-vae-ft-mse", 256).cost.forward + encoder_cost("dinov2-b", 16).cost.forward
    on_gpus = IMAGENET * flops / (args.gpus * args.tflops * 1e12)
    on_cores = IMAGENET * (found["decode and crop"] + found["write"]) / args.cores
    print(
        f"\nImageNet, {IMAGENET:,} images, on {args.gpus} GPUs: {flops / 1e9:,.0f} GFLOP an image at {args.tflops:g} TFLOP/s each "
        f"(assumed) take {on_gpus / 60:.1f} minutes, decoding and writing on {args.cores} cores {on_cores / 60:.1f}."
    )


if __name__ == "__main__":
    main()
