"""Samplers against literal loops of the reference and closed forms for Gaussian data, and their number of calls."""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.diffusion import GUIDANCES, PATHS, PREDICTIONS, SAMPLERS, CountedCalls, Denoiser, Layout, convert, guided
from tests.calls import passes
from tests.golden import check, load, tensor
from tests.oracles import samplers as oracle

MEAN, STD = 1.5, 0.5  # of the Gaussian data


def gaussian_velocity(name):
    """E[velocity | x_t] of data N(MEAN, STD^2), on any path."""

    def predict(x, t):
        c = PATHS.build(name)(t.double()).like(x)
        variance = (c.alpha * STD) ** 2 + c.sigma**2
        centred = x - c.alpha * MEAN
        data, noise = MEAN + c.alpha * STD**2 / variance * centred, c.sigma / variance * centred
        return c.d_alpha * data + c.d_sigma * noise

    return predict


def gaussian(name, predict=None):
    return Denoiser(predict or gaussian_velocity(name), PATHS.build(name), dtype=torch.float64)


def wiggly(x, t, labels):
    """An artificial float64 network: nonlinear in x, and dependent on time and label."""
    shape = (-1, 1, 1, 1)
    return torch.sin(2 * x + 3 * t.reshape(shape)) + (0.3 * labels.double()).reshape(shape) * x


def wiggly_numpy(x, t, conditional):
    label = np.array([1.0, 4.0] if conditional else [7.0, 7.0]).reshape(-1, 1, 1, 1)
    return np.sin(2 * x + 3 * t) + 0.3 * label * x


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wiggly_denoiser(scale, interval, path="linear"):
    low, high = interval
    cfg = GUIDANCES.build(f"cfg:scale={scale},low={low},high={high}")
    predict = guided(passes(wiggly, torch.tensor([1, 4]), 7), [cfg])
    return Denoiser(predict, PATHS.build(path), dtype=torch.float64)


GUIDANCE = [(1.0, 0.0, 1.0), (1.8, 0.0, 1.0), (1.8, 0.0, 0.7), (1.3, 0.2, 0.5)]


@pytest.mark.parametrize(("scale", "low", "high"), GUIDANCE)
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_ode_samplers_equal_literal_loops(name, scale, low, high):
    x = noise(2, 4, 3, 3)
    got = SAMPLERS.build(name)(wiggly_denoiser(scale, (low, high)), x, 10)
    expected = getattr(oracle, name)(wiggly_numpy, x.numpy(), 10, scale, low, high)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_heun_equals_the_reference_up_to_the_end_of_the_interval():
    x = noise(2, 4, 3, 3)
    for interval, same in (((0.0, 1.0), True), ((0.0, 0.7), False)):
        got = SAMPLERS.build("heun")(wiggly_denoiser(1.8, interval), x, 10)
        reference = oracle.heun(wiggly_numpy, x.numpy(), 10, 1.8, *interval, decide_by_own_time=False)
        assert np.allclose(got.numpy(), reference, rtol=1e-12, atol=1e-12) == same


@pytest.mark.parametrize(("scale", "low", "high"), GUIDANCE)
def test_euler_maruyama_equals_a_literal_loop(scale, low, high):
    x, draws = noise(2, 4, 3, 3), noise(9, 2, 4, 3, 3, seed=1)
    stream = iter(draws)
    got = SAMPLERS.build("euler_maruyama")(wiggly_denoiser(scale, (low, high)), x, 10, lambda like: next(stream))
    expected = oracle.euler_maruyama(wiggly_numpy, x.numpy(), 10, draws.numpy(), scale=scale, low=low, high=high)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-11, atol=1e-11)
    assert next(stream, None) is None  # nine draws, none in the last step


def sine(t):
    return math.sin(math.pi * t / 2)


