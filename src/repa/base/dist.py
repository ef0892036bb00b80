"""torch.distributed; every function is a no-op in a single process. torchrun starts several processes."""

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as td
from torch import Tensor

from repa.base import launch, lock
from repa.base.errors import UserError
from repa.base.faults import sentence_of
from repa.base.mailbox import Mailbox

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

NOTE_AFTER = 10.0  # seconds of waiting for other processes before a line says so
# Limit for collectives of tensors, which all processes reach together; longer waits use a `Mailbox`.
TIMEOUT = timedelta(minutes=15)
_mailbox: Mailbox | None = None
Value = TypeVar("Value")


class SharedError(UserError):
    """An error that every process raises: it is printed once per machine."""


def own_device() -> torch.device:
    """This process's device, without joining a group: cuda (by local rank), mps or cpu."""
    if torch.cuda.is_available():
        here = launch.place()
        local = here.local_world
        if local > torch.cuda.device_count():
            raise UserError(
                f"{local} processes were started on a machine with {torch.cuda.device_count()} GPUs: "
                f"give torchrun --nproc-per-node {torch.cuda.device_count()}."
            )
        device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("mps" if torch.backends.mps.is_available() and "WORLD_SIZE" not in os.environ else "cpu")


def setup() -> torch.device:
    """Join the process group (NCCL, or gloo) when torchrun started several processes; returns this process's device."""
    device = own_device()
    if launch.place().world > 1 and not td.is_initialized():
        # Gloo beside NCCL: statistics of samples are float64 on the CPU, and are reduced there.
        _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def _join(backend: str) -> None:
    """Wait for the other processes for at most REPA_JOIN_MINUTES; the error names the missing ones."""
    here, minutes = launch.place(), launch.join_minutes()
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE is {here.world}, but {missing[0]} is not set: start the processes by torchrun, or unset RANK and "
            "WORLD_SIZE for one process."
        )
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waiting = f"process {here.rank} of {here.world} waits for the others at {where}, at most {minutes:g} minutes"
    note = threading.Timer(NOTE_AFTER, lambda: print(f"repa: {waiting} ({launch.JOIN})", file=sys.stderr, flush=True))
    note.daemon = True
    note.start()
    deadline = time.monotonic() + 60 * minutes
    try:
        # Each process registers in the store before init_process_group, which does not say whom it waits for.
        store, rank, world = next(td.rendezvous("env://", here.rank, here.world, timeout=timedelta(minutes=minutes)))
        store = td.PrefixStore("repa", store)
        store.set(f"here/{rank}", "1")
        absent = list(range(world))
        while absent := [other for other in absent if not store.check([f"here/{other}"])]:
            if time.monotonic() > deadline:
                raise UserError(_timeout_sentence(f"processes {', '.join(map(str, absent[:8]))}", minutes))
            time.sleep(0.05)
    except (td.DistError, TimeoutError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        if time.monotonic() < deadline:
            raise UserError(
                f"The processes cannot meet at {where} ({reason}): correct MASTER_ADDR and MASTER_PORT, or start the "
                "processes by torchrun."
            ) from error
        raise UserError(
            _timeout_sentence(f"the other processes at {where}", minutes) + f" (PyTorch said: {reason})"
        ) from error
    finally:
        note.cancel()
    # Gloo connects two processes when they first communicate, not all pairs at the start; on CUDA only statistics use
    # it.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    td.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)


def _timeout_sentence(whom: str, minutes: float) -> str:
    return (
        f"Waited {minutes:g} minutes for {whom}: check that they have started and can reach each other, or set "
        f"{launch.JOIN} to wait longer."
    )


def teardown() -> None:
    """Leave the group: gloo's threads abort the interpreter if tensors outlive them, so collect garbage, meet, then destroy."""
    global _mailbox
    if td.is_available() and td.is_initialized():
        gc.collect()
        # The first barrier waits for late processes. The group's barrier then ends all at once, because the store ends
        # with the main process.
        barrier()
        td.barrier()
        td.destroy_process_group()
        _mailbox = None


def active() -> bool:
    return td.is_available() and td.is_initialized() and td.get_world_size() > 1


def rank() -> int:
    return td.get_rank() if active() else 0


def world() -> int:
    return td.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


def _mailbox_of_group() -> Mailbox:
    """The mailbox of this process's group, which this package or a caller has created."""
    global _mailbox
    store = td.distributed_c10d._get_default_store()
    if _mailbox is None or _mailbox.origin is not store:
        _mailbox = Mailbox(store, rank(), world())
    return _mailbox


def barrier() -> None:
    """Wait until all processes are here, however long one of them takes."""
    gather_objects(None)


def sum_over(x: Tensor) -> Tensor:
    """Sum over processes (same shape on each); a new tensor."""
    x = x.clone()
    if active():
        td.all_reduce(x)
    return x


def mean_over(x: Tensor) -> Tensor:
    return sum_over(x) / world()


def is_sharded(x: Tensor) -> TypeGuard["DTensor"]:
    """Whether this tensor is sharded over processes."""
    # Tested by its method: importing DTensor takes a second, which a command in one process need not spend.
    return hasattr(x, "full_tensor")


def full_tensor(x: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; a collective call."""
    return x.full_tensor() if is_sharded(x) else x


def gather(x: Tensor) -> Tensor:
    """Rows of every process, in rank order: (N, ...) -> (world * N, ...). No gradient; equal N everywhere."""
    if not active():
        return x
    rows = [torch.empty_like(x) for _ in range(world())]
    td.all_gather(rows, x.contiguous())
    return torch.cat(rows)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.rows = slice(rank() * len(x), (rank() + 1) * len(x))
        return gather(x)

    # Every process computes a loss over all rows, so the gradient of a row is a sum over processes.
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return sum_over(gradient.contiguous())[ctx.rows]


def gather_with_gradient(x: torch.Tensor) -> torch.Tensor:
    """`gather` with gradients, which flow back to the process of each row.

    A loss that every process computes over all rows then has its correct gradient after DDP's mean over processes.
    """
    return _GatherWithGradient.apply(x) if active() else x


def from_main(value: Value) -> Value:
    """The main process's (picklable) value on every process."""
    if not active():
        return value
    return _mailbox_of_group().from_main(value)


def on_main(function: Callable[[], Value]) -> Value:
    """Call `function` in the main process and return its result everywhere. All processes raise its UserError."""
    if not active():
        return function()
    # Only the main process raises a bug of repa, with its traceback; the launcher ends the others.
    value = sentence = None
    if is_main():
        try:
            value = function()
        except Exception as error:
            if (sentence := sentence_of(error)) is None:
                raise
    value, sentence = from_main((value, sentence))
    if sentence is not None:
        raise SharedError(sentence)
    return cast("Value", value)


@contextlib.contextmanager
def locked(target: Path, doing: str) -> Iterator[None]:
    """`lock.exclusive`, held by the main process; all processes raise its UserError."""
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(lock.exclusive(target, doing)))
        yield


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Checks of each process: all processes raise the UserError of any. The block must not communicate."""
    mine = None
    try:
        yield
    except Exception as error:
        if not active() or sentence_of(error) is None:
            raise
        mine = error
    sentences = [sentence for sentence in gather_objects(mine and sentence_of(mine)) if sentence]
    if sentences:
        raise SharedError(sentences[0]) from mine


def gather_objects(value: Value) -> list[Value]:
    """The (small, picklable) value of every process, in rank order."""
    if not active():
        return [value]
    return _mailbox_of_group().gather(value)


def any_process(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is true in any process."""
    return (sum_over(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist() if active() else flags
