"""Progress lines of short, resumed and long jobs in a log."""

import pytest

from repa.cli import console


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return now


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_short_job_prints_no_rate(capsys, clock):
    with console.ProgressBar("work", "images") as bar:
        clock[0] += 30.0  # time for loading models
        bar(64, 96)
        clock[0] += 0.0004
        bar(96, 96, "1 MiB written")
    assert lines(capsys) == ["work: 64/96 images", "work: 96/96 images 1 MiB written"]


def test_a_job_with_one_report_prints_no_rate(capsys, clock):
    with console.ProgressBar("work", "images") as bar:
        bar(5, 5)
    assert lines(capsys) == ["work: 5/5 images"]


def test_the_rate_ignores_work_done_before(capsys, clock):
    with console.ProgressBar("work", "images") as bar:
        bar(1000, 4000)  # done before
        clock[0] += 20.0
        bar(2000, 4000)
        clock[0] += 20.0
        bar(4000, 4000)
    assert lines(capsys) == ["work: 2,000/4,000 images (50.0/s, 40 s left)", "work: 4,000/4,000 images (75.0/s)"]


def test_work_inside_a_step_is_shown_next_to_the_bar_or_logged(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    with console.ProgressBar("run", "steps") as bar:
        bar.within("making samples", 250, 1000)
    assert capsys.readouterr().err == "run: making samples 250/1,000\n"


def test_more_than_a_thousand_passes_print_a_note():
    from repa.cli.train import about_passes
    from repa.training.config import TrainConfig

    config = TrainConfig(batch_size=32, num_steps=10_000)
    assert about_passes(config, 320) == ""  # a thousand
    note = about_passes(config, 300)
    assert "1,067 passes over 300 images" in note
    assert "--num-steps 9375" in note
    assert about_passes(config.override(epochs=100), 300) == ""
