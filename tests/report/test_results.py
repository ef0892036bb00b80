"""Result tables in the paper's layout: a column contains only results of one protocol."""

import csv
import io
import json
import re
import shutil

import pytest
import yaml

from repa.base.errors import UserError
from repa.recipes import load_recipe
from repa.report import read_runs, write_report
from repa.report.analyses import accuracies, read_analyses
from repa.report.results import MOST_STEPS, cell_text, results, unmatched_paper_rows
from repa.report.runs import add_evaluations
from repa.report.speedups import group_seeds
from repa.report.style import how_made
from repa.runs import layout
from repa.runs.checkpoint import weights_checksum
from tests.report.fakes import analysis_file, config, fake_run, made_by, results_file

IMAGENET = {"source": {"kind": "imagenet"}, "num_images": 1_281_167, "resolution": 256, "class_names": []}
FIVE = {"fid": 8.1, "sfid": 5.2, "inception_score": 120.0, "precision": 0.701, "recall": 0.65}


def tables_of(runs, files=(), **settings):
    records, others = add_evaluations(read_runs(runs), files)
    return results(group_seeds(records), others, accuracies(read_analyses(records)), **settings)


@pytest.fixture
def repa_xl(tmp_path):
    """A run with the settings and the protocol of the paper's SiT-XL/2 with REPA."""
    settings = load_recipe("sit-xl2-repa").model_dump(mode="json")
    settings["model"]["num_classes"], settings["model"]["latent_size"] = 1000, 32
    run = fake_run(tmp_path / "xl", settings=settings, data=IMAGENET, num_steps=40)
    results_file(run / layout.EVALUATIONS / "fid.json", FIVE, made_by(run, 40))
    return run


def test_the_papers_figures_appear_next_to_comparable_results(repa_xl):
    (table,) = tables_of([repa_xl])
    assert list(table.columns.values()) == ["FID ↓", "sFID ↓", "IS ↑", "Prec. ↑", "Rec. ↑", "Acc. ↑"]
    ours, *paper = table.lines
    assert [cell_text(ours, key) for key in table.columns] == ["8.10", "5.20", "120.0", "0.70", "0.65", ""]
    assert (ours.step, ours.images) == (40, 40 * 256)
    assert all(line.is_of_paper for line in paper)
    at_400k = next(line for line in paper if line.step == 400_000)
    assert [cell_text(at_400k, key) for key in table.columns] == ["7.9", "5.06", "122.6", "0.70", "0.65", "70.3"]
    assert not any(line.values["frechet_distance"].mean == 1.42 for line in paper)  # guided
    records, _ = add_evaluations(read_runs([repa_xl]))
    assert unmatched_paper_rows([table], group_seeds(records)) == []


@pytest.mark.parametrize(("autoencoder", "is_beside"), [("sd-vae-ft-ema", True), ("sd-vae-ft-mse", False)])
def test_samples_without_a_recorded_decoder_used_the_runs_own(repa_xl, autoencoder, is_beside):
    settings = yaml.safe_load((repa_xl / layout.CONFIG).read_text()) | {"autoencoder": autoencoder}
    (repa_xl / layout.CONFIG).write_text(yaml.safe_dump(settings))
    results_file(repa_xl / layout.EVALUATIONS / "fid.json", FIVE, made_by(repa_xl, 40, decoder=""))
    (table,) = tables_of([repa_xl])
    assert f"decoded by {autoencoder}" in how_made(table.protocol)
    assert table.has_paper == is_beside


def test_guided_samples_appear_next_to_the_papers_guided_figure(repa_xl):
    guidance = ["cfg:scale=1.8,high=0.7"]
    results_file(repa_xl / layout.EVALUATIONS / "fid.json", FIVE, made_by(repa_xl, 40, guidance=guidance))
    (table,) = tables_of([repa_xl])
    assert [line.values["frechet_distance"].mean for line in table.lines] == [8.1, 1.42]
    assert "guidance cfg:scale=1.8,high=0.7" in how_made(table.protocol)


