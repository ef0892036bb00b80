"""Runs that differ only in the seed: grouping, means and spread."""

import json

import numpy as np
import pytest

from repa.report import curve_figure, read_runs, summary_rows, verdict
from repa.report.curves import mean_curve
from repa.report.speedups import group_seeds, speedups_of_groups, spread
from repa.runs import layout
from tests.report.fakes import PROTOCOL, config, fake_run


def seeded(folder, seed, aligned=False, **more):
    settings = config(aligned, seed=seed, batch_size=32, **more.pop("changes", {}))
    return fake_run(folder, aligned=aligned, settings=settings, **more)


@pytest.fixture
def six(tmp_path):
    """The baselines end at 10, 12 and 14; the aligned runs reach these after 50, 40 and 25 of 100 steps."""
    runs = []
    for seed, (end, step) in enumerate([(10.0, 50), (12.0, 40), (14.0, 25)]):
        runs.append(seeded(tmp_path / f"baseline-{seed}", seed, distances={50: 20.0, 100: end}))
        distances = {10: 30.0, 60: 30.0 - (30.0 - end) * 50 / (step - 10), 100: 1.0}
        runs.append(seeded(tmp_path / f"aligned-{seed}", seed, aligned=True, distances=distances))
    return runs


def test_groups_contain_runs_that_differ_only_in_the_seed(tmp_path):
    runs = [
        seeded(tmp_path / "a-0", 0),
        seeded(tmp_path / "b", 0, aligned=True),
        seeded(tmp_path / "a-1", 1),
        seeded(tmp_path / "other", 2, changes={"num_steps": 7}),
        seeded(tmp_path / "again", 1),  # a repeated seed does not count again
        seeded(tmp_path / "data", 3, data={"source": {"kind": "elsewhere"}}),
    ]
    found = group_seeds(read_runs(runs))
    assert [[run.name for run in group.runs] for group in found] == [
        ["a-0", "a-1"],
        ["b"],
        ["other"],
        ["again"],
        ["data"],
    ]
    assert [group.name for group in found] == ["a", "b", "other", "again", "data"]
    assert found[0].label == "a (2 seeds)"
    assert found[1].label == "b"


def test_a_group_takes_the_common_name_of_its_folders(tmp_path):
    runs = [seeded(tmp_path / f"try{seed}" / "base", seed) for seed in range(2)]
    records = read_runs(runs)
    assert [run.name for run in records] == ["try0/base", "try1/base"]
    assert [group.name for group in group_seeds(records)] == ["base"]


def test_the_spread_is_the_sample_standard_deviation():
    found = spread([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.deviation == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert (found.low, found.high, found.num) == (1.0, 4.0, 3)
    assert spread([3.0]).deviation is None


def test_the_speedup_pairs_runs_with_equal_seeds(six):
    (found,) = speedups_of_groups(group_seeds(read_runs(six[::-1])))
    assert found.by_seed
    factors = found.factors("steps")
    expected = [100 / 50, 100 / 40, 100 / 25]  # other pairs would give other factors
    assert factors.mean == pytest.approx(np.mean(expected))
    assert (factors.low, factors.high, factors.num) == (pytest.approx(2.0), pytest.approx(4.0), 3)
    sentence, notes, _ = verdict(read_runs(six))
    assert (
        "aligned ends at a Fréchet distance of 1.00 ± 0.00 against 12.00 ± 2.00 for baseline (at 100 steps)" in sentence
    )
    assert "lower in all 3 pairs of the same seed." in sentence
    assert "cross" not in sentence  # at 50 steps the aligned runs have 12, 10 and 7
    assert "2.8 times fewer (2.0 to 4.0)" in sentence
    assert any("baseline of its seed" in note for note in notes)
    assert any("With 3 seeds" in note for note in notes)
    assert not any("between seeds was not measured" in note for note in notes)


def test_the_number_of_images_counts_the_batch_size(tmp_path):
    baseline = seeded(tmp_path / "b", 0, distances={50: 20.0, 100: 10.0})
    settings = {**config(True, seed=0), "batch_size": 64}
    aligned = fake_run(tmp_path / "a", aligned=True, settings=settings, distances={30: 20.0, 50: 10.0})
    (found,) = speedups_of_groups(group_seeds(read_runs([baseline, aligned])))
    assert found.factors("steps").mean == pytest.approx(2.0)
    assert found.factors("images").mean == pytest.approx(1.0)  # half the steps with twice the batch


def test_different_seeds_are_compared_pairwise(six):
    found = speedups_of_groups(group_seeds(read_runs([six[0], *six[3::2]])))[0]
    assert not found.by_seed
    assert len(found.pairs) == 2  # one baseline, two aligned runs
    assert {pair.target for pair in found.pairs} == {10.0}
    notes = verdict(read_runs([six[0], *six[3::2]])).notes
    assert any("There is one baseline" in note for note in notes)


def test_there_is_no_mean_when_a_run_misses_the_target(six):
    rows = [json.loads(line) for line in (six[1] / layout.METRICS).read_text().splitlines()]
    for row in rows:
        if row["kind"] == "eval":
            row["frechet_distance"] = 50.0
    (six[1] / layout.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = speedups_of_groups(group_seeds(read_runs(six)))
    assert len(found.reached) == 2
    assert found.factors("steps") is None
    sentence, notes, _ = verdict(read_runs(six))
    assert "lower in 2 of 3 pairs of the same seed: the seeds disagree" in sentence
    assert "fewer" not in sentence
    assert any(note.startswith("2 of 3 aligned runs") for note in notes)


def test_each_run_is_compared_with_the_baseline_of_its_seed_in_the_summary(six):
    targets = [row["speedup"].target for row in summary_rows(six) if row["speedup"]]
    assert targets == [10.0, 12.0, 14.0]


def test_each_seed_is_drawn_with_a_ring_at_the_target(six):
    axes = curve_figure(read_runs(six), "frechet_distance", against="images").axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["baseline (3 seeds)", "aligned (3 seeds)"]
    rings = [line for line in axes.lines if line.get_markersize() == 9]
    assert sorted(float(ring.get_xdata()[0]) for ring in rings) == pytest.approx([25 * 32e-3, 40 * 32e-3, 50 * 32e-3])
    assert sorted(float(ring.get_ydata()[0]) for ring in rings) == [10.0, 12.0, 14.0]
    strong = next(line for line in axes.lines if line.get_label() == labels[0])
    assert list(strong.get_ydata()) == pytest.approx([20.0, 12.0])  # means over seeds
    assert sum(len(line.get_xdata()) > 1 and line.get_linewidth() < 1 for line in axes.lines) == 6


def test_the_mean_curve_uses_steps_that_all_runs_have():
    curves = [{1: (1.0, 10.0), 2: (2.0, 20.0)}, {2: (4.0, 40.0), 3: (9.0, 1.0)}, {1: (1.0, 10.0), 2: (3.0, 90.0)}]
    assert mean_curve(curves) == [(3.0, 50.0)]


def test_a_column_contains_results_of_one_protocol(tmp_path):
    """A protocol by which only one run was measured gets no column next to the others."""
    runs = [fake_run(tmp_path / name, distances={50: 12.0, 100: 10.0}) for name in "ab"]
    with open(runs[1] / layout.METRICS, "a") as file:
        file.write(
            json.dumps({"kind": "eval", "step": 200, "frechet_distance": 1.0, **PROTOCOL, "num_samples": 9}) + "\n"
        )
    assert [row["frechet_distance"] for row in summary_rows(runs)] == [10.0, 10.0]
