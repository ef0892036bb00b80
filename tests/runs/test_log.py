"""metrics.jsonl: rows are read back, partial lines are not, and a restart drops rows of repeated steps."""

import json
import math
import os
import sys
import time

import pytest

from repa.base import dist, files
from repa.base.errors import UserError
from repa.runs import MetricsLog, layout, read_metrics


def write(run, steps, resume_step=0):
    log = MetricsLog(run, resume_step)
    for step in steps:
        log.row("train", step, loss=step / 4, alignment={"tiny@1": -0.5})
    log.close()


def steps(run):
    return [row["step"] for row in read_metrics(run)]


def test_logged_rows_are_read_back(tmp_path):
    assert list(read_metrics(tmp_path)) == []
    log = MetricsLog(tmp_path)
    log.row("train", 1, loss=0.1 + 0.2, alignment={"tiny@1": math.nan}, rate=math.inf)
    log.row("eval", 1, sampler="heun", steps=4)
    assert len(list(read_metrics(tmp_path))) == 2  # readable before closing, while the run goes on
    log.line("step 1/2: loss 0.3")
    log.close()
    assert list(read_metrics(tmp_path)) == [
        {"kind": "train", "step": 1, "loss": 0.1 + 0.2, "alignment": {"tiny@1": None}, "rate": None},
        {"kind": "eval", "step": 1, "sampler": "heun", "steps": 4},
    ]
    assert (tmp_path / layout.LOG).read_text() == "step 1/2: loss 0.3\n"
    for line in (tmp_path / layout.METRICS).read_text().splitlines():  # JSON has no NaN
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_truncated_line_is_left_out(tmp_path):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / layout.METRICS
    whole = path.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    for end in range(begin, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert steps(tmp_path) == [1, 2], whole[begin:end]
    path.write_bytes(whole[:-1])  # all but the end of the line
    assert steps(tmp_path) == [1, 2, 3]


def test_a_log_that_is_too_large_is_refused(tmp_path):
    write(tmp_path, [1])
    os.truncate(tmp_path / layout.METRICS, 2**29 + 1)
    with pytest.raises(UserError, match=r"metrics\.jsonl is refused: it has .* but may have at most"):
        steps(tmp_path)


def test_missing_rows_are_reported_when_training_continues(tmp_path):
    write(tmp_path, [1, 2, 3])
    (tmp_path / layout.METRICS).write_text((tmp_path / layout.METRICS).read_text().splitlines(keepends=True)[0])
    log = MetricsLog(tmp_path, resume_step=2)
    log.close()
    assert "none of step 2" in log.lost
    write(tmp_path, [1, 2, 3])
    log = MetricsLog(tmp_path, resume_step=2)
    log.close()
    assert log.lost == ""


def test_a_changed_digit_in_a_row_is_found(tmp_path):
    log = MetricsLog(tmp_path)
    log.row("train", 1, loss=0.5, alignment={"tiny@1": -0.25})
    log.row("eval", 2, fid=31.5)
    log.close()
    path = tmp_path / layout.METRICS
    text = path.read_text()
    path.write_text(text.replace("31.5", "21.5"))
    with pytest.raises(UserError, match="damaged in line 2: it does not match its checksum"):
        list(read_metrics(tmp_path))
    with pytest.raises(UserError, match="damaged in line 2"):
        MetricsLog(tmp_path, resume_step=2)
    path.write_text(text)
    MetricsLog(tmp_path, resume_step=1).close()  # rewrites the remaining rows
    assert path.read_text() == text.splitlines(keepends=True)[0]


def test_a_restart_drops_rows_of_steps_that_are_repeated(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], resume_step=3)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    write(tmp_path, [1], resume_step=0)
    assert steps(tmp_path) == [1]


def test_a_restart_after_a_partial_line_begins_a_new_line(tmp_path):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / layout.METRICS
    path.write_bytes(path.read_bytes()[:-10])
    write(tmp_path, [3, 4], resume_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_main", lambda: False)
    log = MetricsLog(tmp_path / "run")
    log.row("train", 1, loss=1.0)
    log.line("text")
    log.close()
    assert not (tmp_path / "run").exists()


def offline_rows(folder) -> list[dict]:
    """History rows of a Weights & Biases offline file: a 7-byte header, then records in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 20
    while len(path.read_bytes()) <= 7 and time.monotonic() < deadline:
        time.sleep(0.1)  # wandb's process may write it after `finish` has returned
    data, position, rows = path.read_bytes(), 7, []
    assert len(data) < 2**15  # a single block, so no record is split
    while position < len(data):
        length, begin = int.from_bytes(data[position + 4 : position + 6], "little"), position + 7
        record = wandb_internal_pb2.Record.FromString(data[begin : begin + length])
        position = begin + length
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def test_weights_and_biases_receives_the_numbers_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resume_step in (0, 2):  # started, killed after step 2 and continued, it is one run
        log = MetricsLog(tmp_path, resume_step, project="repa", config={"seed": 3})
        log.row("event", resume_step, message="from step 0")  # contains no number, so it is not sent
        log.row("train", resume_step + 1, loss=0.5, alignment={"tiny@1": -0.25})
        log.close()
        time.sleep(1.1)  # folder names have a resolution of one second
    files.refuse_links(tmp_path)  # training continues, although wandb makes links
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == (tmp_path / layout.WANDB_ID).read_text()
    assert offline_rows(first) == [{"step": 1, "train/loss": 0.5, "train/alignment/tiny@1": -0.25}]
    assert offline_rows(second) == [{"step": 3, "train/loss": 0.5, "train/alignment/tiny@1": -0.25}]


def test_without_weights_and_biases_the_install_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'--wandb needs wandb.* pip install "repa\[wandb\]"'):
        MetricsLog(tmp_path, project="repa")
