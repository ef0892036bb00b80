"""How several processes share the work: whole copies whose gradients are averaged (DDP), or parameters in parts (FSDP2).

Both average gradients over processes, and every draw is of the global batch, so the number of processes and the
strategy change sums in the last digits only.
"""

import contextlib
import warnings
from collections.abc import Container, Mapping

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from repa.base import dist, launch
from repa.models import Backbone
from repa.runs.checkpoint import OwnedTensor
from repa.training.config import TrainConfig
from repa.training.objective import Objective

# MB of gradients that DDP reduces at once: PyTorch's 25 are 110 reductions for SiT-XL/2, each with its latency.
BUCKET = 200


def shard(objective: Objective, averages: list[Backbone], device: torch.device, precision: str) -> None:
    """Leave each process its part of every parameter, in place (FSDP2): of the objective, and of averages of its network.

    A block's parameters are gathered when it runs and let go after its backward. On several machines each holds all parts, and
    gradients are summed between them (HSDP): no machine waits for another one's weights. Parameters are float32; under
    bf16 the blocks are gathered and multiplied in bf16, and their gradients summed in float32. The rest (embeddings, head,
    projectors) is small and stays float32, and autocast treats it as it does in a single process. Copies of the network
    must be made before this: what is sharded cannot be copied.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes a second that only FSDP needs

    sides = mesh_sides(dist.world(), launch.place(strict=False).local_world)
    mesh = init_device_mesh(device.type, sides, mesh_dim_names=("replicate", "shard")[-len(sides) :])
    half = torch.bfloat16 if precision == "bf16" else None
    # The residual stream stays float32, so the inputs of a block are not cast: autocast casts those of its products.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
    for block in objective.model.blocks:
        # Gathered once a step: the backward finds the weights of the forward, which in bf16 are the smallest thing there.
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(objective, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    # An average runs only where a term looks at the averaged network, and then block by block.
    for average in averages:
        for block in average.blocks:
            fully_shard(block, mesh=mesh)
        # A root keeps its parameters whole after a forward, for the backward; an average has none, and is updated in parts.
        fully_shard(average, mesh=mesh, reshard_after_forward=True)


def mesh_sides(world: int, local_world: int) -> tuple[int, ...]:
    """(processes,) in one row; (machines, processes of each) where there are several machines with as many each."""
    several = 1 < local_world < world and world % local_world == 0
    return (world // local_world, local_world) if several else (world,)


def wrapped(objective: Objective, config: TrainConfig, device: torch.device) -> nn.Module:
    """The module to call: the objective itself, or DDP around it, which averages gradients while the backward goes on."""
    module: nn.Module = objective
    if dist.active() and config.parallel == "ddp":
        with warnings.catch_warnings():
            # Newer releases warn of a second name of broadcast_buffers, which older ones do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            module = DistributedDataParallel(
                objective,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # all of them are constants
                bucket_cap_mb=BUCKET,
            )
    # In place, by `compile` of the module and not torch.compile(module): a wrapper would change the names in checkpoints.
    if config.compile:
        is_sharded = dist.is_sharded(next(objective.parameters()))  # FSDP gathers block by block
        by_block = config.compile_scope == "blocks" or is_sharded
        if by_block:
            objective.model.compile_blocks()
        else:
            objective.model.require_compiles()
            module.compile()
    return module


def without_reduction(objective: nn.Module) -> contextlib.AbstractContextManager:
    """For all micro-batches but the last: gradients are averaged once a step.

    FSDP2 averages after each instead: it would hold whole gradients until the last, which is what it is there to avoid.
    """
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else contextlib.nullcontext()


def gather_full(tensors: Mapping[str, Tensor], mine: Container[str], *, copy: bool = False) -> dict[str, Tensor]:
    """Those of the tensors that are `mine`, whole, on the CPU; all processes must ask for the same; `copy`: never views."""
    out = {}
    for name, tensor in tensors.items():
        # One at a time, so that a device never holds the whole network twice.
        full = dist.full_tensor(tensor.detach())
        if name in mine:
            out[name] = full.to("cpu", copy=copy)
    return out


def distribute_like(owned: OwnedTensor, like: Tensor) -> Tensor:
    """A tensor that one process has read, as this one holds it: its part, laid out as `like`; one of another shape is kept whole.

    All processes must ask at once.
    """
    value, owner = owned
    # Read once and sent, not read by all: a shared file system is slower than the links between processes.
    whole = value.to(like.device) if dist.rank() == owner else torch.empty_like(value, device=like.device)
    if dist.active():
        td.broadcast(whole, owner)
    if dist.is_sharded(like) and value.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # of what each has
    return whole


def load(module: nn.Module, state: Mapping[str, OwnedTensor]) -> None:
    """load_state_dict of whole tensors into a module that may be in parts."""
    own = module.state_dict()
    module.load_state_dict(
        {n: distribute_like(owned, own[n]) if n in own else owned.value for n, owned in state.items()}
    )
