"""Denoiser: dtypes, times, parameterisations, and one network call each."""

import pytest
import torch

from repa.base.errors import UserError
from repa.diffusion import PATHS, PREDICTIONS, CountedCalls, Denoiser, interpolate
from repa.diffusion.predictions import convert

LINEAR = PATHS.build("linear")


class Spy:
    """Returns a fixed tensor and records its inputs."""

    def __init__(self, answer):
        self.answer, self.seen = answer, []

    def __call__(self, x_t, t):
        self.seen.append((x_t, t))
        return self.answer


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS.names())
def test_a_perfect_network_of_any_kind_gives_velocity_score_and_data(name, prediction):
    torch.manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    t, path = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), PATHS.build(name)
    x_t, velocity = interpolate(path, x, noise, t)
    answer = convert(velocity, x_t, path(t), "velocity", prediction)
    denoiser = Denoiser(Spy(answer), path, prediction, dtype=torch.float64)
    torch.testing.assert_close(denoiser.velocity(x_t, t), velocity)
    torch.testing.assert_close(denoiser.data(x_t, t), x)
    both = denoiser.velocity_and_score(x_t, t)
    torch.testing.assert_close(both[0], velocity)
    torch.testing.assert_close(both[1], -noise / path(t).sigma.reshape(-1, 1, 1, 1))


def test_each_method_calls_the_network_once():
    calls = CountedCalls(lambda x, t: x)
    denoiser, x = Denoiser(calls, LINEAR), torch.ones(2, 1, 2, 2)
    for number, method in enumerate(
        (denoiser.velocity, denoiser.velocity_and_score, denoiser.data, denoiser.output), 1
    ):
        method(x, 0.5)
        assert calls.calls == number


@pytest.mark.parametrize("t", [0.7, torch.tensor(0.7, dtype=torch.float64), torch.full((3,), 0.7, dtype=torch.float64)])
def test_any_form_of_time_reaches_the_network_as_float32_per_sample(t):
    spy = Spy(torch.zeros(3, 2, 2, 2))
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    data = Denoiser(spy, LINEAR).data(x, t)
    seen_x, seen_t = spy.seen[0]
    assert torch.equal(seen_t, torch.full((3,), 0.7))
    assert seen_x.dtype == seen_t.dtype == torch.float32
    assert data.dtype == torch.float64
    torch.testing.assert_close(data, x, rtol=1e-15, atol=0)  # v = 0, so state and coefficients stayed float64


@pytest.mark.parametrize("t", [0.7, torch.full((3,), 0.7, dtype=torch.float64)])
def test_a_float64_network_receives_float64_times(t):
    spy = Spy(torch.zeros(3, 2, 2, 2))
    Denoiser(spy, LINEAR, dtype=torch.float64).velocity(torch.zeros(3, 2, 2, 2, dtype=torch.float64), t)
    assert torch.equal(spy.seen[0][1], torch.full((3,), 0.7, dtype=torch.float64))


def test_low_precision_input_does_not_round_the_time():
    spy = Spy(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16))
    out = Denoiser(spy, LINEAR, dtype=torch.bfloat16).velocity(torch.ones(1, 1, 1, 1), 0.996)
    assert spy.seen[0][0].dtype == torch.bfloat16
    assert spy.seen[0][1].item() == pytest.approx(0.996, abs=1e-7)
    assert out.dtype == torch.float32


def test_a_network_may_receive_the_samplers_float_time():
    spy = Spy(torch.zeros(2, 1, 1, 1))
    spy.takes_float_time = True
    x = torch.zeros(2, 1, 1, 1)
    for network in (spy, CountedCalls(spy)):
        Denoiser(network, LINEAR).velocity(x, 0.3)
        Denoiser(network, LINEAR).velocity(x, torch.tensor(0.25))
        assert [t for _, t in spy.seen[-2:]] == [0.3, 0.25]
    Denoiser(spy, LINEAR).velocity(x, torch.tensor([0.1, 0.2]))
    assert spy.seen[-1][1].tolist() == pytest.approx([0.1, 0.2])


def test_a_learned_variance_is_dropped_except_from_output():
    answer = torch.arange(8.0).reshape(1, 8, 1, 1)
    denoiser, x = Denoiser(Spy(answer), LINEAR), torch.zeros(1, 4, 1, 1)
    assert denoiser.velocity(x, 0.5).flatten().tolist() == [0, 1, 2, 3]
    assert denoiser.output(x, 0.5).shape == (1, 8, 1, 1)
    with pytest.raises(UserError, match="outputs 8 channels for 3"):
        denoiser.velocity(torch.zeros(1, 3, 1, 1), 0.5)


def test_invalid_input_is_refused():
    with pytest.raises(UserError, match="an interpolant"):
        Denoiser(Spy(None), "linear")
    with pytest.raises(UserError, match="eps.*velocity.*score"):
        Denoiser(Spy(None), LINEAR, "eps")
    with pytest.raises(UserError, match="one per sample"):
        Denoiser(Spy(None), LINEAR).velocity(torch.zeros(2, 1, 1, 1), torch.zeros(3))