@pytest.mark.parametrize(
    ("diffusion", "w_of_t"), [("2t", lambda t: 2 * t), ("sigma", sine), ("2sigma", lambda t: 2 * sine(t))]
)
def test_euler_maruyama_supports_every_diffusion_on_the_trigonometric_path(diffusion, w_of_t):
    x, draws = noise(2, 1, 2, 2), noise(7, 2, 1, 2, 2, seed=1)
    stream = iter(draws)
    sampler = SAMPLERS.build(f"euler_maruyama:diffusion={diffusion}")
    got = sampler(wiggly_denoiser(1.0, (0.0, 1.0), "trigonometric"), x, 8, lambda like: next(stream))
    expected = oracle.euler_maruyama(wiggly_numpy, x.numpy(), 8, draws.numpy(), "trigonometric", w_of_t)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_order_of_convergence_on_gaussian_data(sampler, order, path):
    x = noise(5, 1, 1, 1)
    exact = MEAN + STD * x  # these paths end in N(0, 1), and the flow of a Gaussian is affine
    errors = [float((SAMPLERS.build(sampler)(gaussian(path), x, steps) - exact).abs().max()) for steps in (32, 64, 128)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.12)


@pytest.mark.parametrize("path", PATHS.names())
@pytest.mark.parametrize("diffusion", ["2sigma", "sigma", "2t"])
def test_the_sde_reaches_the_datas_mean_and_variance_whatever_its_diffusion(path, diffusion):
    x = noise(20000, 1, 1, 1)
    draws = torch.Generator().manual_seed(3)
    sampler = SAMPLERS.build(f"euler_maruyama:diffusion={diffusion},last=0.01")
    samples = sampler(gaussian(path), x, 150, lambda like: torch.randn(like.shape, generator=draws, dtype=like.dtype))
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(samples.std()) == pytest.approx(STD, abs=0.02)
    correlation = float(torch.corrcoef(torch.stack([samples.flatten(), x.flatten()]))[0, 1])
    assert correlation < 0.9  # an ODE would give 1, so noise was injected


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_dopri5_solves_to_tolerance_and_stays_between_data_and_noise(path):
    times = []

    def predict(x, t):
        times.append(float(t[0]))
        return gaussian_velocity(path)(x, t)

    x = noise(4, 1, 2, 2)
    calls = CountedCalls(predict)
    got = SAMPLERS.build("dopri5:rtol=1e-7,atol=1e-7")(gaussian(path, calls), x, 20)
    torch.testing.assert_close(got, MEAN + STD * x, rtol=0, atol=1e-5)
    assert min(times) >= 0
    assert max(times) == 1
    tight = calls.calls
    SAMPLERS.build("dopri5")(gaussian(path, calls), x, 20)
    assert calls.calls - tight < tight


def test_dopri5_starts_with_a_step_of_one_over_num_steps():
    times = []

    def predict(x, t):
        times.append(float(t[0]))
        return torch.zeros_like(x)

    SAMPLERS.build("dopri5")(gaussian("linear", predict), noise(1, 1, 1, 1), 4)
    assert times[0] == 1
    assert 0.75 in [round(t, 9) for t in times]


def test_dopri5_without_torchdiffeq_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(UserError, match=r"repa\[ode\]"):
        SAMPLERS.build("dopri5")(gaussian("linear"), noise(1, 1, 1, 1), 4)


@pytest.mark.parametrize(("name", "nfe"), [("euler", 7), ("heun", 13), ("euler_maruyama", 7)])
def test_samplers_use_exactly_the_evaluations_of_the_algorithm(name, nfe):
    calls = CountedCalls(gaussian_velocity("linear"))
    SAMPLERS.build(name)(gaussian("linear", calls), noise(2, 1, 2, 2), 7)
    assert calls.calls == nfe


