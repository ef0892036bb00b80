"""What a step costs on several GPUs: bytes, what overlaps, and which strategy is the faster one. Arithmetic, not measured.

P parameters, each float32 with AdamW's two moments and one average. Reductions and gathers are rings: each of n processes
sends and receives (n - 1) / n of what is gathered or reduced, and twice that of an all-reduce. Between machines a ring is as
fast as their network, within one as its links. The backward takes two thirds of the computing time.
"""

from dataclasses import dataclass

STRATEGIES = ("ddp", "fsdp")
TRAFFIC = 64  # bytes of memory traffic for each parameter and step: casts, clipping, AdamW, average
WORTH = 1.02  # times as fast that fsdp must be predicted to be chosen


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and what lies between several; those of an H200 in machines of eight, unless measured."""

    seconds_per_tflop: float = 449e-3 / 256 / 0.773
    """Of training: SiT-XL/2 with an online DINOv2-B, 0.773 TFLOP an image, in bf16, compiled; predicted (docs/speed.md)."""
    memory: float = 4.0e12
    """Bytes a second that pointwise kernels move."""
    links: float = 400e9
    """Bytes a second of a ring within a machine."""
    network: float = 350e9
    """Bytes a second of a ring between machines, all their GPUs together."""
    latency: float = 30e-6
    """Seconds before a collective within a machine moves anything; between machines it grows with the logarithm of their number."""
    contention: float = 0.1
    """Part of overlapped communication that computing loses, as both use the device's memory and processors."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one training step on every GPU."""

    compute: float
    communication: float
    """Of all collectives, if nothing overlapped."""
    exposed: float
    """Of them what computing does not hide, and what it loses to the rest."""
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
    """The strategy of the shorter predicted step; ddp where they are alike, and for one process."""
    if machines * gpus == 1:
        return "ddp"
    ddp, fsdp = (step(name, parameters, flops, images, machines, gpus).seconds for name in STRATEGIES)
    return "fsdp" if ddp > WORTH * fsdp else "ddp"
