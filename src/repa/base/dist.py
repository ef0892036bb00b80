"""torch.distributed, or nothing: every function is a no-op in a single process. torchrun starts the several."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as td
from torch import Tensor

from repa.base.errors import UserError

TIMEOUT = timedelta(hours=2)  # the others wait while one process measures a reference or writes samples
Value = TypeVar("Value")


class SharedError(UserError):
    """A mistake that every process knows of and raises: only the main one need say it."""


def own_device() -> torch.device:
    """This process's device, without joining a group: cuda by its local rank, mps or cpu, whichever the machine has."""
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if local > torch.cuda.device_count():
            raise UserError(
                f"{local} processes were started on a machine with {torch.cuda.device_count()} GPUs: "
                f"give torchrun --nproc-per-node {torch.cuda.device_count()}."
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("mps" if torch.backends.mps.is_available() and "WORLD_SIZE" not in os.environ else "cpu")


def setup() -> torch.device:
    """Join the process group (NCCL, or gloo) when torchrun started several processes; returns this process's device."""
    device = own_device()
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


def on_main(function: Callable[[], Value]) -> Value:
    """What `function` returns in the main process, on every process. Its UserError is raised by all: none waits for ever."""
    if not active():
        return function()
    value = sentence = None
    if is_main():
        try:
            value = function()
        except UserError as error:
            sentence = str(error)
    value, sentence = from_main((value, sentence))
    if sentence is not None:
        raise SharedError(sentence)
    return value


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Processes check something each for itself: the UserError of any is raised by all. The block must not communicate."""
    mine = None
    try:
        yield
    except UserError as error:
        if not active():
            raise
        mine = error
    sentences = [sentence for sentence in gather_objects(mine and str(mine)) if sentence]
    if sentences:
        raise SharedError(sentences[0]) from mine


def gather_objects(value) -> list:
    """The (small, picklable) value of every process, in rank order."""
    if not active():
        return [value]
    box = [None] * world()
    td.all_gather_object(box, value)
    return box


def any_process(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag: whether it is true in some process."""
    return (sum_over(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist() if active() else flags
