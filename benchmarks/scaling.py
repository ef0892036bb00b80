"""The model of docs/distributed.md: steps, bytes and checkpoints on 8, 64 and 1,024 GPUs. Arithmetic of `repa.training.scaling`.

python benchmarks/scaling.py --model SiT-XL/2
"""

import argparse
import math
from dataclasses import dataclass

from repa.models.config import ModelConfig
from repa.models.cost import model_cost
from repa.runs.checkpoint import PART
from repa.training.scaling import STRATEGIES, Machine, step

TEACHER = 46.3e9  # FLOPs of DINOv2-B on one image
STORED = 3 * 256 * 256  # bytes of one image as it is read


@dataclass(frozen=True)
class CheckpointSeconds:
    """Seconds of writing and reading one, by as many processes as there are parts."""

    size: float
    writers: int
    gather: float
    """Whole tensors to all GPUs, and each writer's share to its memory: what training waits for with --async-save."""
    write: float
    verify: float
    """Checksums, read back from memory."""
    deal: float
    """Read by as many processes, and sent to all, when a run is continued."""


def checkpoint(
    parameters: float, machines: int, gpus: int, *, host: float = 4e9, disk: float = 1.5e9, shared: float = 10e9,
    links: float = Machine.links, network: float = 25e9,
) -> CheckpointSeconds:  # fmt: skip
    """Of weights, one average and two moments in float32.

    Args:
        machines, gpus: how many, and of each.
        host: bytes a second from device to pageable memory, of one process.
        disk: of a shared file system, one writer.
        shared: of it, all writers together.
        links: see `Machine`.
        network: of one GPU's own port, through which what one process has read reaches other machines.
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
