"""Predicted cost of a step on several GPUs: communication, overlap, and the faster strategy. Calculated, not measured.

P parameters, each float32 with AdamW's two moments and one average. Reductions and gathers are rings: each of n processes
sends and receives (n - 1) / n of the gathered or reduced bytes, and twice that for an all-reduce. Between machines a ring has
the speed of their network, within one that of its links. The backward pass has two thirds of the computing time.
"""

from dataclasses import dataclass

STRATEGIES = ("ddp", "fsdp")
TRAFFIC = 64  # bytes of memory traffic per parameter and step: casts, clipping, AdamW, average
WORTH = 1.02  # smallest predicted speed-up for which fsdp is chosen


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and of the links between several; by default those of an H200 in machines of eight."""

    seconds_per_tflop: float = 449e-3 / 256 / 0.773
    """Of training: SiT-XL/2 with an online DINOv2-B, 0.773 TFLOP an image, in bf16, compiled; predicted (docs/speed.md)."""
    memory: float = 4.0e12
    """Bytes per second of pointwise kernels."""
    links: float = 400e9
    """Bytes per second of a ring within a machine."""
    network: float = 350e9
    """Bytes per second of a ring between machines, for all GPUs of a machine together."""
    latency: float = 30e-6
    """Latency in seconds of a collective within a machine; between machines it grows with the logarithm of their number."""
    contention: float = 0.1
    """Share of overlapped communication time by which computing slows down, because both use the device's memory and processors."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one training step on every GPU."""

    compute: float
    communication: float
    """Seconds of all collectives without overlap."""
    exposed: float
    """Seconds of communication that are not hidden by computing, plus the slowdown of computing."""
    update: float
    """Casts, clipping, AdamW, average."""
    sent: float
    """Bytes that a GPU sends."""

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.update


def step(
    strategy: str, parameters: float, flops: float, images: float, machines: int, gpus: int,
    machine: Machine = Machine(), *, buckets: int = 14, blocks: int = 28,
) -> StepSeconds:  # fmt: skip
    """Predict a step.

    Args:
        strategy: ddp; or fsdp: parts within a machine, gradients summed between machines (`parallel.mesh_sides`).
        flops: of training on one image, encoders that run included.
        images: of one GPU in a step.
        machines, gpus: how many, and of each.
        buckets, blocks: collectives of a backward, and of a forward of fsdp.
    """
    compute = images * flops / 1e12 * machine.seconds_per_tflop
    forward, backward = compute / 3, 2 * compute / 3
    ring, hops = (gpus - 1) / gpus, max(1, machines).bit_length()
    wait = machine.latency * hops
    between = 2 * 4 * parameters * (machines - 1) / machines / machine.network  # gradients, by all GPUs of a machine
    if strategy == "ddp":
        into_forward, divided = 0.0, 1
        into_backward = 2 * 4 * parameters * ring / machine.links + between + buckets * wait
        sent = 2 * 4 * parameters * (ring + (machines - 1) / machines / gpus)
    else:
        divided = gpus
        into_forward = 2 * parameters * ring / machine.links + blocks * machine.latency  # weights in bf16
        into_backward = 4 * parameters * ring / machine.links + between + blocks * wait
        sent = parameters * (6 * ring + 8 * (machines - 1) / machines / gpus)
    hidden = min(into_forward, forward) + min(into_backward, backward)
    exposed = into_forward + into_backward - hidden + machine.contention * hidden
    return StepSeconds(
        compute, into_forward + into_backward, exposed, TRAFFIC * parameters / divided / machine.memory, sent
    )


def faster(parameters: float, flops: float, images: float, machines: int, gpus: int) -> str:
    """The strategy with the shorter predicted step; ddp if both are similar, and for one process."""
    if machines * gpus == 1:
        return "ddp"
    ddp, fsdp = (step(name, parameters, flops, images, machines, gpus).seconds for name in STRATEGIES)
    return "fsdp" if ddp > WORTH * fsdp else "ddp"
