"""Figures of analyses, checked through matplotlib's objects."""

import numpy as np
import pytest

from repa.base.errors import UserError
from repa.report.analyses import depth_figure
from repa.report.pictures import picture_table
from repa.report.style import write_png


def rows(runs=("a",), steps=(10,), times=(0.0, 0.5), depths=(1, 2, 3)):
    return [
        {"run": run, "step": step, "t": t, "depth": d, "v": d + 10 * t + step / 100 + 5 * (run == "b")}
        for run in runs for step in steps for t in times for d in depths
    ]  # fmt: skip


def lines(axes):
    return {line.get_label().strip(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_one_time_is_one_curve_over_depth():
    (axes,) = depth_figure(rows(times=(0.5,)), "v", "CKNNA").axes
    assert list(lines(axes).values()) == [[[1, 6.1], [2, 7.1], [3, 8.1]]]
    assert axes.get_ylabel() == "CKNNA"


def test_several_times_are_curves_and_a_map():
    figure = depth_figure(rows(depths=(3, 1, 2)), "v", "CKNNA")
    curves, heat = figure.axes[:2]
    assert lines(curves)["t = 0.5"] == [[1, 6.1], [2, 7.1], [3, 8.1]]
    (image,) = heat.get_images()
    assert np.allclose(image.get_array(), [[1.1, 2.1, 3.1], [6.1, 7.1, 8.1]])  # rows are times, from bottom to top
    assert image.origin == "lower"
    assert [text.get_text() for text in heat.get_yticklabels()] == ["0", "0.5"]


def test_maps_of_two_runs_share_one_colour_scale():
    figure = depth_figure(rows(runs=("a", "b")), "v", "CKNNA")
    first, second = (axes.get_images()[0].get_clim() for axes in figure.axes if axes.get_images())
    assert first == second == pytest.approx((1.1, 13.1))


def test_checkpoints_are_drawn_over_steps_with_their_best_block():
    figure = depth_figure(rows(steps=(10, 20), times=(0.5,)), "v", "CKNNA")
    assert lines(figure.axes[-1]) == {"a, t = 0.5": [[10, 8.1], [20, 8.2]]}
    assert set(lines(figure.axes[0])) == {"step 10", "step 20"}


def test_undefined_values_are_gaps():
    some = rows(steps=(10, 20))
    some[1]["v"] = float("nan")  # step 10, t = 0, depth 2
    figure = depth_figure(some, "v", "CKNNA")
    image = figure.axes[1].get_images()[0]
    assert image.get_clim() == pytest.approx((1.1, 8.2))
    assert np.isnan(np.ma.filled(image.get_array().astype(float), np.nan)).tolist() == [
        [False, True, False],
        [False] * 3,
    ]
    training = next(axes for axes in figure.axes if axes.get_xlabel() == "training steps")
    assert lines(training)["a, t = 0"] == [[10, 3.1], [20, 3.2]]


def test_an_encoder_is_a_horizontal_line():
    level = {"run": "tiny", "step": None, "t": None, "depth": None, "features": "patches", "v": 4.2}
    (axes,) = depth_figure([*rows(times=(0.5,)), level], "v", "top-1").axes
    assert [point[1] for point in lines(axes)["tiny"]] == [4.2, 4.2]
    with pytest.raises(UserError, match="no row has a depth"):
        depth_figure([level], "v", "top-1")


def test_pictures_are_arranged_in_a_table(tmp_path):
    pictures = [[np.full((4, 4, 3), 40 * r + 10 * c, np.uint8) for c in range(3)] for r in range(2)]
    figure = picture_table(pictures, ["up", "down"], ["one", "two", "three $x"])
    shown = [axes.get_images()[0].get_array()[0, 0, 0] for axes in figure.axes]
    assert shown == [0, 10, 20, 40, 50, 60]
    assert [axes.get_title() for axes in figure.axes][:3] == ["one", "two", "three $x"]
    tops = [axes.get_position().y1 for axes in figure.axes]
    assert tops[0] > tops[3]  # the first row is at the top
    assert write_png(figure, tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
