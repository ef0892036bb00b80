"""Speed-ups and summary figures against hand computation."""

import json
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import save_file

from repa.base.errors import UserError
from repa.report import config_differences, read_run, read_runs, speedup, summary_rows, summary_table, verdict
from repa.report.summary import data_facts
from repa.runs import layout
from repa.runs.checkpoint import Checkpoint, write_state
from tests.report.fakes import ALIGNMENT, PROTOCOL, config, fake_run


def test_the_speedup_is_linearly_interpolated(tmp_path):
    # Between 20 at step 40 and 8 at step 60, the baseline's 11 is at step 55, or 38.5 s at 0.7 s per step.
    baseline = fake_run(tmp_path / "b", distances={40: 30.0, 100: 11.0}, seconds_per_step=0.5)
    aligned = fake_run(tmp_path / "a", aligned=True, distances={40: 20.0, 60: 8.0, 100: 5.0}, seconds_per_step=0.7)
    found = speedup(baseline, aligned)
    assert found.target == 11.0
    assert found.aligned.step == pytest.approx(55.0)
    assert found.aligned.seconds == pytest.approx(38.5)
    assert found.aligned.between == (40, 60)
    assert found.times_steps == pytest.approx(100 / 55)
    assert found.times_seconds == pytest.approx(50.0 / 38.5)
    sentence, notes, _ = verdict(read_runs([baseline, aligned]))
    assert "at all 3 compared steps: 5.00 against 11.00 at 100 steps" in sentence
    assert "1.8 times fewer steps (55 instead of 100)" in sentence
    assert any("interpolated" in note and "40 and 60" in note for note in notes)
    assert any("between seeds was not measured" in note for note in notes)


def test_the_first_crossing_counts(tmp_path):
    baseline = fake_run(tmp_path / "b", distances={50: 12.0, 100: 10.0})
    aligned = fake_run(tmp_path / "a", aligned=True, distances={20: 14.0, 40: 6.0, 60: 15.0, 80: 2.0})
    # (14 - 10) / (14 - 6) is halfway from 20 to 40
    assert speedup(baseline, aligned).aligned.step == pytest.approx(30.0)


def test_the_first_crossing_equals_a_search_on_a_fine_grid(tmp_path):
    """For random curves, a search on a fine grid finds the same first crossing."""
    rng = np.random.default_rng(0)
    for trial in range(5):
        curves = [dict(zip(range(20, 101, 20), rng.uniform(1, 20, 5).tolist(), strict=True)) for _ in range(2)]
        curves[1][20] = 30.0  # starts above the target
        baseline = fake_run(tmp_path / f"b{trial}", distances=curves[0])
        aligned = fake_run(tmp_path / f"a{trial}", aligned=True, distances=curves[1])
        found = speedup(baseline, aligned).aligned
        crossing = None
        for (s0, d0), (s1, d1) in pairwise(sorted(curves[1].items())):
            for part in np.linspace(0, 1, 2001):
                if crossing is None and d0 + part * (d1 - d0) <= curves[0][100]:
                    crossing = s0 + part * (s1 - s0)
        assert (found is None) == (crossing is None)
        if found is not None:
            assert found.step == pytest.approx(crossing, abs=0.011)


def test_the_baselines_first_crossing_counts_too(tmp_path):
    # reaches 10 first at step 40
    baseline = fake_run(tmp_path / "b", distances={20: 20.0, 40: 10.0, 60: 8.0, 100: 10.0})
    aligned = fake_run(tmp_path / "a", aligned=True, distances={10: 20.0, 20: 10.0, 100: 7.0})
    found = speedup(baseline, aligned)
    assert found.baseline.step == 40
    assert found.times_steps == pytest.approx(2.0)  # not 100 / 20
    assert "2.0 times fewer steps (20 instead of the 40 after which" in verdict(read_runs([baseline, aligned])).sentence


def test_a_target_that_is_not_reached_is_reported(tmp_path):
    baseline = fake_run(tmp_path / "b", distances={50: 12.0, 100: 10.0})
    aligned = fake_run(tmp_path / "a", aligned=True, distances={50: 10.5, 100: 11.0})
    found = speedup(baseline, aligned)
    assert found.aligned is None
    assert found.times_steps is None
    sentence, notes, _ = verdict(read_runs([baseline, aligned]))
    assert "lower than the baseline’s at 1 of 2 compared steps and ends higher, 11.00 against 10.00" in sentence
    assert "times" not in sentence
    assert any("did not reach" in note and "10.50 at 50 steps" in note for note in notes)


