"""The page in a real browser: no errors or requests, and readable on a phone and in dark mode."""

import io

import numpy as np
import pytest
from PIL import Image

from repa.report import write_report
from repa.runs import layout
from tests.report import browser
from tests.report.fakes import analysis_file, config, fake_run

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with all contents: seeds, analyses, pictures and long names."""
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for seed in range(2):
        for name in ("baseline", "aligned-to-an-encoder-with-a-very-long-name"):
            aligned = name != "baseline"
            distances = {50: 30.0 - 9 * aligned, 100: 10.0 + seed - 5 * aligned}
            settings = config(aligned, seed=seed, batch_size=32)
            run = fake_run(
                folder / f"{name}-{seed}", aligned=aligned, distances=distances, previews=(50, 100), settings=settings
            )
            rows = [
                {"run": run.name, "step": 100, "t": t, "depth": depth, "cknna": 0.1 * depth + t}
                for t in (0.2, 0.8)
                for depth in range(1, 4)
            ]
            analysis_file(run, "cknna-tiny", "cknna", rows, encoder="tiny")
            Image.fromarray(np.zeros((400, 900, 3), np.uint8)).save(run / layout.ANALYSIS / "pictures.png")
            runs.append(run)
    facts = {"A fact": "word" * 60}
    return write_report(runs, folder / "report.html", facts=facts, commands=["repa " + "x" * 300])


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.started(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_no_errors_no_requests_and_no_overflow(page, chromium, tmp_path, width, scheme):
    chromium.requests.clear()
    chromium.complaints.clear()
    chromium.open(page, width, 800, scheme)
    assert chromium.complaints == []
    assert chromium.requests[0] == page.resolve().as_uri()
    assert all(address.startswith("data:image/png;base64,") for address in chromium.requests[1:])
    assert chromium.value("document.documentElement.scrollWidth <= innerWidth")  # no horizontal overflow
    assert chromium.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    chromium.picture(tmp_path / "page.png")
    shades = np.asarray(Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("L"), np.float64)
    assert (np.median(shades) < 60) == (scheme == "dark")
    assert shades.std() > 10  # the page is not blank


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_drawings_have_enough_contrast(page, chromium, scheme):
    """Text, also in drawings, has a WCAG 2 contrast of at least 4.5."""
    chromium.open(page, 1280, 800, scheme)
    colours = chromium.value(
        "[document.body, ...document.querySelectorAll('h2, p, td, th, figcaption, svg text, svg tspan')]"
        ".map(e => getComputedStyle(e)[e instanceof SVGElement ? 'fill' : 'color'])"
    )
    ground = luminance(chromium.value("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) > 50
    for colour in set(colours):
        lights = sorted([luminance(colour), ground])
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, colour


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
