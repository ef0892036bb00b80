"""Training in separate processes, forked from a server that has imported torch, because a fresh start takes seconds.

The test's own process cannot be forked after a backward pass on a machine with a GPU.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import repa
from repa.base import dist
from repa.data import open_data
from repa.training import Hook, train
from tests.calls import call

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "repa.training.loop", "torch._dynamo", "torch.utils.tensorboard"])
Job = tuple[object, Path, Path]  # configuration, data folder, run folder


def probes(config, autoencoder) -> list[Hook]:
    """Hooks that run the averaged network only in the main process, like previews with few images."""

    def probe(state) -> dict[str, float]:
        model = state.model
        x = torch.ones(1, *model.state_shapes["x"])
        with state.full_average() as average, torch.no_grad():
            output = (
                call(average, x, torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long)) if dist.is_main() else None
            )
        return {"probe": float(output.prediction.abs().mean()) if output else 0.0}

    return [Hook(10, probe)]


def torchrun(*words: object, timeout: float) -> subprocess.CompletedProcess:
    """Run `torchrun --nproc-per-node 2 ...` on the CPU."""
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(repa.__file__).parents[1])
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def begin(
    jobs: Sequence[Job], rank: int = 0, world: int = 1, meeting: Path | None = None, local: int = 0
) -> multiprocessing.Process:
    """Start a process that trains these runs one after the other."""
    process = CONTEXT.Process(target=_train, args=(jobs, rank, world, meeting, local), daemon=True)
    process.start()
    return process


def run_all(jobs: Sequence[Job], world: int, folder: Path, limit: float = 240, local: int = 0) -> None:
    """Train the runs in `world` gloo processes, `local` per machine; fails with any of them or after `limit` s."""
    processes = [begin(jobs, rank, world, folder / "meeting", local) for rank in range(world)]
    limit += time.monotonic()
    for process in processes:
        process.join(max(1.0, limit - time.monotonic()))
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world


def _train(jobs: Sequence[Job], rank: int, world: int, meeting: Path | None, local: int) -> None:
    torch.set_num_threads(1)
    if local:
        os.environ |= {"LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local)}
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for config, data, run in jobs:
        train(config, open_data(data), run, device=torch.device("cpu"), make_hooks=probes, say=lambda text: None)
    dist.teardown()
    os._exit(0)
