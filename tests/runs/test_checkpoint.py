"""Checkpoints are complete or absent, and changed bytes are found."""

import errno
import os
import pickle
import shutil

import pytest
import torch
from torch import nn

from repa.base import files
from repa.base.errors import UserError
from repa.runs import Checkpoint, checkpoint, layout, load_checkpoint, save_checkpoint
from repa.runs.checkpoint import load_weights

FILES = (layout.MODEL_FILE, layout.EMA_FILE, layout.PROJECTORS_FILE, layout.OPTIMIZER_FILE)


def make(step: int) -> Checkpoint:
    """A checkpoint of real state dictionaries that differ at every step."""
    torch.manual_seed(step)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    ema = {name: value * 0.5 for name, value in model.state_dict().items()}
    moments = {f"{n}/{key}": value for n, p in model.named_parameters() for key, value in optimizer.state[p].items()}
    tensors = dict(zip(FILES, (model.state_dict(), ema, {"0.weight": torch.randn(2, 2).T}, moments), strict=True))
    tensors["ema-0.5.safetensors"] = {name: value * 0.25 for name, value in ema.items()}
    return Checkpoint(step, {"seconds": step / 8}, tensors)


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.step, a.counters) == (b.step, b.counters)
    assert a.tensors.keys() == b.tensors.keys() == {*FILES, "ema-0.5.safetensors"}
    for name, mine in a.tensors.items():
        yours = b.tensors[name]
        assert mine.keys() == yours.keys()
        assert mine
        assert all(torch.equal(mine[key], yours[key]) for key in mine)