def test_reached_at_the_first_evaluation_is_a_bound(tmp_path):
    baseline = fake_run(tmp_path / "b", distances={50: 12.0, 100: 10.0})
    aligned = fake_run(tmp_path / "a", aligned=True, distances={50: 9.0, 100: 8.0})
    assert speedup(baseline, aligned).aligned.is_bound
    sentence = verdict(read_runs([baseline, aligned])).sentence
    assert "at least 2.0 times fewer steps (at most 50 instead of 100)" in sentence


def test_no_speedup_is_claimed_when_the_first_evaluation_reaches_the_target(tmp_path):
    baseline = fake_run(tmp_path / "b", distances={40: 10.0, 100: 10.0})
    aligned = fake_run(tmp_path / "a", aligned=True, distances={60: 9.0, 100: 8.0})
    found = speedup(baseline, aligned)
    assert found.is_too_coarse
    assert not found.is_supported
    sentence, notes, _ = verdict(read_runs([baseline, aligned]))
    assert "fewer" not in sentence
    assert "more steps" not in sentence
    assert any("--preview.score-every 20" in note for note in notes)


def test_a_slower_run_is_called_slower(tmp_path):
    baseline = fake_run(tmp_path / "b", distances={10: 12.0, 50: 10.0}, num_steps=50)
    aligned = fake_run(tmp_path / "a", aligned=True, distances={10: 20.0, 100: 10.0})
    assert verdict(read_runs([baseline, aligned])).sentence.endswith("2.0 times more steps (100 instead of 50).")


def sentence_of(folder, baseline, aligned):
    runs = [fake_run(folder / "b", distances=baseline), fake_run(folder / "a", aligned=True, distances=aligned)]
    return verdict(read_runs(runs)).sentence


def test_a_run_that_leads_early_and_ends_behind_is_not_called_faster(tmp_path):
    """Its first evaluation is below the baseline's last one, and all later ones are above it."""
    sentence = sentence_of(tmp_path, {20: 30.0, 60: 20.0, 100: 10.0}, {20: 9.0, 60: 25.0, 100: 14.0})
    assert "curves cross" in sentence
    assert "lower than the baseline’s at 1 of 3 compared steps and ends higher, 14.00 against 10.00" in sentence
    assert "fewer" not in sentence


def test_curves_that_cross_and_end_lower_are_described(tmp_path):
    sentence = sentence_of(tmp_path, {20: 30.0, 60: 20.0, 100: 10.0}, {20: 40.0, 60: 12.0, 80: 8.0, 100: 6.0})
    assert "curves cross" in sentence
    assert "at 3 of 4 compared steps and ends lower, 6.00 against 10.00" in sentence
    assert "1.4 times fewer steps (70 instead of 100)" in sentence  # halfway from 12 to 8, and never above 10 again


def test_a_run_that_is_always_behind_is_described(tmp_path):
    sentence = sentence_of(tmp_path, {20: 30.0, 60: 20.0, 100: 10.0}, {20: 40.0, 60: 25.0, 100: 10.5})
    assert "higher than the baseline’s at all 3 compared steps: 10.50 against 10.00 at 100 steps" in sentence
    assert "fewer" not in sentence


def test_a_crossing_between_evaluations_is_found(tmp_path):
    """The baseline was not evaluated at step 60; interpolated it has 20 there, and the aligned run has 30."""
    sentence = sentence_of(tmp_path, {20: 30.0, 100: 10.0}, {20: 20.0, 60: 30.0, 100: 5.0})
    assert "curves cross" in sentence
    assert "at 2 of 3 compared steps and ends lower" in sentence


def test_a_run_that_was_stopped_early_is_compared_at_its_own_end(tmp_path):
    sentence = sentence_of(tmp_path, {20: 30.0, 60: 20.0, 100: 10.0}, {20: 25.0, 60: 15.0})
    assert "at all 2 compared steps: 15.00 against 20.00 at 60 steps" in sentence
    assert "fewer" not in sentence