def test_time_points_equal_those_of_the_reference():
    seen = []

    def predict(x, t):
        seen.append(round(float(t[0]), 6))
        return x

    for name in ("euler", "euler_maruyama"):
        SAMPLERS.build(name)(gaussian("linear", predict), noise(1, 1, 1, 1), 5)
    assert seen == [1, 0.8, 0.6, 0.4, 0.2, 1, 0.76, 0.52, 0.28, 0.04]
    seen.clear()
    SAMPLERS.build("heun:shift=3.0")(gaussian("linear", predict), noise(1, 1, 1, 1), 2)
    assert seen == [1, 0.75, 0.75]
    seen.clear()
    shifted = Denoiser(predict, PATHS.build("linear"), dtype=torch.float64, shift=3.0)  # the same shift as in training
    for spec in ("euler", "euler_maruyama:last=0.5", "euler:shift=1"):
        SAMPLERS.build(spec)(shifted, noise(1, 1, 1, 1), 2)
    assert seen == [1, 0.75, 1, 0.75, 1, 0.5]


@pytest.mark.parametrize("spec", ["euler", "heun", "euler_maruyama", "dopri5"])
def test_every_step_reports_the_state_and_the_predicted_data(spec):
    steps = []
    x = noise(3, 1, 2, 2)
    out = SAMPLERS.build(spec)(gaussian("linear"), x, 6, lambda like: torch.zeros_like(like), steps.append)
    assert torch.equal(out, SAMPLERS.build(spec)(gaussian("linear"), x, 6, lambda like: torch.zeros_like(like)))
    assert torch.equal(steps[0].x, x)
    assert steps[0].t == 1
    if spec != "dopri5":
        assert [step.index for step in steps] == list(range(6))
        assert [step.done for step in steps] == pytest.approx([(i + 1) / 6 for i in range(6)])
    for step in steps:  # E[x | x_t] of the Gaussian in closed form
        alpha, sigma = 1 - step.t, step.t
        expected = MEAN + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (step.x - alpha * MEAN)
        torch.testing.assert_close(step.data, expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_maruyama", "dopri5"])
def test_every_kind_of_prediction_gives_the_same_samples(sampler, prediction):
    path, exact = PATHS.build("vp"), gaussian_velocity("vp")

    def predict(x, t):
        return convert(exact(x, t), x, path(t.double()), "velocity", prediction)

    x = noise(3, 1, 2, 2)
    got, expected = (
        SAMPLERS.build(sampler)(denoiser, x, 20, lambda like: torch.full_like(like, 0.1))
        for denoiser in (Denoiser(predict, path, prediction, torch.float64), gaussian("vp"))
    )
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["euler", "heun", "euler_maruyama", "dopri5"])
def test_the_state_is_float64_and_network_and_result_keep_float32(name):
    drawn = []

    def predict(x, t):
        assert x.dtype == t.dtype == torch.float32
        assert not torch.is_grad_enabled()
        return x * weight

    def randn_like(x):
        drawn.append(x.dtype)
        return torch.zeros_like(x)

    weight = torch.ones((), requires_grad=True)
    out = SAMPLERS.build(name)(Denoiser(predict, PATHS.build("linear")), noise(2, 1, 2, 2).float(), 4, randn_like)
    assert out.dtype == torch.float32
    assert drawn == [torch.float64] * (3 if name == "euler_maruyama" else 0)


@pytest.mark.parametrize(
    ("spec", "steps", "words"),
    [
        ("euler", 0, "at least 1"),
        ("dopri5", 0, "at least 1"),
        ("euler_maruyama:diffusion=2sigmas", 5, "'2sigma', 'sigma' or '2t'"),
        ("euler_maruyama:last=0", 5, "between 0 and 1"),
        ("dopri5:rtol=0", 5, "'rtol'.*is 0"),
        ("dopri5:atol=1e-30", 5, "'atol'.*is 1e-30, but must be at least "),
        ("heun:shift=0.5", 5, "at least 1"),
        ("euler:churn=1", 5, "no setting 'churn'"),
    ],
)
def test_invalid_input_is_refused(spec, steps, words):
    with pytest.raises(UserError, match=words):
        SAMPLERS.build(SAMPLERS.check(spec))(gaussian("linear"), noise(1, 1, 1, 1), steps)


