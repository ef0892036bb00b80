"""Non-finite steps are skipped, counted and finally refused; the loss scale follows GradScaler; spikes are reported."""

import pytest
import torch
from safetensors.torch import load_file

from repa.base.errors import UserError
from repa.runs import layout, read_metrics
from repa.training import Objective, update
from repa.training.update import Guard

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def checked(guard: Guard, *norms: float) -> list[float]:
    return [float(guard.check([torch.tensor(norm)])) for norm in norms]


def rows(run, kind="train"):
    return [row for row in read_metrics(run) if row["kind"] == kind]


def weights(run, step):
    folder = layout.checkpoint_folder(run, step)
    names = (layout.MODEL_FILE, layout.EMA_FILE, layout.PROJECTORS_FILE, layout.OPTIMIZER_FILE)
    return {f"{name}/{key}": value for name in names for key, value in load_file(folder / name).items()}


def poison(monkeypatch, *steps: int, value: float = NAN) -> None:
    """Make the losses of one image non-finite in these steps (counted from 0)."""
    forward, draw, now = Objective.forward, Objective.draw, []

    def drawn(self, x, step):
        now[:] = [step]
        return draw(self, x, step)

    def poisoned(self, clean, *rest):
        if now[0] in steps:
            clean = {"x": clean["x"].clone()}
            clean["x"][1] = value
        return forward(self, clean, *rest)

    monkeypatch.setattr(Objective, "draw", drawn)
    monkeypatch.setattr(Objective, "forward", poisoned)


def test_a_non_finite_norm_skips_the_step():
    guard = Guard("fp32", CPU)
    assert checked(guard, 1.0, NAN, INF, 2.0) == [0, 1, 1, 0]
    assert float(guard.check([torch.tensor(1.0), torch.tensor(NAN)])) == 1  # a projector that only measures
    assert guard.row() == {"skipped_steps": 3, "grad_norm_max": 2.0}
    assert float(guard.in_row) == 1
    assert guard.row()["grad_norm_max"] == 0  # reset with each row


def test_the_loss_scale_follows_the_rule_of_grad_scaler(monkeypatch):
    monkeypatch.setattr(update, "GROWTH_STEPS", 3)
    guard = Guard("fp16", CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for bad in (1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0):
        gradient = torch.tensor([INF if bad else 3.0])
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        checked(guard, INF if bad else 3.0)
        assert float(guard.scale) == scaler.get_scale()
        optimizer.zero_grad()
    assert float(guard.scale) != 2.0**16


def test_loss_scaling_does_not_change_the_gradient():
    torch.manual_seed(0)
    guard, layer, x = Guard("fp16", CPU), torch.nn.Linear(5, 3), torch.randn(7, 5)
    guard.load({"guard_scale": 1024.0})
    guard.scaled(layer(x).square().mean()).backward()
    scaled = [p.grad.clone() for p in layer.parameters()]
    guard.unscale(layer.parameters())
    mine = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().mean().backward()
    for found, p, large in zip(mine, layer.parameters(), scaled, strict=True):
        assert torch.equal(found, p.grad)
        assert torch.equal(large, 1024 * p.grad)


def test_a_spike_is_reported_relative_to_the_running_median():
    guard, told = Guard("fp32", CPU), []
    for step, norm in enumerate([1.0, 50.0, *[2.0] * 12, 19.0, 21.0, 2.0], start=1):
        checked(guard, norm)
        told += guard.notes(guard.row(), step)
    assert told == ["The gradient norm rose to 21 by step 16, 10 times its running median of 2."]


def test_a_skipped_step_changes_only_the_count(tiny_config, run_training, tmp_path, monkeypatch):
    poison(monkeypatch, 3, 4)
    config = tiny_config.override(num_steps=6, save_every=1, keep_checkpoints=0, ema_decays=(0.5,))
    told = []
    run_training(config, tmp_path / "r", say=told.append)
    before, during, after = (weights(tmp_path / "r", step) for step in (3, 5, 6))
    assert all(torch.equal(value, during[key]) for key, value in before.items())
    assert any(not torch.equal(value, after[key]) for key, value in during.items())
    assert all(value.isfinite().all() for value in after.values())
    assert [row["skipped_steps"] for row in rows(tmp_path / "r")] == [0, 0, 0, 1, 2, 2]
    assert [row["loss"] is None for row in rows(tmp_path / "r")] == [False] * 3 + [True] * 2 + [False]
    assert told == [f"Steps skipped up to step {step} because their gradient was not finite: 1." for step in (4, 5)]
    assert told == [row["message"] for row in rows(tmp_path / "r", "event")[1:]]


@pytest.mark.parametrize("value", [NAN, INF])
def test_too_many_skipped_steps_in_a_row_stop_training(tiny_config, run_training, tmp_path, monkeypatch, value):
    poison(monkeypatch, 1, 2, 3, *range(5, 10), value=value)
    config = tiny_config.override(save_every=4, max_skipped_steps=3)
    with pytest.raises(UserError, match=r"not finite in 4 steps in a row, up to step 9 .*checkpoint of step 8 is good"):
        run_training(config, tmp_path / "r")
    assert layout.checkpoint_steps(tmp_path / "r") == [4, 8]


def test_the_count_of_skipped_steps_survives_a_restart(tiny_config, run_training, tmp_path, monkeypatch):
    poison(monkeypatch, 2, 3, 4, 5, 6)
    config = tiny_config.override(num_steps=4, save_every=4, max_skipped_steps=4)
    run_training(config, tmp_path / "r")
    with pytest.raises(UserError, match="5 steps in a row, up to step 7"):
        run_training(config.override(num_steps=10), tmp_path / "r")


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "muon"), ("fp16", "adamw")])
def test_ten_steps_equal_four_a_restart_and_six(tiny_config, run_training, tmp_path, monkeypatch, precision, optimizer):
    """With skipped steps before and after the restart, fp16 with a partly counted loss scale, and Muon with momenta."""
    monkeypatch.setattr(update, "GROWTH_STEPS", 3)
    poison(monkeypatch, 1, 7)
    config = tiny_config.override(
        precision=precision, ema_decays=(0.5,), ema_widths=(0.1,), optimizer={"name": optimizer}
    )
    run_training(config, tmp_path / "whole")
    run_training(config.override(num_steps=4), tmp_path / "halves")
    run_training(config, tmp_path / "halves")
    whole, halves = (rows(tmp_path / name) for name in ("whole", "halves"))
    scales = [row.get("loss_scale") for row in whole]
    assert scales == [row.get("loss_scale") for row in halves]
    assert set(scales) == ({None} if precision == "fp32" else {2.0**15, 2.0**16})
    assert [row["loss"] for row in whole] == [row["loss"] for row in halves]
    mine, yours = weights(tmp_path / "whole", 10), weights(tmp_path / "halves", 10)
    assert all(torch.equal(value, yours[key]) for key, value in mine.items())
    for name in ("ema-0.5", "ema-width-0.1"):
        a, b = (
            load_file(layout.checkpoint_folder(tmp_path / n, 10) / f"{name}.safetensors") for n in ("whole", "halves")
        )
        assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_fp16_learns_what_fp32_learns(tiny_config, run_training, tmp_path):
    last = {}
    for precision in ("fp32", "fp16"):
        config = tiny_config.override(precision=precision, num_steps=40, log_every=40, save_every=40)
        run_training(config, tmp_path / precision)
        last[precision] = rows(tmp_path / precision)[-1]
    assert last["fp16"]["loss"] != last["fp32"]["loss"]
    assert last["fp16"]["loss"] == pytest.approx(last["fp32"]["loss"], rel=0.02)