def test_one_evaluation_per_run_gives_no_speedup(tmp_path):
    sentence = sentence_of(tmp_path, {100: 10.0}, {100: 5.0})
    assert "in the only evaluation to compare, 5.00 against 10.00 at 100 steps" in sentence
    advice = [note for note in verdict(read_runs([tmp_path / "b", tmp_path / "a"])).notes if "--preview" in note]
    assert advice == [
        "For more evaluations train both again into new folders with `--preview.num-scored 500 --preview.score-every 20`."
    ]
    assert "fewer" not in sentence
    assert summary_table([tmp_path / "b", tmp_path / "a"])[1]["steps to the baseline's"] == "too few evaluations"
    apart = sentence_of(tmp_path / "apart", {100: 10.0}, {50: 5.0})
    assert "not compared: Fréchet distance 5.00 at 50 steps and 10.00 at 100 steps" in apart
    assert "--preview.score-every 20" in verdict(read_runs([tmp_path / "apart" / name for name in "ba"])).notes[-2]
    rows = summary_table([tmp_path / "apart" / name for name in "ba"])
    assert rows[1]["steps to the baseline's"] == "too few evaluations"


def test_the_headline_is_about_the_aligned_run_that_ends_lowest(tmp_path):
    """`early` is below the baseline's final distance immediately, but `late` ends lower."""
    baseline = fake_run(tmp_path / "b", distances={20: 30.0, 60: 20.0, 100: 10.0})
    early = fake_run(tmp_path / "early", aligned=True, distances={20: 9.0, 60: 9.5, 100: 9.0})
    settings = config(True, alignments=[{**ALIGNMENT, "weight": 1.0}])
    late = fake_run(tmp_path / "late", aligned=True, distances={20: 20.0, 60: 9.0, 100: 4.0}, settings=settings)
    sentence, notes, _ = verdict(read_runs([baseline, early, late]))
    assert sentence.startswith("Of 2 aligned configurations late ends lowest.")
    assert "4.00 against 10.00" in sentence
    assert any("early’s" in note and "9.00 against 10.00" in note for note in notes)


@pytest.mark.parametrize(
    "change",
    [
        {"features": "inception"},
        {"feature_weights": "01234567"},
        {"features_precision": "bf16"},
        {"encoder": {"name": "tiny-classifier", "weights_sha256": None, "precision": "bf16"}},
        {"encoder": {"name": "tiny-classifier", "weights_sha256": "01234567"}},
        {"reference": "other"},
        {"reference_sha256": "01234567"},
        {"num_samples": 50},
        {"nfe": 2},
        {"weights": "model"},
    ],
)
def test_distances_of_different_protocols_are_not_compared(tmp_path, change):
    baseline = fake_run(tmp_path / "b", distances={50: 12.0, 100: 10.0})
    aligned = fake_run(tmp_path / "a", aligned=True, distances={50: 9.0, 100: 8.0}, protocol={**PROTOCOL, **change})
    assert speedup(baseline, aligned) is None
    sentence, notes, _ = verdict(read_runs([baseline, aligned]))
    assert "fewer" not in sentence
    assert any("no speed-up is stated" in note for note in notes)


def test_images_are_counted_without_mirrored_copies(tmp_path):
    data = {"source": {"kind": "shapes"}, "num_images": 60, "class_names": ["disc", "square"], "class_counts": [20, 10]}
    mirrored = read_run(fake_run(tmp_path / "mirrored", data=data))
    plain = read_run(fake_run(tmp_path / "plain", data={**data, "num_images": 30}))
    assert [data_facts([run])["Images"] for run in (mirrored, plain)] == ["30, and a mirrored copy of each", "30"]


def test_network_calls_of_an_adaptive_sampler_are_not_a_setting(tmp_path):
    """They depend on the network, unlike those of a sampler with fixed steps."""
    for sampler, compared in (("dopri5:rtol=1e-5", True), ("heun", False)):
        ours, theirs = ({**PROTOCOL, "sampler": sampler, "nfe": nfe} for nfe in (90, 96))
        baseline = fake_run(tmp_path / f"b-{compared}", distances={50: 12.0, 100: 10.0}, protocol=theirs)
        aligned = fake_run(tmp_path / f"a-{compared}", aligned=True, distances={50: 9.0, 100: 8.0}, protocol=ours)
        assert (speedup(baseline, aligned) is not None) == compared


def test_other_differences_are_reported(tmp_path):
    baseline = fake_run(tmp_path / "b", distances={100: 10.0})
    settings = config(True, optimizer={"learning_rate": 2e-4}, seed=1)
    aligned = fake_run(
        tmp_path / "a", aligned=True, distances={50: 20.0, 100: 8.0}, settings=settings, data={"source": {"kind": "x"}}
    )
    notes = " ".join(verdict(read_runs([baseline, aligned])).notes)
    assert "optimizer.learning_rate and seed" in notes
    assert "not trained on the same data" in notes
    table = dict(config_differences(read_runs([baseline, aligned])))
    assert table["optimizer.learning_rate"] == ["0.0001", "0.0002"]
    assert table["alignments.0.depth"] == ["–", "3"]
    assert "model.depth" not in table