@pytest.mark.parametrize(
    ("made", "changes"),
    [
        ({"labels": "balanced"}, {}),
        ({"sampler": "heun"}, {}),
        ({"steps": 50}, {}),
        ({"weights": "model"}, {}),
        ({"decoder": "taesd"}, {}),
        ({"guidance": ["cfg:scale=1.5"]}, {}),
        ({}, {"num_samples": 10_000}),
        ({}, {"features": "dinov2-l"}),
        ({}, {"reference": "my-reference.npz"}),
        ({}, {"encoder": {"name": "inception", "weights_sha256": "0" * 64, "published": False}}),
        ({}, {"encoder": {"name": "inception", "weights_sha256": "0" * 64, "published": True, "precision": "bf16"}}),
    ],
)  # fmt: skip
def test_results_of_another_protocol_have_a_separate_table(repa_xl, made, changes):
    results_file(repa_xl / layout.EVALUATIONS / "other.json", {"fid": 8.0}, made_by(repa_xl, 40, **made), **changes)
    first, second = sorted(tables_of([repa_xl]), key=lambda table: table.has_paper, reverse=True)
    assert first.has_paper
    assert first.lines[0].values["frechet_distance"].mean == 8.1
    assert [line.values["frechet_distance"].mean for line in second.lines] == [8.0]


def test_another_data_set_is_not_compared_with_the_paper(repa_xl):
    (repa_xl / layout.DATA).write_text(json.dumps({**IMAGENET, "num_images": 1000}))
    (table,) = tables_of([repa_xl])
    assert not table.has_paper
    records, _ = add_evaluations(read_runs([repa_xl]))
    assert [row.name for _, row in unmatched_paper_rows([table], group_seeds(records))] == ["sit-xl2-repa"]


def test_seeds_share_one_line_and_partial_values_are_marked(tmp_path):
    runs = []
    for seed, end in enumerate([10.0, 14.0]):
        settings = config(False, seed=seed)
        runs.append(fake_run(tmp_path / f"b-{seed}", distances={100: end}, settings=settings))
    rows = [{"run": "b-0", "step": 100, "t": 0.5, "depth": d, "lr": 1e-3, "top1": v} for d, v in ((1, 0.2), (2, 0.4))]
    analysis_file(runs[0], "probe", "probe", rows)
    (table,) = tables_of(runs)
    (line,) = table.lines
    assert (line.name, line.num_runs) == ("b", 2)
    assert cell_text(line, "frechet_distance") == "12.00 ± 2.83"
    assert cell_text(line, "accuracy") == "40.00 (1 of 2)"  # the best block's, from one run
    assert cell_text(line, "recall") == ""


def test_many_steps_are_thinned_but_the_csv_has_all(tmp_path):
    run = fake_run(tmp_path / "a", num_steps=200, distances={step: 100.0 / step for step in range(10, 201, 10)})
    (table,) = tables_of([run])
    assert len(table.lines) == MOST_STEPS
    assert (table.lines[0].step, table.lines[-1].step) == (10, 200)
    assert len(tables_of([run], thin=False)[0].lines) == 20
    write_report([run], tmp_path / "r.html", tables=True)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert [int(row["iterations"]) for row in rows] == list(range(10, 201, 10))
    assert float(rows[1]["frechet_distance"]) == 5.0
    assert rows[0]["features"] == "tiny-classifier"


def test_samples_of_unknown_runs_have_a_line(tmp_path):
    run = fake_run(tmp_path / "a", distances={100: 3.0})
    file = results_file(tmp_path / "adm.json", FIVE, None, samples="published/adm.npz")
    elsewhere = results_file(tmp_path / "x.json", FIVE, made_by(tmp_path / "gone", 70))
    second, third = tables_of([run], [file, elsewhere])[1:]  # the first have no record of how they were made
    assert [(line.name, line.step, line.group) for line in [*second.lines, *third.lines]] == [
        ("adm.npz", None, None),
        ("gone", 70, None),
    ]


def test_results_given_by_name_find_their_run(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "a", seconds_per_step=0.5)
    monkeypatch.chdir(tmp_path)
    file = results_file(tmp_path / "x.json", {"fid": 3.0}, made_by("a", 100))
    (record,), others = add_evaluations(read_runs([run]), [file])
    assert others == []
    assert [(row["step"], row["seconds"], row["frechet_distance"]) for row in record.evals] == [(100, 50.0, 3.0)]


