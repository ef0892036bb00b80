"""torch.distributed, or nothing: every function is a no-op in a single process. torchrun starts the several."""

import gc
import os
from datetime import timedelta

import torch
import torch.distributed as td
from torch import Tensor

from repa.base.errors import UserError

TIMEOUT = timedelta(hours=2)  # the others wait while one process measures a reference or writes samples


def setup() -> torch.device:
    """Join the process group when torchrun started several processes; returns this process's device.

    cuda (NCCL), mps or cpu (gloo), whichever the machine has.
    """
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if local > torch.cuda.device_count():
            raise UserError(
                f"{local} processes were started on a machine with {torch.cuda.device_count()} GPUs: "
                f"give torchrun --nproc-per-node {torch.cuda.device_count()}."
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available() and "WORLD_SIZE" not in os.environ:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not td.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # statistics are reduced on the CPU
        td.init_process_group(backend, timeout=TIMEOUT)
    return device


def teardown() -> None:
    """Leave the group cleanly: gloo's threads abort the interpreter when tensors outlive them, so collect, meet, then destroy."""
    if td.is_available() and td.is_initialized():
        gc.collect()
        td.barrier()
        td.destroy_process_group()


def active() -> bool:
    return td.is_available() and td.is_initialized() and td.get_world_size() > 1


def rank() -> int:
    return td.get_rank() if active() else 0


def world() -> int:
    return td.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if active():
        td.barrier()


def sum_over(x: Tensor) -> Tensor:
    """Sum over processes (same shape on each); a new tensor."""
    x = x.clone()
    if active():
        td.all_reduce(x)
    return x


def mean_over(x: Tensor) -> Tensor:
    return sum_over(x) / world()


def gather(x: Tensor) -> Tensor:
    """Rows of every process, in rank order: (N, ...) -> (world * N, ...). No gradient; equal N everywhere."""
    if not active():
        return x
    rows = [torch.empty_like(x) for _ in range(world())]
    td.all_gather(rows, x.contiguous())
    return torch.cat(rows)


def from_main(value):
    """The main process's (picklable) value on every process."""
    if not active():
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value) -> list:
    """The (small, picklable) value of every process, in rank order."""
    if not active():
        return [value]
    box = [None] * world()
    td.all_gather_object(box, value)
    return box


def any_process(flag: bool, device: torch.device) -> bool:
    """True everywhere when `flag` is true somewhere."""
    return bool(sum_over(torch.tensor(float(flag), device=device)) > 0)
