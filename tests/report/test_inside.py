"""Logged columns other than losses, and results of `repa analyse`, in the report."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from repa.base.errors import UserError
from repa.report import curve_figure, read_run, read_runs, write_report
from repa.report.analyses import accuracies, read_analyses
from repa.report.curves import logged
from repa.runs import layout
from tests.report.fakes import analysis_file, fake_run


def with_columns(run, **columns):
    """The run with additional columns in its training rows, each a function of the step."""
    rows = [json.loads(line) for line in (run / layout.METRICS).read_text().splitlines()]
    rows = [{**row, **{key: value(row["step"]) for key, value in columns.items()}} for row in rows]
    (run / layout.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_varying_columns_are_drawn_and_constant_ones_are_listed(tmp_path):
    run = with_columns(
        fake_run(tmp_path / "r"), skipped_steps=lambda _: 0.0, learning_rate=lambda _: 1e-4,
        grad_norm=lambda step: 1.0 / step, data_wait=lambda step: None if step == 10 else step / 1e4,
    )  # fmt: skip
    moving, sentences = logged(read_runs([run]))
    assert moving == ["grad_norm", "data_wait"]
    assert "The learning rate was 0.0001 throughout." in sentences
    assert "Steps skipped for gradients that are not finite: 0." in sentences
    text = write_report([run], tmp_path / "r.html").read_text()
    assert "How training went" in text
    assert "wait for data (ms per step) against training steps: r from 2.00 to 10.00." in text  # 0.002 s at step 20


def test_skipped_steps_are_drawn_without_smoothing(tmp_path):
    """A running mean would show half a skipped step."""
    run = with_columns(fake_run(tmp_path / "r"), skipped_steps=lambda step: float(step > 50))
    drawn = curve_figure([read_run(run)], "skipped_steps").axes[0].lines
    assert len(drawn) == 1
    assert set(drawn[0].get_ydata()) == {0.0, 1.0}


def rows_of(run, values, step=100, t=0.5, key="cknna"):
    return [{"run": run, "step": step, "t": t, "depth": depth + 1, key: value} for depth, value in enumerate(values)]


def test_rows_of_several_runs_are_joined_under_their_names_in_the_report(tmp_path):
    runs = [fake_run(tmp_path / name) for name in ("base", "ours")]
    analysis_file(runs[0], "cknna-e", "cknna", rows_of("base", [0.1, 0.2]) + rows_of("ours", [0.3, 0.5]), encoder="e")
    analysis_file(runs[1], "cknna-e", "cknna", rows_of("ours", [0.4, 0.6], step=200), encoder="e")
    analysis_file(runs[1], "other", "cknna", rows_of("ours", [0.9, 0.9]), encoder="e", variant="platonic")
    first, second = read_analyses(read_runs(runs, ["A", "B"]))
    best = {(row["run"], row["step"]): row["cknna"] for row in first.best}
    assert best == {("A", 100): 0.2, ("B", 100): 0.5, ("B", 200): 0.6}
    assert [row["cknna"] for row in second.rows] == [0.9, 0.9]  # another variant is a separate figure
    page = write_report(runs, tmp_path / "r.html").read_text()
    section = page.split("Inside the networks")[1]
    assert section.count("<svg") == 2
    assert "CKNNA with e" in section
    assert "CKNNA (platonic) with e" in section


def test_accuracy_is_that_of_the_best_block_and_learning_rate(tmp_path):
    run = fake_run(tmp_path / "r")
    rows = [
        {**row, "lr": rate, "top5": 1.0}
        for rate, values in ((1e-3, [0.1, 0.3]), (1e-2, [0.5, 0.2]))
        for row in rows_of("r", values, key="top1")
    ]
    rows.append({"run": "tiny", "step": None, "t": None, "depth": None, "features": "patches", "lr": 1e-3, "top1": 0.9})
    analysis_file(run, "probe", "probe", rows)
    records = read_runs([run])
    (analysis,) = read_analyses(records)
    assert len(analysis.rows) == 3
    assert accuracies([analysis]) == {("r", 100): 50.0}


def test_equal_folder_names_are_distinguished_by_their_path(tmp_path):
    runs = [fake_run(tmp_path / place / name) for place in "xy" for name in ("base", "ours")]
    analysis_file(runs[2], "cknna-e", "cknna", rows_of("ours", [0.4]) + rows_of("base", [0.1]), encoder="e")
    (found,) = read_analyses(read_runs(runs))
    assert [row["run"] for row in found.rows] == ["y/ours", "y/base"]


def test_pictures_are_shown_and_drawings_of_rows_are_not_shown_twice(tmp_path):
    run = fake_run(tmp_path / "r")
    analysis_file(run, "cknna-e", "cknna", rows_of("r", [0.1, 0.2]), encoder="e")
    for name in ("cknna-e", "pictures"):
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(run / layout.ANALYSIS / f"{name}.png")
    section = write_report([run], tmp_path / "r.html").read_text().split("Inside the networks")[1]
    assert len(re.findall(r"<img[^>]*alt=\"r: Tokens as colours", section)) == 1
    assert section.count("<img") == 1
    analysis_file(run, "neighbours", "neighbours", [], verdict={"share_near": 0.25, "threshold": 0.5})
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(run / layout.ANALYSIS / "neighbours.png")
    section = write_report([run], tmp_path / "r.html").read_text().split("Inside the networks")[1]
    assert section.count("<img") == 2
    assert "25.0 % of the samples" in section
    analysis_file(run, "neighbours", "neighbours", [], verdict={"share_near": "many", "threshold": None})
    assert "% of the samples" not in write_report([run], tmp_path / "r.html").read_text()
    (run / layout.ANALYSIS / "pictures.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"pictures\.png is not a readable image"):
        write_report([run], tmp_path / "r.html")


@pytest.mark.parametrize(("chance", "is_said"), [(0.25, True), ("a lot", False), (None, False)])
def test_the_caption_says_what_to_compare_a_cknna_with(chance, is_said, tmp_path):
    run = fake_run(tmp_path / "r")
    analysis_file(run, "cknna-e", "cknna", rows_of("r", [0.1, 0.2]), encoder="e", chance=chance)
    page = write_report([run], tmp_path / "r.html").read_text()
    assert ("0.2500, neighbours / images" in page) == is_said


@pytest.mark.parametrize(
    "content", ['{"rows": [', "[1]", '{"analysis": "probe"}', '{"analysis": "probe", "rows": [{}]}']
)
def test_damaged_analyses_are_named(tmp_path, content):
    run = fake_run(tmp_path / "r")
    analysis_file(run, "probe", "probe", []).write_text(content)
    with pytest.raises(UserError, match=r"probe\.json"):
        read_analyses(read_runs([run]))


def test_damaged_metrics_give_a_one_line_error(tmp_path):
    run = fake_run(tmp_path / "r")
    whole = (run / layout.METRICS).read_bytes()
    (run / layout.METRICS).write_bytes(whole + b"7\nnull\n" + b'{"kind": "event", "step": 3}\n')
    assert len(read_run(run).train) == 10  # invalid rows are ignored
    assert "r" in write_report([run], tmp_path / "r.html").read_text()
    (run / layout.METRICS).write_bytes(whole + b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 11: it is not JSON"):
        read_run(run)
    (run / layout.METRICS).write_bytes(b'{"kind":\n' + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 1"):
        read_run(run)
    (run / layout.METRICS).write_bytes(whole)
    (run / layout.DATA).write_text("[]")
    with pytest.raises(UserError, match=r"data\.json is damaged: it must hold an object"):
        read_run(run)
