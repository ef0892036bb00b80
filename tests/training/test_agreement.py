"""Processes with different work stop with an error before the first step instead of hanging."""

import pytest

from repa.data import open_data
from repa.training import resolve
from tests.training.processes import begin


def run_two(configs, data_folder, runs, meeting) -> list[int | None]:
    children = [begin([(configs[r], data_folder, runs[r])], r, 2, meeting) for r in range(2)]
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


def test_processes_that_disagree_stop(tiny_config, data_folder, tmp_path):
    one = tiny_config.override(num_steps=4, save_every=2)
    runs = [tmp_path / "a", tmp_path / "b"]
    codes = run_two([one, one.override(seed=1)], data_folder, runs, tmp_path / "meeting")
    assert all(code not in (0, None) for code in codes)
    assert not (runs[0] / "checkpoints/0000004").exists()  # no process continued training


def test_a_process_without_the_run_folder_receives_the_checkpoint(tiny_config, data_folder, run_training, tmp_path):
    one = tiny_config.override(num_steps=4, save_every=2)
    runs = [tmp_path / "a", tmp_path / "b"]
    run_training(one.override(num_steps=2), runs[0])
    assert run_two([one, one], data_folder, runs, tmp_path / "meeting") == [0, 0]
    assert (runs[0] / "checkpoints/0000004").is_dir()
    assert not (runs[1] / "checkpoints").exists()


@pytest.mark.parametrize("what", ["configuration", "step", "data"])
def test_the_error_names_what_differs(what, tiny_config, data_folder, monkeypatch, tmp_path):
    def others(value):
        return [value, {**value, what: "other"} if isinstance(value, dict) else 7]

    monkeypatch.setattr(resolve.dist, "gather_objects", others)
    with pytest.raises(resolve.dist.SharedError, match=f"differ in {what}"):
        resolve.require_agreement(tmp_path, tiny_config, open_data(data_folder), 3)
