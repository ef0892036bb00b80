"""Averages of any width from snapshots, compared with integrals and with tracked averages."""

import errno
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repa.base.errors import UserError
from repa.runs import layout
from repa.runs.averaging import drop_later, gamma_of, inner, mixture, reconstruct, save_snapshot
from tests.oracles import averaging as oracle

WIDTHS = (0.05, 0.1)
STEPS, EVERY = 240, 10


@pytest.fixture(scope="module")
def walk() -> torch.Tensor:
    """The weights of every step (STEPS, 6): a drift with noise, as in training."""
    stream = torch.Generator().manual_seed(0)
    steps = torch.randn(STEPS, 6, generator=stream, dtype=torch.float64) * 0.05
    return (steps + 0.02 * torch.linspace(1, 0, STEPS)[:, None]).cumsum(0)


def tracked(walk: torch.Tensor, step: int, width: float) -> torch.Tensor:
    return torch.from_numpy(oracle.profile_of_steps(step, gamma_of(width))) @ walk[:step]


@pytest.fixture(scope="module")
def run(walk, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    for step in range(EVERY, STEPS + 1, EVERY):
        save_snapshot(run, step, {width: {"w": tracked(walk, step, width).float()} for width in WIDTHS}, {})
    return run


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_match_the_paper(width, gamma):
    assert gamma_of(width) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.15, 0.28])
def test_the_width_equals_the_standard_deviation_of_the_profile(width):
    tau = np.linspace(0, 1, 400_001)
    p = oracle.density(tau, 1.0, gamma_of(width))
    mean = oracle.integral(p * tau, tau)
    assert oracle.integral(p, tau) == pytest.approx(1, abs=1e-4)
    assert np.sqrt(oracle.integral(p * (tau - mean) ** 2, tau)) == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.289, 1.0, float("nan")])
def test_impossible_widths_are_refused(width):
    with pytest.raises(UserError, match=r"above 0 and at most 0.28, but got"):
        gamma_of(width)


@pytest.mark.parametrize(("a", "b"), [((3.0, 2.0), (7.0, 5.0)), ((7.0, 2.0), (3.0, 5.0)), ((4.0, 0.5), (4.0, 9.0))])
def test_inner_products_equal_integrals(a, b):
    tau = np.linspace(0, 8, 800_001)
    wanted = oracle.integral(oracle.density(tau, *a) * oracle.density(tau, *b), tau)
    assert inner(a, b) == pytest.approx(wanted, rel=1e-4)
    assert inner(a, b) == inner(b, a)


def test_a_stored_profile_is_reconstructed_from_itself():
    stored = [(float(t), gamma_of(w)) for t in (100, 1000, 10_000) for w in WIDTHS]
    np.testing.assert_allclose(mixture(stored, stored[3]), np.eye(6)[3], atol=1e-8)


@pytest.mark.parametrize("width", [0.04, 0.07, 0.13, 0.2])
@pytest.mark.parametrize("step", [120, 240])
def test_a_reconstructed_average_is_close_to_a_tracked_one(run, walk, width, step):
    """The error is measured relative to the distance between the average and the raw weights."""
    found, state = reconstruct(run, width, step)
    wanted = tracked(walk, step, width)
    assert found == step
    assert state["w"].dtype == torch.float32
    assert (state["w"] - wanted).norm() < 0.02 * (walk[step - 1] - wanted).norm()
    others = [w for w in (0.04, 0.07, 0.13, 0.2) if w != width]
    nearest = min((state["w"] - tracked(walk, step, w)).norm() for w in others)
    assert (state["w"] - wanted).norm() < 0.1 * nearest


def test_snapshots_after_the_step_are_ignored(run, walk, tmp_path):
    early = tmp_path / "early"
    for step in range(EVERY, 121, EVERY):
        save_snapshot(early, step, {w: {"w": tracked(walk, step, w).float()} for w in WIDTHS}, {})
    assert torch.equal(reconstruct(early, 0.07)[1]["w"], reconstruct(run, 0.07, 120)[1]["w"])


