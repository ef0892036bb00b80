"""Processes that were given different work say so before the first step, instead of training into a hang."""

import pytest

from repa.data import open_data
from repa.training import loop
from tests.training.processes import begin


@pytest.mark.parametrize("what", ["configuration", "step"])
def test_processes_that_disagree_stop(what, tiny_config, data_folder, run_training, tmp_path):
    one = tiny_config.override(num_steps=4, save_every=2)
    runs = [tmp_path / "a", tmp_path / "b"]
    configs = [one, one.override(seed=1)] if what == "configuration" else [one, one]
    if what == "step":
        run_training(one.override(num_steps=2), runs[0])
    meeting = tmp_path / "meeting"
    children = [begin([(configs[r], data_folder, runs[r])], r, 2, meeting) for r in range(2)]
    for child in children:
        child.join(120)
    assert all(child.exitcode not in (0, None) for child in children)
    assert not (runs[1] / "checkpoints/0000004").exists()  # nobody trained on


@pytest.mark.parametrize("what", ["configuration", "step", "data"])
def test_the_sentence_names_what_differs(what, tiny_config, data_folder, monkeypatch, tmp_path):
    def others(value):
        return [value, {**value, what: "other"} if isinstance(value, dict) else 7]

    monkeypatch.setattr(loop.dist, "gather_objects", others)
    with pytest.raises(loop.dist.SharedError, match=f"disagree about {what}"):
        loop._require_agreement(tmp_path, tiny_config, open_data(data_folder), 3)
