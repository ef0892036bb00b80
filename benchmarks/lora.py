"""Train LoRAs of a small pretrained network on new classes, with and without alignment through `repa.attach`.

    python benchmarks/lora.py cifar10-train.zip OUT --seeds 2 > table.md

A SiT learns five classes of CIFAR-10. Then peft's LoRA (rank 16, network frozen) learns the other five from 500 images.
Each seed trains three LoRAs: without alignment, with the default term for pretrained networks (gram), and with REPA's
cosine and MLP. The table shows the denoising loss on held-out images with the same noise for all, and the Fréchet
distance of samples in the features of tiny-classifier. OUT keeps the pretrained network, which a second call reuses,
and the samples (`lora.png`).
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

import repa
from repa.base.images import to_tensor
from repa.data import open_source
from repa.diffusion import PATHS, Denoiser
from repa.diffusion.samplers import euler
from repa.encoders import load_encoder
from repa.metrics import frechet_distance
from repa.models import Condition, DiT

WAYS = {
    "none": None,
    "gram": {},
    "cosine": {"loss": "cosine", "features": 128, "projector": "mlp:width=256"},
}


def network() -> DiT:
    torch.manual_seed(0)
    return DiT(latent_size=32, latent_channels=3, patch_size=4, hidden_dim=96, depth=4, num_heads=4, num_classes=10)


def images_of(source: str, classes: range, per_class: int, skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (n, 3, 32, 32) and labels (n,): `per_class` images of each class, after skipping the first `skip`."""
    opened = open_source(source)
    images, labels, seen = [], [], dict.fromkeys(classes, 0)
    for number, label in enumerate(int(label) for label in opened.labels):
        if label not in seen or seen[label] >= skip + per_class:
            continue
        seen[label] += 1
        if seen[label] > skip:
            images.append(to_tensor(opened.image(number, 32)))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def denoising(net: DiT, images: torch.Tensor, labels: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
    x = images / 127.5 - 1
    noise, t = torch.randn(x.shape, generator=stream), torch.rand(len(x), generator=stream)
    x_t = x + t[:, None, None, None] * (noise - x)
    prediction = net({"x": x_t}, t, Condition(labels)).prediction["x"]
    return (prediction - (noise - x)).square().mean()


def train(
    net: DiT, images: torch.Tensor, labels: torch.Tensor, steps: int, rate: float, seed: int, term: dict | None
) -> None:
    stream = torch.Generator().manual_seed(seed)
    parameters = [p for p in net.parameters() if p.requires_grad]
    aligner = encoder = None
    if term is not None:
        torch.manual_seed(seed)
        encoder = load_encoder("tiny")
        aligner = repa.attach(net, "blocks.1", **{**term, **({"features": encoder.dim} if "features" in term else {})})
        parameters += list(aligner.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        rows = torch.randint(len(images), (32,), generator=stream)
        loss = denoising(net, images[rows], labels[rows], stream)
        if aligner is not None and encoder is not None:
            loss = loss + aligner.loss(encoder(images[rows], grid=8))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if aligner is not None:
        aligner.detach()


@torch.no_grad()
def measured(net: DiT, held: torch.Tensor, labels: torch.Tensor, num: int) -> tuple[float, float, torch.Tensor]:
    """Held-out denoising loss, Fréchet distance, and the samples as uint8 (num, 3, 32, 32)."""
    stream = torch.Generator().manual_seed(1234)
    rows = range(0, len(held), 64)
    loss = sum(denoising(net, held[r : r + 64], labels[r : r + 64], stream).item() for r in rows) / len(rows)
    extractor, asked = load_encoder("tiny-classifier"), labels[torch.arange(num) % len(labels)]

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return net({"x": x}, t, Condition(asked)).prediction["x"]

    noise = torch.randn((num, 3, 32, 32), generator=torch.Generator().manual_seed(99))
    samples = euler(Denoiser(velocity, PATHS.build("linear")), noise, 20)
    samples = ((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    found = []
    for batch in (samples, held):
        features = torch.cat([extractor(part, grid=1).pooled for part in batch.split(128)]).double()
        found += [features.mean(0), features.T.cov()]
    return loss, frechet_distance(*found), samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pretrain", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--samples", type=int, default=256)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    pretrained = args.out / "pretrained.pt"
    net = network()
    if pretrained.exists():
        net.load_state_dict(torch.load(pretrained, weights_only=True))
    else:
        start = time.process_time()
        train(net, *images_of(args.source, range(5), 1000), args.pretrain, 1e-3, 0, None)
        torch.save(net.state_dict(), pretrained)
        print(f"pretrained {args.pretrain} steps in {time.process_time() - start:.0f} CPU s", flush=True)
    images, labels = images_of(args.source, range(5, 10), 100)
    held, held_labels = images_of(args.source, range(5, 10), 200, skip=100)

    print("| alignment | seed | held-out denoising loss | Fréchet distance | CPU ms a step |\n|---|---|---|---|---|")
    loss, distance, samples = measured(net, held, held_labels, args.samples)
    print(f"| before the LoRA | | {loss:.4f} | {distance:.2f} | |", flush=True)
    rows = [samples[:10]]
    for seed in range(args.seeds):
        for way, term in WAYS.items():
            lora = copy.deepcopy(net).requires_grad_(False)
            torch.manual_seed(seed)
            config = LoraConfig(r=16, lora_alpha=16, target_modules=["qkv", "attn.proj", "fc1", "fc2"])
            inject_adapter_in_model(config, lora)
            lora.y_embedder.requires_grad_(True)  # the new classes need embeddings
            start = time.process_time()
            train(lora, images, labels, args.steps, 2e-3, seed, term)
            cost = 1000 * (time.process_time() - start) / args.steps
            loss, distance, samples = measured(lora, held, held_labels, args.samples)
            print(f"| {way} | {seed} | {loss:.4f} | {distance:.2f} | {cost:.0f} |", flush=True)
            if seed == 0:
                rows.append(samples[:10])
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)  # (3, 4 * 32, 10 * 32)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).resize((grid.shape[2] * 2, grid.shape[1] * 2), 0).save(
        args.out / "lora.png"
    )


if __name__ == "__main__":
    main()
