"""Paths against the paper's formulas and autograd."""

import math

import pytest
import torch

from repa.base.errors import UserError
from repa.diffusion import PATHS, interpolate
from tests.oracles.interpolants import alpha_sigma

TIMES = torch.tensor([1e-4, 0.01, 0.13, 0.5, 0.77, 0.999, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("name", PATHS.names())
def test_coefficients_match_the_formulas_and_their_derivatives_autograd(name):
    t = TIMES.clone().requires_grad_()
    c = PATHS.build(name)(t)
    expected = torch.tensor([alpha_sigma(name, float(value)) for value in TIMES], dtype=torch.float64)
    torch.testing.assert_close(c.alpha, expected[:, 0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c.sigma, expected[:, 1], rtol=1e-10, atol=1e-12)
    for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (gradient,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PATHS.names())
def test_time_zero_is_data_and_time_one_is_noise(name):
    c = PATHS.build(name)(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert c.alpha[0] == 1
    assert c.sigma[0] == 0
    assert abs(c.alpha[1]) < 0.01
    assert abs(c.sigma[1] - 1) < 1e-4
    assert all(torch.isfinite(value).all() for value in c)
    assert (c.determinant > 0).all()


def test_vp_sigma_has_no_cancellation_in_float32_near_data():
    t = torch.tensor([1e-7, 1e-5, 1e-3])
    single, double = PATHS.build("vp")(t), PATHS.build("vp")(t.double())
    torch.testing.assert_close(single.sigma.double(), double.sigma, rtol=1e-6, atol=0)
    assert single.d_sigma[0] == pytest.approx(0.5 * math.sqrt(0.1 / 1e-5), rel=0.01)  # clamped to its value at 1e-5


def test_vp_uses_the_given_betas():
    c = PATHS.build("vp:beta_min=1.0,beta_max=3.0")(torch.tensor(1.0, dtype=torch.float64))
    assert float(c.alpha) == pytest.approx(math.exp(-1.0))  # the integral of beta is 2
    for spec in ("vp:beta_min=3.0,beta_max=1.0", "vp:beta_min=0", "vp:beta_max=high"):
        with pytest.raises(UserError, match="beta_m"):
            PATHS.build(spec)


@pytest.mark.parametrize("name", PATHS.names())
def test_coefficients_are_at_least_float32(name):
    path = PATHS.build(name)
    assert path(torch.tensor([0.5], dtype=torch.bfloat16)).alpha.dtype == torch.float32
    assert path(torch.tensor([0.5], dtype=torch.float64)).sigma.dtype == torch.float64


@pytest.mark.parametrize("name", PATHS.names())
def test_interpolate_uses_each_samples_own_time(name):
    torch.manual_seed(0)
    # as many samples as rows, so that wrong broadcasting would not raise
    x, noise = torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3)
    t = torch.tensor([0.2, 0.5, 0.9])
    x_t, velocity = interpolate(PATHS.build(name), x, noise, t)
    for n in range(3):
        alpha, sigma = alpha_sigma(name, float(t[n]))
        torch.testing.assert_close(x_t[n], alpha * x[n] + sigma * noise[n])
        before, after = alpha_sigma(name, float(t[n]) - 1e-5), alpha_sigma(name, float(t[n]) + 1e-5)
        d_alpha, d_sigma = ((b - a) / 2e-5 for a, b in zip(before, after, strict=True))
        torch.testing.assert_close(velocity[n], d_alpha * x[n] + d_sigma * noise[n], rtol=1e-4, atol=1e-4)


def test_linear_interpolation_equals_the_papers():
    x, noise = torch.tensor([[3.0]]), torch.tensor([[5.0]])
    x_t, velocity = interpolate(PATHS.build("linear"), x, noise, torch.tensor([0.25]))
    assert x_t.item() == pytest.approx(0.75 * 3 + 0.25 * 5)
    assert velocity.item() == 2.0  # noise - data


def test_interpolation_keeps_the_dtype_and_refuses_wrong_shapes():
    x = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    assert interpolate(PATHS.build("linear"), x, x, torch.tensor([0.1, 0.2]))[0].dtype == torch.bfloat16
    with pytest.raises(UserError, match="one per sample"):
        interpolate(PATHS.build("linear"), x, x, torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(UserError, match="noise has shape"):
        interpolate(PATHS.build("linear"), x, x[:1], torch.tensor([0.1, 0.2]))
