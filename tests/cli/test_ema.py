"""`repa ema` reconstructs an average from snapshots; compared with a run that tracked it, and sampled by name."""

import shutil

import numpy as np
import pytest
import torch

from repa.cli.main import run as repa
from repa.runs import layout, load_checkpoint, load_run


@pytest.fixture(scope="module")
def runs(tiny_config, data_folder, tmp_path_factory):
    """(run with snapshots of two widths, the same training with width 0.07 tracked)"""
    from repa.data import open_data
    from repa.training import train

    folder = tmp_path_factory.mktemp("runs")
    common = tiny_config.override(
        num_steps=60, save_every=30, log_every=60, optimizer={"learning_rate": 3e-3}, ema_decays=(0.5,)
    )
    for name, change in {
        "snapshots": {"ema_widths": (0.05, 0.1), "snapshot_every": 4},
        "tracked": {"ema_widths": (0.07,)},
    }.items():
        config = common.override(**change)
        train(config, open_data(data_folder), folder / name, device=torch.device("cpu"), say=lambda text: None)
    return folder / "snapshots", folder / "tracked"


def vector(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


def command(*words) -> int:
    return repa([str(word) for word in words])


def test_an_average_of_another_width_is_computed_and_sampled(runs, tmp_path, capsys):
    snapshots, tracked = runs
    assert layout.snapshot_steps(snapshots) == list(range(4, 61, 4))
    assert command("ema", snapshots, "--width", 0.07) == 0
    assert f"repa sample {snapshots} --weights ema-width-0.07" in capsys.readouterr().out
    made = load_run(snapshots, "ema-width-0.07")
    wanted = load_checkpoint(tracked, 60)
    raw, average = vector(wanted.model), vector(wanted.tensors["ema-width-0.07.safetensors"])
    found = vector({key: made.model.state_dict()[key] for key in wanted.model})
    assert made.step == 60
    assert (found - average).norm() < 0.03 * (raw - average).norm()
    assert torch.equal(made.model.pos_embed, wanted.model["pos_embed"])

    sampled = ["--num-images", 4, "--steps", 2, "--batch-size", 4, "--out"]
    assert command("sample", snapshots, "--weights", "ema-width-0.07", *sampled, tmp_path / "made.npz") == 0
    assert command("sample", tracked, "--weights", "ema-width-0.07", *sampled, tmp_path / "tracked.npz") == 0
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("made", "tracked"))
    assert np.abs(a - b).max() <= 2


def test_an_average_at_an_earlier_step_is_computed(runs):
    snapshots, _ = runs
    assert command("ema", snapshots, "--width", 0.07, "--step", 28) == 0
    assert load_run(snapshots, "ema-width-0.07", step=28).step == 28
    assert layout.checkpoint_steps(snapshots) == [30, 60]  # averages do not count as checkpoints


def test_averages_of_a_checkpoint_are_loaded_by_name(runs):
    snapshots, _ = runs
    names = ("ema", "ema-0.5", "ema-width-0.05", "ema-width-0.1", "model")
    vectors = [vector(load_run(snapshots, name).model.state_dict()) for name in names]
    assert all(not torch.equal(vectors[i], vectors[j]) for i in range(5) for j in range(i))


def test_mistakes_give_one_line_errors(runs, capsys):
    snapshots, tracked = runs
    for words, sentence in (
        (("ema", tracked, "--width", 0.1), "has no snapshots to average: train with --ema-widths 0.05 0.1"),
        (("ema", snapshots, "--width", 0.4), "width"),
        (("ema", snapshots, "--width", 0.1, "--step", 5), "has no snapshot of step 5: there are 4, 8"),
        (("sample", snapshots, "--weights", "emma", "--out", "x.npz"),
         "has no weights 'emma' at step 60: choose ema, ema-0.5, ema-width-0.05, ema-width-0.1, model"),
        (("sample", snapshots, "--weights", "optimizer", "--out", "x.npz"), "has no weights 'optimizer'"),
    ):  # fmt: skip
        assert command(*words) == 2
        assert sentence in capsys.readouterr().err


def test_a_mistyped_run_creates_no_folder(tmp_path, capsys):
    assert command("ema", tmp_path / "nope", "--width", 0.1) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_snapshots_and_averages_of_another_run_are_refused(runs, tmp_path, capsys):
    """They have the same shapes, so nothing else would notice."""
    snapshots, tracked = runs
    mixed = shutil.copytree(tracked, tmp_path / "mixed")
    shutil.copytree(snapshots / layout.SNAPSHOTS, mixed / layout.SNAPSHOTS)
    assert command("ema", mixed, "--width", 0.12) == 2
    assert f"is of another run: its run has ema_widths: [0.05, 0.1], but {mixed}" in capsys.readouterr().err
    assert command("ema", snapshots, "--width", 0.12) == 0
    shutil.copytree(snapshots / layout.AVERAGES, mixed / layout.AVERAGES)
    assert command("sample", mixed, "--weights", "ema-width-0.12", "--out", tmp_path / "s.npz") == 2
    assert "ema-width-0.12.safetensors is of another run" in capsys.readouterr().err