def test_mistakes_give_one_line_errors(run, tmp_path):
    with pytest.raises(UserError, match="has no snapshots to average: train with --ema-widths 0.05 0.1"):
        reconstruct(tmp_path, 0.1)
    with pytest.raises(UserError, match="has no snapshot of step 7: there are 10, 20"):
        reconstruct(run, 0.1, 7)
    with pytest.raises(UserError, match="but got 0.5"):
        reconstruct(run, 0.5)


def test_a_snapshot_is_written_once(run):
    before = reconstruct(run, 0.1, EVERY)[1]["w"]
    save_snapshot(run, EVERY, {0.05: {"w": torch.zeros(6)}}, {})
    assert torch.equal(reconstruct(run, 0.1, EVERY)[1]["w"], before)
    assert layout.snapshot_steps(run)[-1] == STEPS


def test_partial_snapshots_of_a_killed_run_are_removed(tmp_path):
    torn = tmp_path / layout.SNAPSHOTS / ".0000010.abcdefgh.tmp"
    torn.mkdir(parents=True)
    (torn / "ema-width-0.1.safetensors").write_bytes(b"half")
    assert layout.snapshot_steps(tmp_path) == []
    save_snapshot(tmp_path, 20, {0.1: {"w": torch.zeros(2)}}, {})
    assert [path.name for path in (tmp_path / layout.SNAPSHOTS).iterdir()] == ["0000020"]


def test_a_flipped_bit_in_a_snapshot_or_an_average_is_found(tmp_path):
    from repa.runs.checkpoint import load_checked, save_checked

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}
    path = tmp_path / "x.safetensors"
    save_checked(tensors, path, {})
    assert all(torch.equal(load_checked(tmp_path, path, "")[name], x) for name, x in tensors.items())
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"x\.safetensors"):
            load_checked(tmp_path, path, "")


def test_a_snapshot_of_repeated_steps_that_cannot_be_removed_is_an_error(tmp_path, monkeypatch):
    for step in (10, 20):
        layout.snapshot_folder(tmp_path, step).mkdir(parents=True)

    def busy(folder, hidden):
        raise OSError(errno.EACCES, "Permission denied", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", busy)
        refusal = pytest.raises(UserError, match="0000020 is of a step that training repeats: remove it")
        with refusal, pytest.warns(UserWarning, match="0000020 could not be removed .Permission denied."):
            drop_later(tmp_path, 10)
    drop_later(tmp_path, 10)
    assert layout.snapshot_steps(tmp_path) == [10]


def test_a_snapshot_without_the_settings_of_its_run_is_not_called_damaged(tmp_path):
    (folder := layout.snapshot_folder(tmp_path, 5)).mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, folder / "ema-width-0.05.safetensors", metadata={"sha256": "0" * 64})
    with pytest.raises(UserError, match=f"does not name its run: an earlier version of repa wrote it. Remove {folder}"):
        reconstruct(tmp_path, 0.05)


@pytest.mark.parametrize("num", [3, 30])
def test_one_error_names_all_snapshots_that_cannot_be_averaged(num, tmp_path):
    folders = [layout.snapshot_folder(tmp_path, step) for step in range(1, num + 1)]
    for folder in folders:
        folder.mkdir(parents=True)
        for width in WIDTHS:
            save_file({"w": torch.zeros(2)}, folder / f"ema-width-{width}.safetensors")
    save_snapshot(tmp_path, num + 1, {width: {"w": torch.zeros(2)} for width in WIDTHS}, {})
    with pytest.raises(UserError) as error:
        reconstruct(tmp_path, 0.05)
    message = str(error.value)
    assert f"it. {num - 1} more cannot be averaged either. Remove {folders[0]}, {folders[1]}" in message
    assert [str(folder) in message for folder in folders] == [True] * min(num, 20) + [False] * max(num - 20, 0)
    assert (" and 10 more to average" in message) == (num > 20)