def test_evaluations_of_replaced_weights_are_left_out(random_run, tmp_path):
    """A run that continued from an earlier checkpoint repeats its later steps, and may end with other weights."""
    run = shutil.copytree(random_run, tmp_path / "run")
    (run / layout.METRICS).write_text('{"kind": "train", "step": 10}\n{"kind": "train", "step": 20}\n')
    now = weights_checksum(run, "ema", 20)
    for step, checksum in ((10, "0" * 64), (15, "0" * 64), (20, now), (30, "0" * 64)):
        made = made_by(run, step, weights_sha256=checksum)
        results_file(run / layout.EVALUATIONS / f"{step}.json", {"fid": float(step)}, made)
    (record,), _ = add_evaluations(read_runs([run]))
    assert [row["step"] for row in record.evals] == [15, 20]  # the checkpoint of step 15 is not kept: nothing is known
    assert "Evaluations of step 10, 30 are left out" in record.lost
    write_report([run], tmp_path / "r.html")
    assert "Evaluations of step 10, 30 are left out" in (tmp_path / "r.html").read_text()


def test_evaluations_of_a_damaged_checkpoint_are_left_out(random_run, tmp_path):
    run = shutil.copytree(random_run, tmp_path / "run")
    for step in (10, 20):
        made = made_by(run, step, weights_sha256=weights_checksum(run, "ema", step))
        results_file(run / layout.EVALUATIONS / f"{step}.json", {"fid": float(step)}, made)
    for step, left in ((10, [20]), (20, [])):  # the settings of the newest checkpoint are compared with config.yaml
        state = layout.checkpoint_folder(run, step) / layout.STATE_FILE
        state.write_bytes(state.read_bytes()[:-40])
        (record,), _ = add_evaluations(read_runs([run]))
        assert [row["step"] for row in record.evals] == left
    write_report([run], tmp_path / "r.html")
    assert "Evaluations of step 10, 20 are left out: state.json of their checkpoint is damaged." in (
        page := (tmp_path / "r.html").read_text()
    )
    assert f"{state} cannot be read as JSON" in page


def test_evaluations_that_cannot_be_listed_are_noted(tmp_path):
    run = fake_run(tmp_path / "a")
    (run / layout.EVALUATIONS).write_text("")  # a file where a folder should be
    (record,), _ = add_evaluations(read_runs([run]))
    assert f"The evaluations in its folder are left out: {run / layout.EVALUATIONS}: " in record.lost
    write_report([run], tmp_path / "r.html")
    assert "The evaluations in its folder are left out" in (tmp_path / "r.html").read_text()


def test_damaged_results_are_named(tmp_path):
    run = fake_run(tmp_path / "a")
    file = results_file(run / layout.EVALUATIONS / "x.json", FIVE, None)
    with pytest.raises(UserError, match=r"x\.json does not name the checkpoint"):
        add_evaluations(read_runs([run]))
    file.write_text('{"metrics": {"fid": ')
    with pytest.raises(UserError, match=r"x\.json cannot be read as JSON"):
        add_evaluations(read_runs([run]))
    file.write_text("[]")
    with pytest.raises(UserError, match="is not a result of `repa evaluate`"):
        add_evaluations(read_runs([run]))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_samples": "many"}, "num_samples is 'many'"),
        ({"made": ["a"]}, "made is ['a']"),
        ({"encoder": "inception"}, "encoder is 'inception'"),
        ({"reference_sha256": 12}, "reference_sha256 is 12"),
        ({"made": {"step": 100, "weak_sha256": 12}}, "made.weak_sha256 is 12"),
    ],
)
def test_results_with_wrong_types_are_refused(tmp_path, changes, named):
    file = results_file(tmp_path / "x.json", FIVE, **{"made": None, **changes})
    with pytest.raises(UserError, match=re.escape(f"x.json is damaged: {named}.")):
        add_evaluations(read_runs([fake_run(tmp_path / "a")]), [file])


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"kind": "eval", "step": 100, "fd": 9.0, "features": "tiny", "num_samples": "many"}, "num_samples is 'many'"),
        ({"kind": "train", "step": 100, "loss": 1.0, "alignment": [0.5]}, r"alignment is \[0.5\]"),
    ],
)
def test_metric_rows_with_wrong_types_are_refused(row, named, tmp_path):
    run = fake_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"metrics.jsonl is damaged: {named}"):
        read_runs([run])


