"""After SIGKILL at any moment, also while writing a checkpoint, the same call resumes with a bit-identical result."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repa.runs import layout, read_metrics
from tests.training.processes import begin

NUM_STEPS = 12


@pytest.fixture(scope="module")
def config(tiny_config):
    """A run that saves at every step, so that about half of the time is spent on checkpoints."""
    return tiny_config.override(
        num_steps=NUM_STEPS, save_every=1, keep_checkpoints=2, keep_every=5, ema_decays=(0.5,), ema_widths=(0.1,),
        snapshot_every=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config, data_folder, tmp_path_factory) -> tuple[Path, float]:
    """An uninterrupted run, and the seconds of its steps."""
    run = tmp_path_factory.mktemp("kills") / "whole"
    child = begin([(config, data_folder, run)])
    await_steps(child, run, 0)
    start = time.monotonic()
    child.join()
    assert child.exitcode == 0
    return run, time.monotonic() - start


def starts(run: Path) -> int:
    """How often the run was started, counted by lines of the log."""
    return (run / layout.LOG).read_text().count("from step") if (run / layout.LOG).is_file() else 0


def await_steps(child, run: Path, before: int) -> None:
    while child.is_alive() and starts(run) == before:
        time.sleep(0.002)


def killed(config, data_folder, run: Path, seconds: float, setting_up: bool) -> bool:
    """Train in a process and kill it `seconds` after its first step or its start; False when it had finished."""
    before = starts(run)
    child = begin([(config, data_folder, run)])
    if not setting_up:
        await_steps(child, run, before)
    child.join(seconds)
    child.kill()  # SIGKILL; no effect when it has finished
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), f"the child failed with exit code {child.exitcode}"
    return child.exitcode != 0


def contents(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint (network, averages, projectors, optimizer) and of the snapshots."""
    folders = [layout.checkpoint_folder(run, NUM_STEPS), *(run / layout.SNAPSHOTS).iterdir()]
    assert layout.snapshot_steps(run) == list(range(2, NUM_STEPS + 1, 2))
    return {
        f"{folder.name}/{p.name}/{key}": value
        for folder in folders if folder.name.isdigit()
        for p in folder.glob("*.safetensors") for key, value in load_file(p).items()
    }  # fmt: skip


def losses(run: Path) -> list[tuple]:
    names = ("step", "loss", "denoising", "grad_norm")
    return [tuple(row[name] for name in names) for row in read_metrics(run) if row["kind"] == "train"]


def endure(num_kills: int, config, data_folder, whole, folder: Path) -> int:
    """Kill runs at random times until `num_kills` hit; every finished run must equal the uninterrupted one.

    Returns how many kills left a partly written checkpoint.
    """
    reference, duration = whole
    stream, kills, torn, finished, number = random.Random(0), 0, 0, 0, 0
    while kills < num_kills or finished == 0:
        run, seconds = folder / str(number), stream.uniform(0, duration * 2 / 3)  # the first step takes about a third
        if kills == num_kills:
            seconds = 60.0
        done = not killed(config, data_folder, run, seconds, setting_up=stream.random() < 0.1)
        kills += not done
        checkpoints = run / layout.CHECKPOINTS
        torn += checkpoints.is_dir() and any(p.name.endswith(".tmp") for p in checkpoints.iterdir())
        if done:
            assert losses(run) == losses(reference)
            mine, yours = contents(run), contents(reference)
            assert mine.keys() == yours.keys()
            assert [name for name in yours if not torch.equal(mine[name], yours[name])] == []
            assert layout.checkpoint_steps(run) == [5, 10, NUM_STEPS - 1, NUM_STEPS]
            finished, number = finished + 1, number + 1
    return torn


@pytest.mark.parametrize("background", [False, True])
def test_a_few_kills_do_not_change_the_result(background, config, data_folder, whole, tmp_path):
    endure(4, config.override(async_save=background), data_folder, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("background", [False, True])
def test_a_hundred_kills_do_not_change_the_result(background, config, data_folder, whole, tmp_path):
    torn = endure(100, config.override(async_save=background), data_folder, whole, tmp_path)
    assert torn >= 10  # some kills interrupted the writing of a checkpoint