@pytest.mark.parametrize("change", [{"weight": 0.0}, {"measure_only": True}])
def test_a_run_that_only_measures_alignment_is_a_baseline(tmp_path, change):
    settings = config(True)
    settings["alignments"] = [{**settings["alignments"][0], **change}]
    run = read_run(fake_run(tmp_path / "r", aligned=True, settings=settings))
    assert not run.is_aligned
    assert run.alignment_names == ["tiny@3"]


def test_a_summary_row_has_the_expected_figures(tmp_path):
    aligned = fake_run(tmp_path / "a", aligned=True, distances={60: 20.0}, num_steps=200, seconds_per_step=2.0)
    save_file(
        {"a": np.zeros((3, 5), np.float32), "b": np.zeros(4, np.float32)},
        _made(layout.checkpoint_folder(aligned, 200)) / layout.MODEL_FILE,
    )
    write_state(layout.checkpoint_folder(aligned, 200), Checkpoint(200, {}, {}), {})
    (row,) = summary_rows([aligned])
    assert (row["frechet_distance"], row["frechet_step"], row["steps"], row["seconds"]) == (20.0, 60, 200, 400.0)
    # the last tenth of 20 rows is steps 190 and 200, with losses -0.59 and -0.60
    assert row["alignment"]["tiny@3"] == pytest.approx(0.595)
    assert row["parameters"] == 19
    assert row["images_per_second"] == 64.0
    assert row["alignments"] == ["tiny@3, weight 0.5, cosine, mlp:width=256"]
    assert row["speedup"] is None  # there is no baseline


def test_the_summary_table_leaves_out_empty_columns(tmp_path):
    runs = [fake_run(tmp_path / "b", distances={50: 12.0, 100: 10.0}), fake_run(tmp_path / "a", aligned=True)]
    rows = summary_table(runs)
    assert [row["Fréchet distance"] for row in rows] == ["10.00", "–"]
    assert [row["aligned to"] for row in rows] == ["nothing", "tiny@3, weight 0.5, cosine, mlp:width=256"]
    assert [row["alignment"] for row in rows] == ["–", "0.500"]
    assert "steps to the baseline's" not in rows[0]  # there is nothing to compare with
    assert all(isinstance(cell, str) for row in rows for cell in row.values())


def test_partial_lines_unknown_kinds_and_nulls_are_tolerated(tmp_path):
    run = fake_run(tmp_path / "r", distances={100: 10.0})
    rows = [
        {"kind": "weather", "step": 5, "rain": True},
        {"kind": "train", "step": 110, "denoising": None, "alignment": None, "seconds": 60.0, "new": 1},
        {"kind": "eval", "step": 110, "frechet_distance": None, **PROTOCOL},
        {"kind": "eval", "step": 100, "frechet_distance": 9.0, **PROTOCOL},  # measured again; the last row counts
    ]
    with open(run / layout.METRICS, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "step": 1')
    (row,) = summary_rows([run])
    assert row["steps"] == 110
    assert row["frechet_distance"] == 9.0
    assert np.isfinite(row["denoising"])
    assert read_run(run).train[-1]["new"] == 1


def test_a_folder_that_is_not_a_run_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UserError, match=path.name):
            summary_rows([path])


def test_names_must_match_the_runs(tmp_path):
    run = fake_run(tmp_path / "r")
    with pytest.raises(UserError, match="--names has 2 names for 1 runs"):
        read_runs([run], ["a", "b"])
    with pytest.raises(UserError, match="Two runs have the name 'r'"):
        read_runs([run, run])
    assert read_runs([run], ["a\udcff"])[0].name == "a\ufffd"  # a command-line byte that is not UTF-8


def _made(folder):
    folder.mkdir(parents=True)
    return folder


def test_alignment_is_credited_only_when_nothing_else_differs(tmp_path):
    def meaning(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        aligned = config(True, **changes)
        runs = [
            fake_run(folder / "baseline", distances={100: 10.0}),
            fake_run(folder / "aligned", aligned=True, distances={100: 5.0}, settings=aligned),
        ]
        return verdict(read_runs(runs)).meaning

    assert "the same network on the same images" in meaning()
    assert meaning(optimizer={"learning_rate": 1.0}) == ""
    assert meaning(alignments=[{**ALIGNMENT, "target": "block:depth=5"}]) == ""
