"""Train the packaged autoencoder `tiny-vae` on one CPU core.

    python tools/train_tiny_vae.py --data cifar10-train.zip --test cifar10-test.zip --minutes 25

A small AutoencoderKL of diffusers (factor 4, 4 channels) learns on CIFAR-10 at 32 pixels and on crops of the packaged
photographs at 64. The same command resumes from --state, and a kill loses at most a minute. Minutes are processor time,
so other programs do not count; the learning rate follows them. --out is a folder in the format of diffusers.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from evaluate_tiny import read_images, to_input
from repa.base import files
from repa.base.device import autocast
from repa.data.sources.photographs import PhotographSource, checksum
from repa.encoders import load_encoder

SHAPE = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,  # convolutions only, so any height and width will do
    "sample_size": 32,
}
BATCH, PHOTOGRAPH_BATCH = 48, 12  # an image of 64 pixels is as much work as four of 32
PHOTOGRAPHS, PHOTOGRAPH_SIDE = 4_000, 64  # number and side of the crops
PERCEPTUAL, KL = 0.25, 3e-3  # weights relative to the mean absolute pixel error in [-1, 1]
SCALES = (0.5, 0.75)  # sizes of the transformed latents
PEAK, DECAY, CLIP = 1.5e-3, 1e-4, 1.0
PRINT_SECONDS, CHECKPOINT_SECONDS = 15, 60


def photographs(num: int, seed: int) -> Tensor:
    """uint8 (num, 3, 64, 64): crops of the packaged photographs."""
    source = PhotographSource(num=num, seed=seed)
    pixels = [np.asarray(source.image(index, PHOTOGRAPH_SIDE)) for index in range(num)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def batches(cifar: Tensor, crops: Tensor, stream: torch.Generator) -> Iterator[Tensor]:
    """Three batches of CIFAR-10, then one of photographs, repeated; images are mirrored with probability 1/2."""
    while True:
        for images, size in (*[(cifar, BATCH)] * 3, (crops, PHOTOGRAPH_BATCH)):
            batch = images[torch.randint(len(images), (size,), generator=stream)]
            mirrored = torch.rand(size, 1, 1, 1, generator=stream) < 0.5
            yield torch.where(mirrored, batch.flip(3), batch)


def transformed(x: Tensor, turns: int, side: int) -> Tensor:
    """Rotate by quarter turns and resize to `side`: the decoder must follow the latents (EQ-VAE, arXiv 2502.09509)."""
    return F.interpolate(torch.rot90(x, turns, (2, 3)), size=(side, side), mode="area")


def losses(vae: Any, tiny: torch.nn.Module, x: Tensor, stream: torch.Generator) -> dict[str, Tensor]:
    """Losses of images (N, 3, H, H) in [-1, 1]: pixels, features of `tiny`, and KL per number of the latent.

    With probability 1/2 the latents and the images are transformed first.
    """
    posterior = vae.encode(x).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=stream)
    if torch.rand((), generator=stream) < 0.5:
        turns = int(torch.randint(4, (), generator=stream))
        scale = (*SCALES, 1.0)[int(torch.randint(3, (), generator=stream))]
        side = round(z.shape[2] * scale)
        factor = x.shape[2] // z.shape[2]
        z, x = transformed(z, turns, side), transformed(x, turns, side * factor)
    again = vae.decode(z).sample.float()
    with torch.no_grad():
        wanted = tiny(x)
    return {
        "pixels": (again - x).abs().mean(),
        "features": PERCEPTUAL * F.mse_loss(tiny(again).float(), wanted.float()),
        "kl": KL * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
    }


class Training:
    """The network, its optimizer and its processor time, including the time before a restart."""

    def __init__(self, state: Path, seed: int):
        torch.manual_seed(seed)
        self.vae = cast(Any, AutoencoderKL(**SHAPE))  # diffusers' networks are opaque to type checkers
        self.vae.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.vae.parameters(), weight_decay=DECAY, betas=(0.9, 0.99), fused=True)
        self.state, self.seconds, self.steps = state, 0.0, 0
        if state.exists():
            saved = torch.load(state, weights_only=True)
            self.vae.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.seconds, self.steps = saved["seconds"], saved["steps"]
        self.stream = torch.Generator().manual_seed(seed + self.steps)
        self.start = time.process_time() - self.seconds

    def step(self, tiny: torch.nn.Module, images: Tensor, progress: float) -> dict[str, float]:
        rate = min(1.0, progress / 0.03 + 0.01) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK * rate
        with autocast(torch.device("cpu"), "auto"):
            found = losses(self.vae, tiny, to_input(images), self.stream)
        (found["pixels"] + found["features"] + found["kl"]).backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps, self.seconds = self.steps + 1, time.process_time() - self.start
        return {name: float(value.detach()) for name, value in found.items()}

    def save(self) -> None:
        state = {"model": self.vae.state_dict(), "optimizer": self.optimizer.state_dict()}
        with files.atomic_path(self.state) as path:
            torch.save(state | {"seconds": self.seconds, "steps": self.steps}, path)


def fit(training: Training, cifar: Tensor, crops: Tensor, minutes: float) -> None:
    tiny = load_encoder("tiny").net.requires_grad_(False)
    budget, printed, saved, shown = 60 * minutes, training.seconds, training.seconds, training.steps
    if training.seconds >= budget:
        return
    for images in batches(cifar, crops, training.stream):
        found = training.step(tiny, images, min(1.0, training.seconds / budget))
        left = budget - training.seconds
        if left <= 0 or training.seconds - printed > PRINT_SECONDS:
            told = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            speed = (training.steps - shown) / (training.seconds - printed)
            print(f"step {training.steps}: {told}; {speed:.1f} steps/s, {left / 60:.1f} min left", flush=True)
            printed, shown = training.seconds, training.steps
        if left <= 0 or training.seconds - saved > CHECKPOINT_SECONDS:
            training.save()
            saved = training.seconds
        if left <= 0:
            return


@torch.no_grad()
def measure(vae: Any, images: Tensor) -> dict[str, float]:
    """PSNR in dB of reconstructions from posterior means, and mean and spread of the latents."""
    means, stds, errors = [], [], []
    for batch in images.split(200):
        posterior = vae.encode(to_input(batch)).latent_dist
        again = (127.5 * vae.decode(posterior.mean).sample + 128).clamp(0, 255).to(torch.uint8)
        errors.append((again.float() - batch.float()).square().mean((1, 2, 3)))
        means.append(posterior.mean)
        stds.append(posterior.std)
    mean = torch.cat(means)
    return {
        "psnr": 10 * math.log10(255**2 / float(torch.cat(errors).mean())),
        "mean": float(mean.mean()),
        "std": float(mean.std()),
        "posterior": float(torch.cat(stds).mean()),
    }


def ship(vae: Any, out: Path, scale: float, facts: dict[str, str]) -> None:
    """Write config.json and half-precision weights in the format of diffusers."""
    out.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "act_fn": "silu", **SHAPE}
    files.write_json(out / "config.json", {**config, "scaling_factor": scale})
    tensors = {name: value.half().contiguous() for name, value in vae.state_dict().items()}
    files.write_bytes(out / "diffusion_pytorch_model.safetensors", save(tensors, {"format": "pt", **facts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="zip of CIFAR-10's training images")
    parser.add_argument("--test", type=Path, required=True, help="zip of its test images, used only for the PSNR")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    package = Path(__file__).parents[1] / "src/repa/autoencoders/weights/tiny-vae"
    parser.add_argument("--out", type=Path, default=package, help="output folder; default: the packaged one")
    parser.add_argument("--state", type=Path, default=Path("build/tiny-vae.pt"), help="checkpoint file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    cifar, test = read_images(args.data)[0], read_images(args.test)[0]
    training = Training(args.state, args.seed)
    fit(training, cifar, photographs(PHOTOGRAPHS, args.seed), args.minutes)
    vae = training.vae.eval()
    vae.load_state_dict({name: value.half().float() for name, value in vae.state_dict().items()})  # as shipped
    seen = measure(vae, cifar[:2_000])
    facts = {
        "name": "tiny-vae", "data": f"CIFAR-10 train, 50000 images (JPEG); photographs {checksum()[:16]}",
        "minutes": f"{args.minutes:g}", "steps": str(training.steps), "seed": str(args.seed), "torch": torch.__version__,
        "psnr_cifar10_test": f"{measure(vae, test)['psnr']:.2f}",
        "psnr_photographs_64": f"{measure(vae, photographs(400, args.seed + 1))['psnr']:.2f}",
        "latent_mean": f"{seen['mean']:.4f}", "latent_std": f"{seen['std']:.4f}", "posterior_std": f"{seen['posterior']:.4f}",
    }  # fmt: skip
    ship(vae, args.out, round(1 / seen["std"], 5), facts)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print("finished", facts, f"{size:,} bytes in {args.out}", flush=True)


if __name__ == "__main__":
    main()
