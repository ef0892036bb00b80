"""Two processes write a checkpoint in parts; one process or two can read it, and a kill while writing is harmless."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repa.base.errors import UserError
from repa.data import open_data
from repa.report.summary import num_parameters
from repa.runs import checkpoint, layout, load_checkpoint, writer
from repa.runs.checkpoint import load_weights, shares, weights_checksum
from repa.runs.export import export_run
from repa.training import train
from repa.training.resolve import resolve
from repa.training.state import build_state
from tests.training import processes

PART = 6000  # bytes; the tests' network has ten times as many


def test_every_tensor_is_written_once_and_the_bytes_are_divided_evenly(monkeypatch):
    monkeypatch.setattr(checkpoint, "PART", 100)
    sizes = {
        "a.safetensors": {f"w{i}": 40 for i in range(10)} | {"empty": 0},
        "b.safetensors": {"w": 90},
        "c.safetensors": {},
    }
    for num in (1, 2, 3, 8):
        found = shares(sizes, num)
        written = [
            (layout.whole_name(part), name) for share in found for part, names in share.items() for name in names
        ]
        assert sorted(written) == sorted((file, name) for file, tensors in sizes.items() for name in tensors)
        parts = sorted(part for share in found for part in share)
        assert len(set(parts)) == len(parts)
        assert {"b.safetensors", "c.safetensors"} <= set(parts)  # small tensors are not split
        loads = [sum(sizes[layout.whole_name(p)][n] for p, names in share.items() for n in names) for share in found]
        assert max(loads) <= 490 / num + 100
    assert sorted(shares(sizes, 2)[0] | shares(sizes, 2)[1]) == [
        "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "b.safetensors", "c.safetensors"
    ]  # fmt: skip


def in_parts(jobs, rank: int, meeting: Path, kill_at: int) -> None:
    """Train as one of two processes; rank 1 dies while writing the checkpoint of step `kill_at`."""
    checkpoint.PART = PART
    write = checkpoint.write_files

    def dying(folder, share):
        if rank == 1 and share.step == kill_at:
            (folder / sorted(share.tensors)[0]).write_bytes(b"half a fi")
            os._exit(9)
        return write(folder, share)

    writer.write_files = dying
    processes._train(jobs, rank, 2, meeting, 0)


def two(config, data_folder: Path, run: Path, meeting: Path, kill_at: int = -1) -> list[int | None]:
    """Exit codes of two processes that train one run; when one is killed, the other is killed too, as by torchrun."""
    jobs = [(config, data_folder, run)]
    children = [
        processes.CONTEXT.Process(target=in_parts, args=(jobs, rank, meeting, kill_at), daemon=True) for rank in (0, 1)
    ]
    for child in children:
        child.start()
    end = time.monotonic() + 240
    while any(child.is_alive() for child in children) and time.monotonic() < end:
        if any(child.exitcode for child in children):
            break
        time.sleep(0.05)
    for child in children:
        child.kill()
        child.join()
    return [child.exitcode for child in children]


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config.override(
        num_steps=10,
        save_every=5,
        keep_checkpoints=0,
        parallel="fsdp",
        ema_decays=(0.5,),
        optimizer={"learning_rate": 1e-3},
    )


@pytest.fixture(scope="module")
def whole(config, data_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    assert two(config, data_folder, folder / "run", folder / "meeting") == [0, 0]
    return folder / "run"


def contents(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by file, read with plain safetensors."""
    paths = layout.checkpoint_folder(run, step).glob("*.safetensors")
    return {f"{layout.whole_name(p.name)}/{key}": x for p in paths for key, x in load_file(p).items()}


def assert_same(mine: dict[str, torch.Tensor], yours: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[name], yours[name]) for name in mine)


def test_large_files_are_written_in_parts_and_read_as_one(whole):
    folder = layout.checkpoint_folder(whole, 10)
    names = sorted(path.name for path in folder.iterdir())
    assert {
        "model-00001-of-00002.safetensors",
        "ema-0.5-00002-of-00002.safetensors",
        "projectors-00001-of-00002.safetensors",
    } <= set(names)
    found = load_checkpoint(whole)
    of_files = {f"{file}/{name}": x for file, tensors in found.tensors.items() for name, x in tensors.items()}
    assert_same(of_files, contents(whole, 10))
    assert_same(load_weights(whole, "ema-0.5")[1], found.tensors["ema-0.5.safetensors"])
    assert len(weights_checksum(whole, "ema", 10)) == 64
    assert weights_checksum(whole, "ema", 10) != weights_checksum(whole, "model", 10)
    assert num_parameters(whole) == sum(x.numel() for x in found.model.values())


def test_one_process_resumes_with_every_bit(whole, config, data_folder):
    data, device = open_data(data_folder), torch.device("cpu")
    alone = resolve(config.override(parallel="ddp"), data, device)
    state = build_state(alone, {"tiny": data.features["tiny"].dim}, device, is_new_run=False)
    state.resume(whole)
    share = state.snapshot()
    assert (share.step, state.step) == (10, 10)
    assert_same(
        {f"{file}/{n}": x for file, tensors in share.tensors.items() for n, x in tensors.items()}, contents(whole, 10)
    )


def test_a_process_killed_while_writing_loses_only_the_steps_since_the_last_checkpoint(
    whole, config, data_folder, tmp_path
):
    run = tmp_path / "run"
    assert two(config, data_folder, run, tmp_path / "first", kill_at=10)[1] == 9
    assert layout.checkpoint_steps(run) == [5]
    assert [path.name[:9] for path in (run / layout.CHECKPOINTS).glob(".*")] == [".0000010."]
    assert_same(contents(run, 5), contents(whole, 5))
    assert two(config.override(async_save=True), data_folder, run, tmp_path / "second") == [0, 0]
    assert sorted(path.name for path in (run / layout.CHECKPOINTS).iterdir()) == ["0000005", "0000010"]
    assert_same(contents(run, 10), contents(whole, 10))


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_an_export_from_parts_has_the_same_bits(form, whole, tmp_path):
    alone = shutil.copytree(whole, tmp_path / "alone")
    shutil.rmtree(layout.checkpoint_folder(alone, 10))
    checkpoint.save_checkpoint(alone, load_checkpoint(whole, 10))
    assert len(layout.part_files(layout.checkpoint_folder(whole, 10), "ema.safetensors")) == 2
    assert len(layout.part_files(layout.checkpoint_folder(alone, 10), "ema.safetensors")) == 1
    made = {}
    for run in (whole, alone):
        out = tmp_path / f"{run.name} exported"
        assert export_run(run, out, form) == 10
        made[run] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert made[whole] == made[alone]


def test_a_damaged_or_missing_part_is_named(whole, config, data_folder, tmp_path):
    run = tmp_path / "run"
    for step in (5, 10):
        folder = layout.checkpoint_folder(run, step)
        folder.mkdir(parents=True)
        for path in layout.checkpoint_folder(whole, step).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "optimizer-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for name in ("config.yaml", "data.json"):
        (run / name).write_bytes((whole / name).read_bytes())
    with pytest.raises(UserError, match=f"{path.name} is damaged.*continues from step 5"):
        train(
            config.override(num_steps=11),
            open_data(data_folder),
            run,
            device=torch.device("cpu"),
            say=lambda text: None,
        )
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        load_checkpoint(run)
    assert load_weights(run, "ema")[0] == 10  # sampling reads only these parts
