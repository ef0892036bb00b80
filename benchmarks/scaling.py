"""Predict step time, traffic and checkpoint time on 8, 64 and 1,024 GPUs, as in docs/distributed.md.

    python benchmarks/scaling.py --model SiT-XL/2

Nothing is measured: the model is that of `repa.training.scaling`.
"""

import argparse
import math
from dataclasses import dataclass

from repa.models.config import ModelConfig
from repa.models.cost import model_cost
from repa.runs.checkpoint import PART
from repa.training.scaling import STRATEGIES, Machine, step

TEACHER = 46.3e9  # FLOPs of DINOv2-B per image
STORED = 3 * 256 * 256  # bytes of one stored image


@dataclass(frozen=True)
class CheckpointSeconds:
    """Seconds for writing and reading a checkpoint, with one process per part."""

    size: float
    writers: int
    gather: float
    """All-gather and copy of each writer's part to host memory: what training waits for with --async-save."""
    write: float
    verify: float
    """Reading the files back from the page cache to compute checksums."""
    deal: float
    """Reading by as many processes when a run resumes, and sending the tensors to all."""


def checkpoint(
    parameters: float, machines: int, gpus: int, *, host: float = 4e9, disk: float = 1.5e9, shared: float = 10e9,
    links: float = Machine.links, network: float = 25e9,
) -> CheckpointSeconds:  # fmt: skip
    """A checkpoint holds weights, one average and two moments in float32.

    Args:
        machines, gpus: number of machines, and of GPUs per machine.
        host: bytes per second from device to pageable memory, one process.
        disk: bytes per second to a shared file system, one writer.
        shared: bytes per second to a shared file system, all writers together.
        links: see `Machine`.
        network: bytes per second of one GPU's network port, through which a process sends what it read to other machines.
    """
    size = 16 * parameters
    writers = min(machines * gpus, math.ceil(size / PART))
    moved, written = size / writers / host, max(size / writers / disk, size / shared)
    sent = size / (network if machines > 1 else links)
    return CheckpointSeconds(
        size, writers, size / links + moved, written, size / writers / disk, written + moved + sent
    )


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
