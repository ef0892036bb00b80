"""Parallel strategies: replicas with averaged gradients (DDP), or sharded parameters (FSDP2).

Both average gradients over processes, and random numbers are sampled for the global batch, so the number of processes and
the strategy change only the last digits of sums.
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

# MB of gradients per DDP reduction: PyTorch's default of 25 gives 110 reductions for SiT-XL/2, each with its latency.
BUCKET = 200


def shard(objective: Objective, averages: list[Backbone], device: torch.device, precision: str) -> None:
    """Shard every parameter of the objective, and of the averages of its network, over processes, in place (FSDP2).

    A block's parameters are gathered when it runs and freed after its backward pass. With several machines each has all shards,
    and gradients are summed between machines (HSDP): no machine waits for another one's weights. Parameters are float32; with
    bf16 the blocks are gathered and multiplied in bf16, and their gradients are summed in float32. The rest (embeddings, head,
    projectors) is small and stays float32; autocast treats it as in a single process. Copy the network before this, because a
    sharded network cannot be copied.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes a second that only FSDP needs

    sides = mesh_sides(dist.world(), launch.place(strict=False).local_world)
    mesh = init_device_mesh(device.type, sides, mesh_dim_names=("replicate", "shard")[-len(sides) :])
    half = torch.bfloat16 if precision == "bf16" else None
    # The residual stream stays float32, so the inputs of a block are not cast: autocast casts the inputs of its products.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
    for block in objective.model.blocks:
        # Gathered once per step: the backward pass reuses the forward's weights, which in bf16 need little memory.
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(objective, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    # An average runs only if a term reads the averaged network, and then block by block.
    for average in averages:
        for block in average.blocks:
            fully_shard(block, mesh=mesh)
        # A root keeps its parameters gathered after a forward pass; an average has no backward pass and is updated in shards.
        fully_shard(average, mesh=mesh, reshard_after_forward=True)


def mesh_sides(world: int, local_world: int) -> tuple[int, ...]:
    """(processes,), or (machines, processes per machine) for several machines with equal numbers of processes."""
    several = 1 < local_world < world and world % local_world == 0
    return (world // local_world, local_world) if several else (world,)


def wrapped(objective: Objective, config: TrainConfig, device: torch.device) -> nn.Module:
    """The module to call: the objective itself, or DDP around it, which averages gradients during the backward pass."""
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
    # In place with the module's `compile`, not torch.compile(module): a wrapper would change the names in checkpoints.
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
    """Context for all micro-batches but the last, so that gradients are averaged once per step.

    FSDP2 averages after each micro-batch instead: otherwise it would keep unsharded gradients until the last one.
    """
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else contextlib.nullcontext()


def gather_full(tensors: Mapping[str, Tensor], mine: Container[str], *, copy: bool = False) -> dict[str, Tensor]:
    """The unsharded tensors of `mine` on the CPU; a collective call with the same arguments on all processes; `copy`: no views."""
    out = {}
    for name, tensor in tensors.items():
        # One at a time, so that a device never holds the full network twice.
        full = dist.full_tensor(tensor.detach())
        if name in mine:
            out[name] = full.to("cpu", copy=copy)
    return out


def distribute_like(owned: OwnedTensor, like: Tensor) -> Tensor:
    """Distribute a tensor that one process has read: this process's shard, with the layout of `like`; unsharded if shapes differ.

    A collective call of all processes.
    """
    value, owner = owned
    # Read once and sent: a shared file system is slower than the links between processes.
    whole = value.to(like.device) if dist.rank() == owner else torch.empty_like(value, device=like.device)
    if dist.active():
        td.broadcast(whole, owner)
    if dist.is_sharded(like) and value.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # of what each has
    return whole


def load(module: nn.Module, state: Mapping[str, OwnedTensor]) -> None:
    """load_state_dict of full tensors into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict(
        {n: distribute_like(owned, own[n]) if n in own else owned.value for n, owned in state.items()}
    )