@pytest.mark.parametrize("changed", [{"num_images": "60"}, {"class_names": {"disc": 0}}])
def test_data_records_with_wrong_types_are_refused(changed, tmp_path):
    data = {
        "source": {"kind": "shapes"},
        "num_images": 60,
        "resolution": 8,
        "class_names": ["disc", "square"],
        **changed,
    }
    with pytest.raises(UserError, match=f"data.json is damaged: .{next(iter(changed))}. has"):
        read_runs([fake_run(tmp_path / "a", data=data)])


def test_only_a_distance_in_inceptions_features_is_called_fid(tmp_path):
    """Also during training, where rows record the encoder's name."""
    run = fake_run(tmp_path / "a", distances={100: 3.0})
    rows = [{"kind": "eval", "step": step, "fid": 500.0 / step, "features": "inception"} for step in (50, 100)]
    with open(run / layout.METRICS, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    inception, classifier = tables_of([run])
    assert list(classifier.columns.values()) == ["Fréchet distance ↓"]
    assert list(inception.columns.values()) == ["FID ↓"]
    assert [line.values["frechet_distance"].mean for line in inception.lines] == [10.0, 5.0]
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "a: FID 5.00 after 100 steps" in page
    assert "FID against training steps: a goes from 10.00 at 50 steps to 5.00 at 100 steps." in page


def test_the_markdown_table_matches_the_page(repa_xl, tmp_path):
    write_report([repa_xl], tmp_path / "r.html", names=["a|b*"], tables=True)
    text = (tmp_path / "r.md").read_text()
    assert r"| a\|b\* | 40 | 8.10 | 5.20 | 120.0 | 0.70 | 0.65 |  |" in text
    assert "50,000 samples with uniform labels" in text
    assert "no guidance" in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert [row["source"] for row in rows] == ["run", *["paper"] * (len(rows) - 1)]
    assert rows[0]["accuracy"] == ""  # not measured


def test_results_guided_by_another_network_are_not_compared(repa_xl):
    for number, weak in enumerate(("a" * 64, "b" * 64)):
        made = made_by(repa_xl, 40, guidance=["autoguidance:scale=1.5"], weak_sha256=weak)
        results_file(repa_xl / layout.EVALUATIONS / f"{number}.json", {"fid": 8.0}, made)
    told = [how_made(table.protocol) for table in tables_of([repa_xl])]
    assert sum("guided by a weaker network (checksum aaaaaaaa)" in text for text in told) == 1
    assert sum("guided by a weaker network (checksum bbbbbbbb)" in text for text in told) == 1


def test_private_metrics_and_those_of_captions_have_columns(tmp_path):
    run = fake_run(tmp_path / "a")
    found = {
        "fid": 3.0,
        "mylab.metrics.energy:power=2": 0.25,
        "caption_agreement": 0.9,
        "caption_agreement_shuffled": 0.5,
    }
    results_file(run / layout.EVALUATIONS / "x.json", found, made_by(run, 100))
    alone = results_file(tmp_path / "y.json", {"mylab.metrics.energy:power=2": 0.5}, None, samples="adm.npz")
    first, second = tables_of([run], [alone])
    assert list(first.columns.values()) == ["FID ↓", "Caption agreement ↑", "mylab.metrics.energy:power=2"]
    assert [cell_text(first.lines[0], key) for key in first.columns] == ["3.00", "0.9", "0.25"]
    assert list(second.columns) == ["mylab.metrics.energy:power=2"]
    write_report([run], tmp_path / "r.html", tables=True)
    assert '<th scope="col" class="number">mylab.metrics.energy:power=2</th>' in (tmp_path / "r.html").read_text()
    (row,) = csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text()))
    assert row["mylab.metrics.energy:power=2"] == "0.25"
