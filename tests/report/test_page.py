"""The report page: balanced HTML, self-contained, escaped, complete."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repa.base.errors import UserError
from repa.cli import main
from repa.report import write_report
from repa.report.page import with_code
from repa.report.pictures import tile
from repa.runs import MetricsLog, layout
from tests.report.fakes import config, fake_run

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects elements; `balanced` is False when a closing tag does not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.balanced, self.elements, self.text = [], True, [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(runs, out, **settings) -> Page:
    return Page(write_report(runs, out, **settings).read_text())


@pytest.fixture
def two(tmp_path):
    previews = (50, 100)
    return [
        fake_run(tmp_path / "baseline", distances={50: 30.0, 100: 10.0}, previews=previews),
        fake_run(tmp_path / "aligned", aligned=True, distances={50: 15.0, 100: 5.0}, previews=previews),
    ]


def test_the_page_contains_every_part(two, tmp_path):
    training = np.zeros((20, 8, 8, 3), np.uint8)
    page = page_of(
        two,
        tmp_path / "r.html",
        training_images=training,
        training_captions=["disc"],
        facts={"GPU": "none"},
        commands=["repa train x"],
    )
    assert page.balanced
    assert page.open == []
    images = page.all("img")
    assert len(images) == 2 * 16 + 2 * 2 + 16  # the last samples, the grids and the training images
    assert [image["alt"] for image in images[:2]] == [
        "Last samples of baseline: disc",
        "Last samples of baseline: square",
    ]
    assert images[-16]["alt"] == "Training image: disc"
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in images)
    svgs = page.all("svg")
    assert len(svgs) == 4  # distance over steps and over time, denoising, alignment
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in svgs)
    for expected in (
        "1.3 times fewer steps (75 instead of 100)",
        "features of tiny-classifier",
        "1,000 samples",
        "20 network evaluations",
    ):
        assert expected in page.text
    assert "GPU" in page.text
    assert "repa train x" in page.text
    assert not page.all("script")


def test_one_evaluation_of_each_run_gets_no_table_of_speed_ups(two, tmp_path):
    assert "Speed-up at the baseline" in page_of(two, tmp_path / "r.html").text
    once = [
        fake_run(tmp_path / "b", distances={100: 10.0}),
        fake_run(tmp_path / "a", aligned=True, distances={100: 5.0}),
    ]
    assert "Speed-up at the baseline" not in page_of(once, tmp_path / "once.html", tables=True).text
    assert "Speed-up at the baseline" not in (tmp_path / "once.md").read_text()


def test_nothing_is_fetched_and_ids_are_unique(two, tmp_path):
    text = write_report(two, tmp_path / "r.html").read_text()
    page = Page(text)
    links = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href", "action", "data")
    ]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = [link[1:] for link in links if link.startswith("#")] + re.findall(r"url\(#([^)]*)\)", text)
    assert set(wanted) <= set(ids)  # all markers and clip paths have targets


def test_colours_follow_light_and_dark_mode(two, tmp_path):
    text = write_report(two, tmp_path / "r.html").read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawings)
    assert {"var(--run-0)", "var(--run-1)", "var(--rule)", "currentColor"} <= set(
        re.findall(r"var\(--[a-z0-9-]+\)|currentColor", drawings)
    )


def test_everything_from_outside_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    data = {"source": {"kind": evil}, "num_images": 3, "class_names": [evil, "b & c"]}
    run = fake_run(
        tmp_path / "r", distances={100: 3.0}, data=data, settings=config(False, note=evil), protocol={"features": evil}
    )
    page = page_of(
        [run], tmp_path / "r.html", title=evil, names=[f"_{evil}$"], facts={evil: evil}, commands=[f"echo '{evil}'"]
    )
    assert not page.all("script")
    assert page.balanced
    assert page.text.count(evil) >= 8


def test_commands_in_sentences_are_code_that_does_not_break_within_an_option():
    assert (
        with_code("use `--a-b 5 <x>` & go") == "use <code>--a-b</code> <code>5</code> <code>&lt;x&gt;</code> &amp; go"
    )
    assert with_code("a ` in <name>") == "a ` in &lt;name&gt;"


def test_the_same_input_gives_the_same_page(two, tmp_path):
    first, second = (write_report(two, tmp_path / name).read_text() for name in ("1.html", "2.html"))
    assert first == second


def test_a_run_without_results_gives_a_page(tmp_path):
    run = fake_run(tmp_path / "young", num_steps=0)
    page = page_of([run], tmp_path / "r.html")
    assert page.balanced
    assert "has not logged any step yet" in page.text
    assert "no evaluations" in page.text
    assert not page.all("svg")
    (run / layout.METRICS).unlink()
    (run / layout.DATA).unlink()
    assert "has not logged any step yet" in page_of([run], tmp_path / "r.html").text


def test_a_configuration_that_contradicts_the_results_is_refused(random_run, tmp_path):
    run = Path(shutil.copytree(random_run, tmp_path / "run"))
    page_of([run], tmp_path / "r.html")
    path = run / layout.CONFIG
    path.write_text(path.read_text().replace("batch_size: 8", "batch_size: 256"))
    for command in (["report", str(run), "--out", str(tmp_path / "r.html")], ["show", str(run)]):
        assert main.run(command) == 2
    with pytest.raises(UserError, match="has batch_size: 256, but the checkpoint of step 20 has batch_size: 8"):
        write_report([run], tmp_path / "r.html")


def test_rows_missing_from_the_log_are_reported(random_run, tmp_path):
    run = Path(shutil.copytree(random_run, tmp_path / "run"))
    log = MetricsLog(run)
    for step in (10, 20):
        log.row("train", step, loss=0.5)
    log.close()
    path = run / layout.METRICS
    assert "lost entries" not in page_of([run], tmp_path / "r.html").text
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert "run: metrics.jsonl has lost entries: it has none of step 20" in page_of([run], tmp_path / "r.html").text


def test_missing_previews_leave_a_gap(tmp_path):
    runs = [fake_run(tmp_path / "a", previews=(50, 100)), fake_run(tmp_path / "b", previews=(50,))]
    page = page_of(runs, tmp_path / "r.html")
    assert len(page.all("img")) == 3 + 2 * 16
    assert page.text.count("no preview") == 1


def test_many_steps_are_thinned_but_the_ends_stay(tmp_path):
    run = fake_run(tmp_path / "a", previews=tuple(range(10, 201, 10)), num_steps=200)
    page = page_of([run], tmp_path / "r.html")
    assert len(page.all("img")) == 6 + 16
    assert "10 steps" in page.text
    assert "200 steps" in page.text


def test_a_tile_contains_the_pixels_in_order():
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    made = tile(images)
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(made.uri.partition(",")[2]))))
    assert picture.shape == (4 * 8 + 3, 4 * 8 + 3, 4)
    centres = picture[4::9, 4::9, 0]
    np.testing.assert_array_equal(centres, np.arange(16).reshape(4, 4))
    assert (picture[8, :, 3] == 0).all()  # the gap is transparent
    assert made.shown(100) == (70, 70)  # integer multiples keep pixels square
    big = tile(np.zeros((16, 256, 256, 3), np.uint8))
    assert max(big.width, big.height) == 512


def test_damaged_files_are_named(two, tmp_path):
    with pytest.raises(UserError, match="training_images must be uint8"):
        write_report(two, tmp_path / "r.html", training_images=np.zeros((2, 8, 8, 3)))
    layout.preview(two[0], 50, ".npz").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match=r"0000050\.npz cannot be read as a preview"):
        write_report(two, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
