"""Conversions between all kinds of prediction, also at the ends of the path, and the paper's formula."""

from itertools import permutations

import pytest
import torch

from repa.base.errors import UserError
from repa.diffusion import PATHS, PREDICTIONS, convert, interpolate, target
from repa.diffusion.predictions import ALPHA_MIN, CONVERSIONS
from tests.oracles.interpolants import score_of_paper

INNER = [0.003, 0.04, 0.3, 0.5, 0.8, 0.99]  # neither alpha nor sigma is clamped here


def four_kinds(name, times):
    """The path at each time, x_t, and the four kinds of prediction by definition."""
    torch.manual_seed(1)
    t = torch.tensor(times, dtype=torch.float64)
    x, noise = torch.randn(2, len(times), 3, 2, 2, dtype=torch.float64)
    path = PATHS.build(name)
    x_t, velocity = interpolate(path, x, noise, t)
    sigma = path(t).sigma.reshape(-1, 1, 1, 1)
    return path(t), x_t, {"data": x, "noise": noise, "velocity": velocity, "score": -noise / sigma}


@pytest.mark.parametrize("name", PATHS.names())
@pytest.mark.parametrize(("given", "wanted"), list(permutations(PREDICTIONS, 2)))
def test_every_kind_converts_to_every_other(name, given, wanted):
    c, x_t, kinds = four_kinds(name, INNER)
    torch.testing.assert_close(convert(kinds[given], x_t, c, given, wanted), kinds[wanted], rtol=1e-9, atol=1e-9)


def test_named_conversions_exist():
    assert set(CONVERSIONS) == set(permutations(set(PREDICTIONS) - {"score"}, 2))
    assert all(function.__name__ == f"{a}_to_{b}" for (a, b), function in CONVERSIONS.items())


@pytest.mark.parametrize("name", PATHS.names())
def test_velocity_gives_data_and_noise_at_both_ends(name):
    c, x_t, kinds = four_kinds(name, [0.0, 1.0])
    for wanted in ("data", "noise"):
        torch.testing.assert_close(convert(kinds["velocity"], x_t, c, "velocity", wanted), kinds[wanted])


@pytest.mark.parametrize("name", PATHS.names())
def test_each_kind_is_exact_at_the_end_where_it_is_known(name):
    c, x_t, kinds = four_kinds(name, [0.0, 0.0])
    torch.testing.assert_close(convert(kinds["noise"], x_t, c, "noise", "velocity"), kinds["velocity"])
    c, x_t, kinds = four_kinds(name, [1.0, 1.0])
    for wanted in ("velocity", "score"):
        torch.testing.assert_close(convert(kinds["data"], x_t, c, "data", wanted), kinds[wanted])
    torch.testing.assert_close(convert(kinds["velocity"], x_t, c, "velocity", "score"), kinds["score"])


@pytest.mark.parametrize("name", ["linear", "trigonometric"])
def test_predicted_noise_at_the_noise_end_gives_bounded_data(name):
    c, x_t, _ = four_kinds(name, [1.0, 1.0])
    error = torch.full_like(x_t, 0.01)
    torch.testing.assert_close(convert(x_t, x_t, c, "noise", "data"), torch.zeros_like(x_t), rtol=0, atol=1e-12)
    assert convert(x_t + error, x_t, c, "noise", "data").abs().max() <= 0.01 / ALPHA_MIN + 1e-9


@pytest.mark.parametrize("name", PATHS.names())
@pytest.mark.parametrize("pair", list(permutations(PREDICTIONS, 2)))
def test_all_conversions_are_finite_at_the_ends(name, pair):
    c, x_t, kinds = four_kinds(name, [0.0, 1.0])
    output = torch.nan_to_num(kinds[pair[0]], nan=1.0, posinf=1.0, neginf=1.0)
    assert torch.isfinite(convert(output, x_t, c, *pair)).all()


@pytest.mark.parametrize("name", PATHS.names())
def test_the_score_of_a_velocity_is_equation_20(name):
    c, x_t, kinds = four_kinds(name, INNER)
    score = convert(kinds["velocity"], x_t, c, "velocity", "score")
    for n in range(len(INNER)):
        args = [float(value[n]) for value in c]
        expected = score_of_paper(float(kinds["velocity"][n, 0, 1, 0]), float(x_t[n, 0, 1, 0]), *args)
        assert float(score[n, 0, 1, 0]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_match_their_definitions(prediction):
    c, _, kinds = four_kinds("vp", INNER)
    torch.testing.assert_close(target(prediction, c, kinds["data"], kinds["noise"]), kinds[prediction])


def test_targets_keep_the_dtype_and_unknown_ones_are_refused():
    c, x = PATHS.build("linear")(torch.tensor([0.5])), torch.ones(1, 1, dtype=torch.bfloat16)
    assert all(target(kind, c, x, x).dtype == torch.bfloat16 for kind in PREDICTIONS)
    with pytest.raises(UserError, match="Did you mean 'velocity'"):
        target("velocty", c, x, x)
