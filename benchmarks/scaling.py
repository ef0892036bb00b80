"""The model of docs/distributed.md: steps, bytes and checkpoints on 8, 64 and 1,024 GPUs. Arithmetic of `repa.training.scaling`.

python benchmarks/scaling.py --model SiT-XL/2
"""

import argparse

from repa.models.config import ModelConfig
from repa.models.cost import model_cost
from repa.training.scaling import STRATEGIES, checkpoint, step

TEACHER = 46.3e9  # FLOPs of DINOv2-B on one image
STORED = 3 * 256 * 256  # bytes of one image as it is read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-XL/2")
    args = parser.parse_args()
    cost = model_cost(ModelConfig(name=args.model, latent_size=32, latent_channels=4, num_classes=1000))
    flops = cost.training + TEACHER
    print(
        "| GPUs | batch | images a GPU | strategy | GB sent | communication | exposed | update | step | images/s | efficiency |"
    )
    print("|---" * 11 + "|")
    for machines, batch in ((1, 256), (8, 256), (8, 2048), (128, 8192), (128, 32768)):
        for strategy in STRATEGIES:
            gpus = 8 * machines
            found = step(strategy, cost.parameters, flops, batch / gpus, machines, 8)
            alone = step("ddp", cost.parameters, flops, 256, 1, 1)
            rate = batch / found.seconds
            times = " | ".join(
                f"{1e3 * t:.1f} ms" for t in (found.communication, found.exposed, found.update, found.seconds)
            )
            print(
                f"| {gpus:,} | {batch:,} | {batch / gpus:g} | {strategy} | {found.sent / 1e9:.1f} | {times} | {rate:,.0f} | "
                f"{rate / (gpus * 256 / alone.seconds):.0%} |"
            )
    print(
        "\n| GPUs | checkpoint | writers | gathered in | written | verified | read and dealt out | images, read a second |"
    )
    print("|---" * 8 + "|")
    for machines, batch in ((1, 256), (8, 2048), (128, 32768)):
        saved = checkpoint(cost.parameters, machines, 8)
        rate = batch / step("fsdp", cost.parameters, flops, batch / machines / 8, machines, 8).seconds
        print(
            f"| {8 * machines:,} | {saved.size / 1e9:.1f} GB | {saved.writers} | {saved.gather:.1f} s | {saved.write:.1f} s | "
            f"{saved.verify:.1f} s | {saved.deal:.1f} s | {rate * STORED / 1e9:.1f} GB |"
        )


if __name__ == "__main__":
    main()