def test_a_saved_checkpoint_is_read_back(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (5, 40, 7):
        save_checkpoint(tmp_path, make(step))
    assert layout.checkpoint_steps(tmp_path) == [5, 7, 40]
    assert_same(load_checkpoint(tmp_path), make(40))  # the highest step rather than the last written
    assert_same(load_checkpoint(tmp_path, 7), make(7))
    for weights, wanted in (("ema", make(40).ema), ("model", make(40).model)):
        step, found = load_weights(tmp_path, weights)
        assert step == 40
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("moment", [*FILES, layout.STATE_FILE, "rename"])
def test_a_kill_between_files_leaves_the_old_checkpoint(moment, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, make(5))

    def die_at(name, function, position):
        def wrapped(*arguments):
            if name == "rename" or os.path.basename(arguments[position]) == name:
                os._exit(9)  # no cleanup, as with SIGKILL
            return function(*arguments)

        return wrapped

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(checkpoint, "save_file", die_at(moment, checkpoint.save_file, 1))
        monkeypatch.setattr(files, "write_json", die_at(moment, files.write_json, 0))
        if moment == "rename":
            monkeypatch.setattr(os, "rename", die_at(moment, os.rename, 1))
        save_checkpoint(tmp_path, make(10), keep=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert layout.checkpoint_steps(tmp_path) == [5]
    assert_same(load_checkpoint(tmp_path), make(5))
    save_checkpoint(tmp_path, make(10), keep=1)
    assert [p.name for p in (tmp_path / layout.CHECKPOINTS).iterdir()] == ["0000010"]  # the partial one is removed too
    assert_same(load_checkpoint(tmp_path), make(10))


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert layout.checkpoint_steps(tmp_path) == [3, 4]
    for step in (5, 6):
        save_checkpoint(tmp_path, make(step), keep=0)
    assert layout.checkpoint_steps(tmp_path) == [3, 4, 5, 6]


def test_every_nth_checkpoint_is_kept(tmp_path):
    for step in range(1, 9):
        save_checkpoint(tmp_path, make(step), keep=2, keep_every=3)
    assert layout.checkpoint_steps(tmp_path) == [3, 6, 7, 8]


def test_a_kill_while_removing_an_old_checkpoint_leaves_no_partial_one(tmp_path, monkeypatch):
    for step in (5, 10):
        save_checkpoint(tmp_path, make(step))

    def die(folder):
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(shutil, "rmtree", die)
        save_checkpoint(tmp_path, make(15), keep=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    steps = layout.checkpoint_steps(tmp_path)
    assert steps == [10, 15]
    for step in steps:
        assert_same(load_checkpoint(tmp_path, step), make(step))
    save_checkpoint(tmp_path, make(20), keep=1)
    assert [p.name for p in (tmp_path / layout.CHECKPOINTS).iterdir()] == ["0000020"]


def test_saving_the_same_step_again_keeps_the_first(tmp_path):
    save_checkpoint(tmp_path, make(5))
    save_checkpoint(tmp_path, make(5)._replace(tensors=make(6).tensors))
    assert_same(load_checkpoint(tmp_path), make(5))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(name, tmp_path):
    for step in (5, 10):
        save_checkpoint(tmp_path, make(step))
    path = layout.checkpoint_folder(tmp_path, 10) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is damaged.*continues from step 5"):
        load_checkpoint(tmp_path)
    assert_same(load_checkpoint(tmp_path, 5), make(5))
    if name != layout.EMA_FILE:  # sampling reads and verifies only this file
        assert load_weights(tmp_path, "ema")[0] == 10
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is damaged"):
        load_checkpoint(tmp_path)


def test_a_truncated_state_file_is_reported(tmp_path):
    path = save_checkpoint(tmp_path, make(5)) / layout.STATE_FILE
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        load_checkpoint(tmp_path)


def test_a_state_file_without_its_checksum_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, make(5)) / layout.STATE_FILE
    files.write_json(path, files.read_json(path))
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        load_checkpoint(tmp_path)


def test_a_foreign_state_file_cannot_name_files_elsewhere(tmp_path):
    elsewhere = tmp_path / "model.safetensors"
    folder = save_checkpoint(tmp_path / "run", make(5))
    elsewhere.write_bytes((folder / layout.MODEL_FILE).read_bytes())
    state = files.read_json(folder / layout.STATE_FILE)
    state["sha256"]["../../../model.safetensors"] = files.sha256(elsewhere)
    files.write_sealed(folder / layout.STATE_FILE, state)
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        load_checkpoint(tmp_path / "run")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_foreign_checkpoint_runs_no_code(name, zipped, tmp_path):
    folder = save_checkpoint(tmp_path, make(5))
    path, mark = folder / name, tmp_path / "executed"
    torch.save({"state": Bomb(mark)}, path) if zipped else path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    state = files.read_json(folder / layout.STATE_FILE)
    state["sha256"][path.name] = files.sha256(path)  # an attacker would also write the checksum
    files.write_sealed(folder / layout.STATE_FILE, state)
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        load_checkpoint(tmp_path)
    assert not mark.exists()


def test_the_weights_of_a_checkpoint_with_a_pickled_optimizer_are_still_read(tmp_path):
    folder = save_checkpoint(tmp_path, make(5))
    state = files.read_json(folder / layout.STATE_FILE)
    del state["sha256"][layout.OPTIMIZER_FILE]
    (folder / layout.OPTIMIZER_FILE).unlink()
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    state["sha256"]["optimizer.pt"] = files.sha256(folder / "optimizer.pt")
    files.write_sealed(folder / layout.STATE_FILE, state)
    found = load_checkpoint(tmp_path)
    assert layout.OPTIMIZER_FILE not in found.tensors
    assert all(torch.equal(found.ema[key], value) for key, value in make(5).ema.items())
    assert not (tmp_path / "executed").exists()


def test_missing_checkpoints_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint yet: train it first"):
        load_weights(tmp_path, "ema")
    save_checkpoint(tmp_path, make(5))
    with pytest.raises(UserError, match="no checkpoint of step 6: there are 5"):
        load_checkpoint(tmp_path, 6)
    with pytest.raises(UserError, match="has no weights 'best' at step 5: choose ema, ema-0.5, model,"):
        load_weights(tmp_path, "best")


def test_a_checkpoint_that_cannot_be_removed_does_not_stop_training(random_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(random_run, run)
    new = load_checkpoint(run)._replace(step=30)

    def busy(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    with pytest.warns(UserWarning, match="the next checkpoint .* tries again"):
        save_checkpoint(run, new, keep=1)
    monkeypatch.undo()
    assert layout.checkpoint_steps(run) == [30]
    save_checkpoint(run, new._replace(step=40), keep=1)
    assert [path.name for path in (run / layout.CHECKPOINTS).iterdir()] == ["0000040"]


def test_weights_removed_while_they_are_read_are_handled(random_run, tmp_path, monkeypatch):
    from repa.runs import checkpoint as room

    run = tmp_path / "run"
    shutil.copytree(random_run, run)
    read = room._load_weights

    def rotated(run, weights, step):
        monkeypatch.setattr(room, "_load_weights", read)
        newest = layout.checkpoint_folder(run, 20)
        shutil.copytree(newest, tmp_path / "copy")
        shutil.rmtree(newest)
        raise UserError("a file is gone")

    monkeypatch.setattr(room, "_load_weights", rotated)
    assert room.load_weights(run, "ema")[0] == 10
