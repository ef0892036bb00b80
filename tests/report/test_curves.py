"""The drawn curves show the logged figures."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from repa.base.errors import UserError
from repa.report import curve_figure, read_runs, save_figure
from repa.report.curves import running_mean, smoothing_window
from repa.runs import layout
from tests.report.fakes import config, fake_run, made_by, results_file


@pytest.fixture
def two(tmp_path):
    return [
        fake_run(tmp_path / "b", distances={50: 30.0, 100: 10.0}, num_steps=200, previews=(100,)),
        fake_run(
            tmp_path / "a", aligned=True, distances={50: 15.0, 100: 5.0}, previews=(50, 100), seconds_per_step=1.0
        ),
    ]


def lines_of(figure):
    return {
        line.get_label(): line.get_xydata() for line in figure.axes[0].lines if not line.get_label().startswith("_")
    }


def test_distances_are_drawn_over_steps_and_over_time(two):
    runs = read_runs(two)
    drawn = lines_of(curve_figure(runs, "frechet_distance"))
    np.testing.assert_allclose(drawn["b"], [[50, 30], [100, 10]])
    np.testing.assert_allclose(drawn["a"], [[50, 15], [100, 5]])
    drawn = lines_of(curve_figure(runs, "frechet_distance", against="seconds"))
    np.testing.assert_allclose(drawn["a"], [[50, 15], [100, 5]])  # below three minutes, in seconds


def test_a_single_row_is_drawn_as_a_dot(tmp_path):
    """A line of one point is drawn as a dot in the first run's colour."""
    figure = curve_figure(read_runs([fake_run(tmp_path / "short", num_steps=10)]), "denoising")
    figure.axes[0].get_legend().remove()
    figure.savefig(tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert (pixels == (0x00, 0x72, 0xB2)).all(axis=-1).sum() > 20


def test_time_is_drawn_in_a_suitable_unit(tmp_path):
    run = fake_run(tmp_path / "slow", distances={50: 30.0, 100: 10.0}, seconds_per_step=360.0)  # ten hours
    figure = curve_figure(read_runs([run]), "frechet_distance", against="seconds")
    np.testing.assert_allclose(lines_of(figure)["slow"], [[5, 30], [10, 10]])
    assert "hours" in figure.axes[0].get_xlabel()


def test_the_ring_marks_where_the_level_is_crossed(two):
    axes = curve_figure(read_runs(two), "frechet_distance").axes[0]
    rings = [line.get_xydata() for line in axes.lines if line.get_markerfacecolor() == "none"]
    np.testing.assert_allclose(rings, [[[75.0, 10.0]]])  # halfway from 15 to 5


def test_alignment_is_the_negative_loss(two):
    drawn = lines_of(curve_figure(read_runs(two), "alignment"))
    assert list(drawn) == ["a"]
    np.testing.assert_allclose(drawn["a"][[0, -1]], [[10, 0.41], [100, 0.50]])
    assert curve_figure(read_runs(two), "alignment").axes[0].get_ylabel() == "cosine similarity"


def test_other_similarities_are_not_called_cosine(tmp_path):
    settings = config(True)
    settings["alignments"] = [{**settings["alignments"][0], "loss": "nt_xent:temperature=0.07"}]
    run = fake_run(tmp_path / "r", aligned=True, settings=settings)
    assert curve_figure(read_runs([run]), "alignment").axes[0].get_ylabel() != "cosine similarity"


def test_the_running_mean_is_centred_and_shrinks_at_the_ends():
    values = np.random.default_rng(0).standard_normal(20)
    expected = [np.mean(values[max(i - 2, 0) : i + 3]) for i in range(20)]
    np.testing.assert_allclose(running_mean(values, 5), expected, atol=1e-12)
    assert all(smoothing_window(n) % 2 == 1 for n in range(1, 300))


def test_a_run_has_one_colour_everywhere(two):
    runs = read_runs(two)
    colours = []
    for kind in ("denoising", "frechet_distance"):
        axes = curve_figure(runs, kind).axes[0]
        colours.append({line.get_label(): line.get_color() for line in axes.lines if line.get_label() in ("a", "b")})
    assert colours[0] == colours[1]
    assert len(set(colours[0].values())) == 2


def test_an_unknown_curve_is_refused(two):
    with pytest.raises(UserError, match="Did you mean 'denoising'"):
        curve_figure(read_runs(two), "denoise")


def test_a_picture_for_a_readme_is_drawn(two, tmp_path):
    out = save_figure(two, tmp_path / "figure.png")
    picture = Image.open(out)
    assert picture.format == "PNG"
    colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 1000  # it contains samples
    assert picture.width > 2 * picture.height
    empty = fake_run(tmp_path / "young", num_steps=0)
    with pytest.raises(UserError, match="nothing to plot"):
        save_figure([empty], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_picture_includes_results_of_repa_evaluate(tmp_path):
    run = fake_run(tmp_path / "a")
    loss = Image.open(save_figure([run], tmp_path / "loss.png")).convert("RGB")
    results_file(run / layout.EVALUATIONS / "x.json", {"fid": 1.0}, made_by(run, 50))
    distance = Image.open(save_figure([run], tmp_path / "distance.png")).convert("RGB")
    assert ImageChops.difference(loss, distance).getbbox()