@pytest.mark.parametrize("name", ["euler", "heun", "euler_maruyama"])
def test_samplers_of_text_conditioned_networks_equal_the_released_code(name):
    golden = load("t2i_samplers")
    x, context = tensor(golden["inputs"]["x1"]), tensor(golden["inputs"]["context"])
    contexts = {"conditional": context, "null": torch.full_like(context, 0.1)}

    def evaluate(x_t, t, names):
        shape = (-1, 1, 1, 1)
        return {n: 0.3 * x_t * (1 + contexts[n].mean((1, 2)).reshape(shape)) + 0.1 * t.reshape(shape) for n in names}

    def noises():
        index = torch.arange(x.numel(), dtype=torch.float64)
        for k in range(100):
            yield torch.sin(0.5 * index + k + 0.1).reshape(x.shape)

    draws = noises()
    denoiser = gaussian("linear", guided(evaluate, [GUIDANCES.build("cfg:scale=2")]))
    found = SAMPLERS.build(name)(denoiser, x, golden["steps"], lambda like: next(draws))
    check(found, golden["expected"][name])


def velocities(x, vector, t, conditional, library=np):
    """An artificial network of latents and a vector, each of which depends on the other."""
    label = np.array([1.0, 4.0] if conditional else [7.0, 7.0])
    if library is torch:
        label = torch.from_numpy(label)
    of_x = 0.3 * x * (1 + 0.1 * label.reshape(-1, 1, 1, 1)) + library.sin(vector.mean(1).reshape(-1, 1, 1, 1) + t)
    return of_x, 0.2 * vector * (1 - 0.2 * label.reshape(-1, 1)) + library.cos(x.mean((1, 2, 3)).reshape(-1, 1) - t)


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
@pytest.mark.parametrize(
    ("scales", "high"), [((1.0, 1.0), 1.0), ((2.3, 2.3), 0.85), ((2.3, 0.0), 0.85), ((1.8, 1.3), 0.7)]
)
def test_latents_and_vector_are_sampled_as_by_reg(path, scales, high):
    layout, draws = Layout({"x": (4, 2, 2), "class": (6,)}), noise(8, 2, 22)
    state = [part.numpy() for part in layout.unpack(draws[0]).values()]
    noises = [[part.numpy() for part in layout.unpack(draw).values()] for draw in draws[1:]]
    wanted = oracle.reg(velocities, state, 8, noises, path, scales, 0.0, high)

    def evaluate(x_t, t, names):
        assert t[0] == t[1]
        parts = (*layout.unpack(x_t).values(), float(t[0]))
        found = {name: velocities(*parts, name == "conditional", torch) for name in names}
        return {name: layout.pack({"x": x, "class": vector}) for name, (x, vector) in found.items()}

    # released: a class scale of 0 leaves the vector conditional
    guidance = GUIDANCES.build(f"cfg:scale={scales[0]},streams={scales[1] or 1.0},high={high}")
    denoiser, stream = gaussian(path, guided(evaluate, [guidance], layout)), iter(draws[1:])
    found = SAMPLERS.build("euler_maruyama:diffusion=2t")(denoiser, draws[0], 8, lambda like: next(stream))
    for part, expected in zip(layout.unpack(found).values(), wanted, strict=True):
        np.testing.assert_allclose(part.numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("steps", "scale", "low", "high"), [(50, 3.1, 0.1, 0.89), (6, 2.9, 0.1, 0.89), (7, 1.0, 0.1, 1.0)]
)
def test_pixels_are_sampled_as_by_jit(steps, scale, low, high):
    """The released interval of data times, 0.1 to 1, excludes its ends: data time 0.1 is one of 50 steps."""
    x = noise(2, 3, 4, 4)
    wanted = oracle.jit(
        lambda z, t, conditional: wiggly_numpy(z, 1 - t, conditional), x.numpy(), steps, scale, low, 1.0
    )
    predict = guided(passes(wiggly, torch.tensor([1, 4]), 7), [GUIDANCES.build(f"cfg:scale={scale},high={high}")])
    denoiser = Denoiser(predict, PATHS.build("linear"), "data", torch.float64, sigma_min=0.05)
    np.testing.assert_allclose(SAMPLERS.build("heun")(denoiser, x, steps).numpy(), wanted, rtol=1e-11, atol=1e-11)
