"""Invalid training configurations, and which settings may change when a run resumes."""

import sys

import pytest

from repa.base.errors import UserError
from repa.cli.main import run as repa
from repa.runs import layout
from repa.runs.layout import CHANGEABLE
from repa.training import TrainConfig

CONTRAST = {"target": "tiny", "depth": 1, "loss": "nt_xent:temperature=0.1"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"batch_size": 10, "accumulate": 4}, "--batch-size 10 is not divisible by --accumulate 4"),
        ({"accumulate": 2, "alignments": [CONTRAST]}, "'nt_xent:temperature=0.1' of the alignment 'tiny@1'"),
        ({"snapshot_every": 5}, "--snapshot-every saves the averages of --ema-widths, which is empty"),
        ({"ema_widths": [0.3]}, "ema_widths"),
        ({"ema_decays": [1.0]}, "ema_decays"),
        ({"optimizer": {"schedule": "cosin"}}, "optimizer.schedule"),
        ({"precision": "fp8"}, "precision"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate.*finite"),
        ({"preview": {"every": 5, "guidance": ["path_drop:scale=3"]}}, "never trained without them: leave it out"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(values, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainConfig.parse(values)


def test_old_configurations_keep_their_meaning():
    """Fields as written by version 0.1.0, before settings were renamed or added."""
    old = {
        "optimizer": {"learning_rate": 2e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "max_grad_norm": 1.0},
        "preview": {"every": 200, "num_images": 16, "num_scored": 500, "features": "tiny-classifier", "sampler": "heun"},
        "precision": "bf16", "ema_decay": 0.98,
    }  # fmt: skip
    config = TrainConfig.parse(old)
    assert (config.optimizer.name, config.optimizer.schedule, config.optimizer.warmup_steps) == ("adamw", "constant", 0)
    assert (config.preview.scored_every, config.preview.metrics) == (200, ("fd",))
    assert (config.accumulate, config.parallel, config.compile, config.ema_decays) == (1, "auto", False, ())


def test_only_changeable_settings_may_change_when_resuming(tiny_config, run_training, tmp_path):
    run = tmp_path / "r"
    run_training(tiny_config.override(num_steps=2), run)
    free = {
        "num_steps": 3, "accumulate": 2, "checkpoint_activations": True, "max_skipped_steps": 3, "log_every": 2,
        "save_every": 3, "save_minutes": 5.0, "keep_checkpoints": 1, "keep_every": 2, "async_save": True,
    }  # fmt: skip
    assert set(free) <= set(CHANGEABLE)
    run_training(tiny_config.override(**free), run)
    assert layout.checkpoint_steps(run) == [2, 3]  # step 2 is kept by keep_every
    for change in (
        {"ema_decays": (0.5,)}, {"ema_widths": (0.1,)}, {"precision": "fp16"}, {"label_dropout": 0.2},
        {"optimizer": {"name": "muon"}}, {"optimizer": {"warmup_steps": 3}},
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"another configuration.*{next(iter(change))}"):
            run_training(tiny_config.override(num_steps=4, **change), run)


@pytest.mark.parametrize(
    ("loss", "is_refused"),
    [
        ("apart", False),
        ("contrast", True),
        ("contrast_of:with_others=true", True),
        ("contrast_of:with_others=false", False),
    ],
)
def test_a_private_loss_that_compares_images_is_refused_with_accumulation(
    loss, is_refused, tiny_config, data_folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "own_losses.py").write_text(
        "from repa.alignment.losses import compares_images\n"
        "def apart(student, target):\n    return (student - target).square().mean((1, 2))\n"
        "def contrast(student, target):\n    return apart(student, target) - apart(student, target.roll(1, 0))\n"
        "contrast.compares_images = True\n"
        "@compares_images(lambda with_others: with_others)\n"
        "def contrast_of(student, target, *, with_others):\n"
        "    return contrast(student, target) if with_others else apart(student, target)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_config.to_yaml())
    words = ["--data", data_folder, "--out", tmp_path / "run", "--num-steps", "1", "--accumulate", "2"]
    try:
        code = repa(["train", str(recipe), *map(str, words), "--alignments.0.loss", f"own_losses.{loss}"])
        assert code == (2 if is_refused else 0)
        assert ("compares the images of the whole batch" in capsys.readouterr().err) == is_refused
    finally:
        sys.modules.pop("own_losses")
