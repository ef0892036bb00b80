"""Previews and measurements during training, each at its own interval."""

import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.cli.hooks import preview_hooks
from repa.cli.main import run as repa
from repa.data import open_data
from repa.evaluation import evaluate, load_extractor, reference_of
from repa.runs import layout, load_run, read_metrics
from repa.sampling import SampleConfig, generate
from repa.training import TrainConfig, train

PREVIEW = {
    "every": 4, "num_images": 3, "num_scored": 20, "score_every": 6, "metrics": ("fd", "kd", "precision", "recall"),
    "num_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_config, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hooks")
    config = tiny_config.override(num_steps=14, log_every=14, save_every=6, keep_checkpoints=0, preview=PREVIEW)
    (folder / "recipe.yaml").write_text(config.to_yaml())
    assert repa(["train", str(folder / "recipe.yaml"), "--data", str(data_folder), "--out", str(folder / "run")]) == 0
    return folder / "run"


def rows(run) -> dict[int, dict]:
    return {row["step"]: row for row in read_metrics(run) if row["kind"] == "eval"}


def test_pictures_and_measurements_have_separate_intervals(run):
    assert layout.preview_steps(run) == [4, 8, 12, 14]
    assert [step for step, row in rows(run).items() if "frechet_distance" in row] == [6, 12, 14]
    with np.load(layout.preview(run, 14, ".npz")) as archive:
        assert archive["arr_0"].shape == (3, 16, 16, 3)
    assert rows(run)[12]["nfe"] == rows(run)[6]["nfe"] == 5  # heun: two per step, one in the last
    assert rows(run)[6]["num_samples"] == 20


@pytest.mark.parametrize("step", [6, 12])  # only measured; measured and drawn
def test_measurements_match_those_of_the_checkpoint(run, data_folder, step):
    data, extractor = open_data(data_folder), load_extractor("tiny-classifier")
    row = rows(run)[step]
    config = SampleConfig(sampler="heun", steps=3, labels=row["labels"], precision="fp32")
    images = generate(load_run(run, step=step), config, range(20)).images
    found = evaluate([images], extractor, reference_of(data, extractor, "tiny-classifier"), PREVIEW["metrics"])
    assert row["frechet_distance"] == pytest.approx(found["fd"], rel=1e-4)
    for name in ("kd", "precision", "recall"):
        assert row[name] == pytest.approx(found[name], rel=1e-3, abs=1e-6)
    if step == 12:
        with np.load(layout.preview(run, 12, ".npz")) as archive:
            assert torch.equal(torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2), images[:3])


def test_the_measurement_and_the_picture_are_logged(tiny_config, data_folder, tmp_path):
    lines, told = [], []
    preview = {"every": 1, "num_images": 2, "num_scored": 8, "score_every": 2, "num_steps": 1}
    config, run, cpu = tiny_config.override(num_steps=2, preview=preview), tmp_path / "run", torch.device("cpu")
    data = open_data(data_folder)
    hooks = preview_hooks(run, data, cpu, lambda *counts: told.append(counts), lines.append)
    train(config, data, run, device=cpu, make_hooks=hooks)
    values = rows(run)[2]
    assert lines == [
        f"run, step 1: preview in {layout.preview(run, 1, '.png')}",
        f"run, step 2: fd {values['frechet_distance']:.4g} (8 samples in the features of tiny-classifier); "
        f"preview in {layout.preview(run, 2, '.png')}",
    ]
    assert layout.preview(run, 2, ".png").is_file()
    assert told[-1][1:] == (8, 8)
    assert ("features of the training images", len(data), len(data)) in told or "features of" not in told[0][0]


def test_a_run_that_ends_before_its_first_evaluation_says_so_at_its_start(tiny_config, data_folder, tmp_path):
    lines = []
    preview = {"every": 3, "num_images": 2, "num_scored": 8, "num_steps": 1}
    data, cpu = open_data(data_folder), torch.device("cpu")
    for num_steps, said in ((2, 1), (3, 0)):
        config, run = tiny_config.override(num_steps=num_steps, preview=preview), tmp_path / str(num_steps)
        lines.clear()
        train(
            config, data, run, device=cpu, make_hooks=preview_hooks(run, data, cpu, say=lines.append), say=lines.append
        )
        sentence = "note: these 2 steps end before the first evaluation, at step 3. After them 8 samples are scored"
        assert [line.startswith(sentence) for line in lines] == [True] * said + [False]


def test_invalid_settings_are_refused_before_training(tmp_path, data_folder, capsys):
    common = ["train", "quickstart", "--data", str(data_folder), "--out", str(tmp_path / "run")]
    for words, sentence in (
        (["--preview.metrics", "fid"], "'fid' is not measured in the features of tiny-classifier. Choose fd, kd"),
        (["--preview.metrics", "fud"], "fud"),
        (["--preview.features", "inceptoin"], "inception"),
        (["--preview.num-scored", "0", "--preview.score-every", "5"], "--preview.score-every is 5, but --preview.num-scored is 0"),
    ):  # fmt: skip
        assert repa([*common, *words]) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(UserError, match="--preview.score-every is"):
        TrainConfig.parse({"preview": {"score_every": 5}})


def test_too_few_samples_for_a_metric_are_refused_before_training(tiny_config, data_folder, tmp_path, capsys):
    config = tiny_config.override(num_steps=4, preview={**PREVIEW, "num_scored": 3})
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    words = ["train", str(tmp_path / "recipe.yaml"), "--data", str(data_folder), "--out", str(tmp_path / "run")]
    assert repa(words) == 2
    assert "--preview.num-scored has 3: give more" in capsys.readouterr().err
    assert not layout.checkpoint_steps(tmp_path / "run")
