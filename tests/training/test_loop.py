"""The training loop: learning, exact resume, stopping, and what is refused."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from repa.base.errors import UserError
from repa.base.files import read_json
from repa.runs import checkpoint, layout, read_metrics, writer
from repa.runs.averaging import write_average
from repa.training import Hook, TrainConfig, loop


def weights(run, step=10):
    folder = layout.checkpoint_folder(run, step)
    tensors = {}
    for name in (layout.MODEL_FILE, layout.EMA_FILE, layout.PROJECTORS_FILE):
        tensors |= {f"{name}/{key}": value for key, value in load_file(folder / name).items()}
    return tensors


def trained(run):
    return [row for row in read_metrics(run) if row["kind"] == "train"]


def losses(run):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in trained(run)]


@pytest.fixture(scope="module")
def finished(tiny_config, data_folder, tmp_path_factory):
    from repa.data import open_data
    from repa.training import train

    run = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny_config, open_data(data_folder), run, device=torch.device("cpu"), say=lambda text: None)
    return run


def test_ten_steps_equal_five_a_restart_and_five(finished, tiny_config, run_training, tmp_path):
    run = tmp_path / "halves"
    assert run_training(tiny_config.override(num_steps=5), run).step == 5
    assert run_training(tiny_config, run).step == 10
    assert losses(run) == losses(finished)  # equal in every digit
    for name, value in weights(finished).items():
        assert torch.equal(value, weights(run)[name]), name


def test_a_kill_loses_only_the_steps_since_the_last_checkpoint(finished, tiny_config, run_training, tmp_path):
    run = tmp_path / "killed"

    def die(state):
        if state.step == 8:
            raise KeyboardInterrupt  # as abrupt as possible in Python: nothing is saved

    with pytest.raises(KeyboardInterrupt):
        run_training(tiny_config, run, progress=die)
    assert layout.checkpoint_steps(run) == [5]
    run_training(tiny_config, run)
    assert losses(run) == losses(finished)
    for name, value in weights(finished).items():
        assert torch.equal(value, weights(run)[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint(number, finished, tiny_config, run_training, tmp_path):
    run = tmp_path / "signalled"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = run_training(tiny_config, run, progress=lambda s: os.kill(os.getpid(), number) if s.step == 3 else None)
    assert result.interrupted == number
    assert layout.checkpoint_steps(run) == [result.step]
    assert result.step in (3, 4)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    run_training(tiny_config, run)
    assert torch.equal(weights(run)["ema.safetensors/final_layer.linear.weight"],
                       weights(finished)["ema.safetensors/final_layer.linear.weight"])  # fmt: skip


def test_metrics_contain_what_the_report_needs(finished):
    rows = trained(finished)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert set(rows[-1]["alignment"]) == {"tiny@1"}
    for row in rows:
        assert row["loss"] == pytest.approx(row["denoising"] + 0.5 * row["alignment"]["tiny@1"], rel=1e-5)
        assert row["images_per_second"] > 0


def test_progress_and_log_show_the_alignment(finished):
    (row, *_), lines = trained(finished), (finished / layout.LOG).read_text().splitlines()
    first = next(line for line in lines if line.startswith("step 1/"))
    assert first.startswith(
        f"step 1/10: denoising loss {row['denoising']:.4f}, alignment loss tiny@1 {row['alignment']['tiny@1']:.4f}, "
    )


def test_a_signal_in_the_last_preview_is_not_forgotten(tiny_config, run_training, tmp_path):
    hook = Hook(10, lambda state: os.kill(os.getpid(), signal.SIGINT) or {})
    result = run_training(tiny_config, tmp_path / "r", make_hooks=lambda config, autoencoder: (hook,))
    assert result.step == 10
    assert result.interrupted == signal.SIGINT


def test_a_non_finite_measuring_projector_stops_training(tiny_config, run_training, tmp_path):
    measured = (tiny_config.alignments[0].override(measure_only=True),)

    def poison(state):
        if state.step == 6:
            with torch.no_grad():
                next(state.objective.alignments.parameters()).fill_(float("nan"))

    with pytest.raises(UserError, match="not finite"):
        run_training(tiny_config.override(alignments=measured, max_skipped_steps=3), tmp_path / "r", progress=poison)
    assert layout.checkpoint_steps(tmp_path / "r") == [5]


def test_training_reduces_the_losses(tiny_config, run_training, tmp_path):
    config = tiny_config.override(num_steps=150, log_every=10, save_every=150, optimizer={"learning_rate": 3e-3})
    run_training(config, tmp_path / "r")
    rows = trained(tmp_path / "r")
    assert rows[-1]["denoising"] < 0.7 * rows[0]["denoising"]
    assert rows[-1]["alignment"]["tiny@1"] < rows[0]["alignment"]["tiny@1"] - 0.2


def test_a_score_with_a_weight_over_time_is_trained(tiny_config, run_training, tmp_path):
    """Without the weight a single time near 0 would give a loss of thousands."""
    diffusion = {"prediction": "score", "loss_weight": "velocity", "timesteps": "uniform:low=0.001,high=0.9"}
    run_training(tiny_config.override(diffusion=diffusion, num_steps=4, log_every=1), tmp_path / "r")
    assert [0 < row["denoising"] < 100 for row in trained(tmp_path / "r")] == [True] * 4


def test_the_baseline_starts_from_the_same_network(finished, tiny_config, run_training, tmp_path):
    run_training(tiny_config.override(alignments=(), num_steps=1, save_every=1), tmp_path / "base")
    base = trained(tmp_path / "base")[0]
    assert base["denoising"] == pytest.approx(trained(finished)[0]["denoising"], rel=1e-6)
    assert "alignment" not in base


def test_measuring_alignment_does_not_change_the_baseline(tiny_config, run_training, tmp_path):
    measured = (tiny_config.alignments[0].override(measure_only=True),)
    run_training(tiny_config.override(alignments=()), tmp_path / "a")
    run_training(tiny_config.override(alignments=measured), tmp_path / "b")
    for name in load_file(layout.checkpoint_folder(tmp_path / "a", 10) / layout.MODEL_FILE):
        assert torch.equal(
            weights(tmp_path / "a")[f"model.safetensors/{name}"], weights(tmp_path / "b")[f"model.safetensors/{name}"]
        )


def test_the_ema_follows_with_its_decay(tiny_config, run_training, tmp_path):
    run_training(tiny_config.override(num_steps=2, save_every=1, keep_checkpoints=0), tmp_path / "r")
    first, second = (weights(tmp_path / "r", step) for step in (1, 2))
    key = "final_layer.linear.weight"
    wanted = 0.9 * first[f"ema.safetensors/{key}"] + 0.1 * second[f"model.safetensors/{key}"]
    torch.testing.assert_close(second[f"ema.safetensors/{key}"], wanted)
    assert second[f"model.safetensors/{key}"].abs().sum() > 0


def test_hooks_run_when_due_and_at_the_end(tiny_config, run_training, tmp_path):
    seen = []
    hook = Hook(4, lambda state: seen.append(state.step) or {"frechet_distance": 1.5})
    run_training(tiny_config, tmp_path / "r", make_hooks=lambda config, autoencoder: (hook,))
    assert seen == [4, 8, 10]
    rows = [row for row in read_metrics(tmp_path / "r") if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == [4, 8, 10]
    assert rows[0]["frechet_distance"] == 1.5


def test_a_run_with_another_configuration_is_refused_and_unchanged(finished, tiny_config, run_training, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"another configuration \(optimizer.learning_rate: 0.0001 -> 0.5\)"):
        run_training(tiny_config.override(optimizer={"learning_rate": 0.5}), run)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_an_edited_configuration_is_refused_unless_the_setting_may_change(
    finished, tiny_config, run_training, tmp_path
):
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    whole = TrainConfig.load(run / layout.CONFIG)
    for change, sentence in (
        (
            {"optimizer": {**whole.optimizer.model_dump(), "learning_rate": 0.5}},
            "optimizer.learning_rate: 0.5, but .* 0.0001",
        ),
        ({"seed": 1}, "seed: 1, but .* seed: 0"),
        ({"alignments": ()}, r"alignments\.0\.target: None"),
    ):
        edited = whole.override(**change)
        (run / layout.CONFIG).write_text(edited.to_yaml())
        with pytest.raises(UserError, match=f"has {sentence}"):
            run_training(edited, run)
    edited = whole.override(log_every=2, num_steps=whole.num_steps)
    (run / layout.CONFIG).write_text(edited.to_yaml())
    run_training(edited, run)


def test_other_data_is_refused(finished, tiny_config, run_training, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    facts = read_json(run / layout.DATA)
    (run / layout.DATA).write_text(json.dumps({**facts, "num_images": 99}))
    with pytest.raises(UserError, match="other data .*num_images"):
        run_training(tiny_config.override(num_steps=12), run)


def test_a_folder_with_other_files_is_refused(tiny_config, run_training, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a run"):
        run_training(tiny_config, tmp_path)


def test_a_run_killed_while_its_folder_is_created_continues(finished, tiny_config, run_training, tmp_path):
    for name in (layout.DATA, f".{layout.CONFIG}.abc.tmp"):
        (tmp_path / name).write_text((finished / layout.DATA).read_text())
    assert run_training(tiny_config.override(num_steps=1), tmp_path).step == 1


def test_snapshots_of_repeated_steps_are_written_again(tiny_config, run_training, tmp_path):
    """A schedule ends at ten steps; the last checkpoint is lost, and the run continues from step 5 to step 12."""
    config = tiny_config.override(
        ema_widths=(0.1,), snapshot_every=3, optimizer={"schedule": "linear", "learning_rate": 1e-2}
    )

    def snapshots(run) -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in sorted((run / layout.SNAPSHOTS).rglob("*.safetensors"))}

    run_training(config, tmp_path / "r")
    for step in (3, 9):
        write_average(tmp_path / "r", 0.07, step)
    shutil.rmtree(layout.checkpoint_folder(tmp_path / "r", 10))
    before = snapshots(tmp_path / "r")
    run_training(config.override(num_steps=12), tmp_path / "r")
    after = snapshots(tmp_path / "r")
    assert layout.average_steps(tmp_path / "r", "ema-width-0.07") == [3]  # that of step 9 was of lost steps
    assert list(before) == ["0000003", "0000006", "0000009"]
    assert [name for name in before if before[name] == after[name]] == ["0000003"]
    assert list(after) == [*before, "0000012"]


@pytest.mark.parametrize(("precision", "products"), [("bf16", "high"), ("fp32", "highest")])
def test_fp32_computes_in_float32_whatever_ran_before(precision, products, tiny_config, run_training, tmp_path):
    torch.set_float32_matmul_precision("medium")
    try:
        run_training(tiny_config.override(precision=precision, num_steps=1), tmp_path / "r")
        assert torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", [layout.MODEL_FILE, layout.OPTIMIZER_FILE, layout.STATE_FILE])
def test_a_truncated_checkpoint_is_named(name, finished, tiny_config, run_training, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    path = layout.checkpoint_folder(run, 10) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        run_training(tiny_config.override(num_steps=12), run)
    shutil.rmtree(layout.checkpoint_folder(run, 10))  # as the error message advises
    run_training(tiny_config, run)
    assert torch.equal(weights(run)["model.safetensors/pos_embed"], weights(finished)["model.safetensors/pos_embed"])


def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tiny_config, run_training, tmp_path):
    def poison(state):
        if state.step == 6:
            with torch.no_grad():
                next(state.model.parameters()).fill_(float("nan"))

    with pytest.raises(UserError, match=r"not finite in 4 steps in a row.*checkpoint of step 5 is good"):
        run_training(tiny_config.override(max_skipped_steps=3), tmp_path / "r", progress=poison)
    assert layout.checkpoint_steps(tmp_path / "r") == [5]
    assert all(value.isfinite().all() for value in weights(tmp_path / "r", 5).values())


@pytest.mark.parametrize(
    "error",  # errors of safetensors and Python on a full disk
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_full_disk_leaves_the_last_good_checkpoint(error, tiny_config, run_training, tmp_path, monkeypatch):
    def full(tensors, path):
        if layout.checkpoint_steps(tmp_path / "r"):
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(UserError, match="disk is full"):
        run_training(tiny_config, tmp_path / "r")
    assert layout.checkpoint_steps(tmp_path / "r") == [5]
    monkeypatch.undo()
    assert run_training(tiny_config, tmp_path / "r").step == 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model": {"name": "SiT-S/8", "hidden_dim": 32, "depth": 2, "num_heads": 2, "latent_size": 32}},
            "--model.latent-size is 32",
        ),
        (
            {"model": {"name": "SiT-S/4", "hidden_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}},
            "--model.num-classes is 7, but the data in .* has 2: give the data of the run to continue it",
        ),
        ({"autoencoder": "sd-vae-ft-mse"}, "prepared with 'pixels'"),
        ({"alignments": ({"target": "dinov9", "depth": 1},)}, "dinov9"),
        ({"batch_size": 0}, "batch_size"),
        ({"feature_weights": {"dino-b": "somewhere"}}, "--feature-weights names 'dino-b'"),
    ],
)
def test_invalid_settings_are_refused_before_a_folder_is_created(change, sentence, tiny_config, run_training, tmp_path):
    with pytest.raises(UserError, match=sentence):
        run_training(tiny_config.override(**change), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_run_folder_name_must_be_utf_8(tiny_config, run_training, tmp_path):
    with pytest.raises(UserError, match="needs a name in UTF-8"):
        run_training(tiny_config, tmp_path / "\udcff")


def test_a_depth_beyond_the_model_is_refused():
    with pytest.raises(UserError, match=r"alignments\.0\.depth is 13, but SiT-B/2 has 12 blocks"):
        TrainConfig.parse({"alignments": [{"target": "tiny", "depth": 13}]})


def test_the_resolved_configuration_is_a_recipe(finished, tiny_config, run_training):
    config = TrainConfig.load(finished / layout.CONFIG)
    assert (config.model.latent_size, config.model.num_classes, config.autoencoder) == (16, 2, "pixels")
    assert run_training(config, finished).step == 10


def test_checkpoints_are_also_saved_by_the_clock(tiny_config, run_training, tmp_path, monkeypatch):
    """With a clock that advances a minute per reading; the loop reads it once per step, and again after saving."""
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    config = tiny_config.override(num_steps=9, save_every=100, save_minutes=3.0, keep_checkpoints=0)
    run_training(config, tmp_path / "r")
    assert layout.checkpoint_steps(tmp_path / "r") == [3, 6, 9]


def test_kept_checkpoints_are_also_written_between_the_others(tiny_config, run_training, tmp_path):
    run_training(tiny_config.override(save_every=4, keep_every=3, keep_checkpoints=1), tmp_path / "r")
    assert layout.checkpoint_steps(tmp_path / "r") == [3, 6, 9, 10]


def test_a_full_disk_under_asynchronous_writing_ends_the_run_at_the_next_step(
    finished, tiny_config, run_training, tmp_path, monkeypatch
):
    def full(tensors, path):
        if layout.checkpoint_steps(tmp_path / "r"):
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    steps = []
    monkeypatch.setattr(checkpoint, "save_file", full)
    config = tiny_config.override(async_save=True, save_every=4)
    with pytest.raises(UserError, match="disk is full"):
        run_training(config, tmp_path / "r", progress=lambda state: steps.append(state.step) or time.sleep(0.05))
    assert layout.checkpoint_steps(tmp_path / "r") == [4]
    assert steps[-1] in (8, 9)  # before the end of the run
    monkeypatch.undo()
    run_training(config, tmp_path / "r")
    assert losses(tmp_path / "r") == losses(finished)
    assert all(torch.equal(value, weights(tmp_path / "r")[name]) for name, value in weights(finished).items())


def test_asynchronous_checkpoints_contain_the_state_at_their_step(
    finished, tiny_config, run_training, tmp_path, monkeypatch
):
    later, write = threading.Event(), writer.save_checkpoint

    def late(run, taken, *rest):
        assert later.wait(20)
        return write(run, taken, *rest)

    monkeypatch.setattr(writer, "save_checkpoint", late)
    run_training(
        tiny_config.override(async_save=True),
        tmp_path / "r",
        progress=lambda state: later.set() if state.step == 8 else None,
    )
    assert layout.checkpoint_steps(tmp_path / "r") == [5, 10]
    for path in layout.checkpoint_folder(finished, 5).glob("*.safetensors"):
        mine = load_file(layout.checkpoint_folder(tmp_path / "r", 5) / path.name)
        assert all(torch.equal(value, mine[name]) for name, value in load_file(path).items()), path.name


def test_a_resumed_run_computes_as_it_began(tiny_config, run_training, random_run, tmp_path, monkeypatch):
    """Neither a new timing for precision auto nor a newer checkpoint of a target run changes a resumed run."""
    teacher = shutil.copytree(random_run, tmp_path / "teacher")
    term = {"target": f"run:path={teacher},depth=2,scale=1", "depth": 1, "loss": "mse", "projector": "linear"}
    config = tiny_config.override(precision="auto", num_steps=2, alignments=[term])
    monkeypatch.setattr("repa.base.device.best_precision", lambda device: "bf16")
    run_training(config, tmp_path / "whole")
    run_training(config.override(num_steps=1), tmp_path / "run")
    monkeypatch.setattr("repa.base.device.best_precision", lambda device: "fp32")
    newest = layout.checkpoint_folder(teacher, layout.checkpoint_steps(teacher)[-1])
    shutil.copytree(newest, layout.checkpoint_folder(teacher, 99))
    run_training(config, tmp_path / "run")
    files = [layout.checkpoint_folder(tmp_path / name, 2) / "model.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
