"""Flow matching and improved DDPM as processes: paths, losses, and sampling."""

import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.diffusion import SAMPLERS, Denoiser, DiffusionConfig, build_process, interpolate
from tests.golden import load, tensor
from tests.oracles import ddpm as oracle
from tests.oracles import weights

DDPM = build_process(DiffusionConfig(objective="ddpm"))
BARS = oracle.alpha_bars(oracle.BETAS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_path_equals_the_discrete_process_at_every_timestep():
    c = DDPM.path(torch.arange(1001, dtype=torch.float64) / 1000)
    np.testing.assert_allclose(c.alpha.numpy() ** 2, [1.0, *BARS], rtol=1e-9)
    np.testing.assert_allclose(c.sigma.numpy() ** 2, [0.0, *(1 - bar for bar in BARS)], rtol=3e-6)
    half = DDPM.path(torch.arange(1001) / 1000)
    np.testing.assert_allclose(half.alpha.numpy() ** 2, [1.0, *BARS], rtol=1e-5)  # also in float32


def test_the_path_is_smooth_and_its_derivatives_match():
    t = torch.linspace(0.0003, 0.9997, 2001, dtype=torch.float64, requires_grad=True)
    c = DDPM.path(t)
    for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (slope,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, slope, rtol=1e-8, atol=0)
    assert (c.alpha.diff() < 0).all()
    assert (c.sigma.diff() > 0).all()
    k = torch.arange(1, 1000, dtype=torch.float64) / 1000
    before, after = DDPM.path(k - 1e-9), DDPM.path(k + 1e-9)
    torch.testing.assert_close(before.d_alpha, after.d_alpha, rtol=1e-4, atol=1e-6)  # continuous at the timesteps


def test_training_times_are_exact_timesteps():
    t = DDPM.draw_times(100_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    k = DDPM.network_time(t)
    assert (t.dtype, k.dtype) == (torch.float32, torch.float32)
    counts = torch.bincount(k.long(), minlength=1000)
    assert torch.equal(k, k.round())
    assert len(counts) == 1000
    assert 50 < counts.min() <= counts.max() < 160  # 100 are expected
    torch.testing.assert_close(t, (k + 1) / 1000)
    assert DDPM.network_time(torch.tensor([0.0, 0.0004, 0.5, 1.0])).tolist() == [0, 0, 499, 999]


def test_noised_data_is_on_the_path():
    x, noise = normal(5, 2, 3, 3), normal(5, 2, 3, 3, seed=1)
    k = [0, 1, 250, 731, 999]
    t = torch.tensor([(i + 1) / 1000 for i in k])
    for n, i in enumerate(k):
        wanted = BARS[i] ** 0.5 * x[n] + (1 - BARS[i]) ** 0.5 * noise[n]
        torch.testing.assert_close(DDPM.noised(x, noise, t)[n], wanted)
    torch.testing.assert_close(DDPM.noised(x, noise, t), interpolate(DDPM.path, x, noise, t.double())[0])


def test_losses_of_ddpm_equal_literal_loops():
    k = [0, 1, 417, 999]
    x, noise, output = normal(4, 2, 2, 2), normal(4, 2, 2, 2, seed=1), normal(4, 4, 2, 2, seed=2)
    losses = DDPM.losses(output, x, noise, torch.tensor([(i + 1) / 1000 for i in k]))
    mse, vb = oracle.losses(output.numpy(), x.numpy(), noise.numpy(), k)
    assert list(losses) == ["denoising", "vb"]
    np.testing.assert_allclose(losses["denoising"].numpy(), mse, rtol=1e-10)
    np.testing.assert_allclose(losses["vb"].numpy(), vb, rtol=1e-7)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "score"])
def test_flow_matching_passes_t_and_compares_with_the_target(prediction):
    flow = build_process(DiffusionConfig(path="trigonometric", prediction=prediction))
    x, noise, output = (normal(4, 2, 2, 2, seed=s) for s in range(3))
    t = torch.tensor([0.1, 0.35, 0.6, 0.9], dtype=torch.float64)
    sin, cos = (f(torch.pi * t / 2).reshape(4, 1, 1, 1) for f in (torch.sin, torch.cos))
    wanted = {
        "velocity": torch.pi / 2 * (cos * noise - sin * x), "noise": noise, "data": x, "score": -noise / sin
    }[prediction]  # fmt: skip
    losses = flow.losses(output, x, noise, t)
    assert list(losses) == ["denoising"]
    squared = (output - wanted).square() * (sin**2 if prediction == "score" else 1)
    torch.testing.assert_close(losses["denoising"], squared.mean((1, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flow.noised(x, noise, t), cos * x + sin * noise)
    assert torch.equal(flow.network_time(t), t)
    assert flow.prediction == prediction


def trained_on(mean, std):
    """[E[noise | x_t]; v] of data N(mean, std^2), defined only at the trained timesteps."""

    def predict(x, k):
        assert torch.equal(k, k.round())
        assert ((k >= 0) & (k <= 999)).all()
        bar = torch.tensor(BARS, dtype=x.dtype)[k.long()].reshape(-1, 1, 1, 1)
        eps = (1 - bar).sqrt() / (bar * std**2 + 1 - bar) * (x - bar.sqrt() * mean)
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)

    return Denoiser(lambda x, t: predict(x, DDPM.network_time(t)), DDPM.path, DDPM.prediction, dtype=torch.float64)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_flow_samplers_solve_the_probability_flow_of_a_network_of_timesteps(sampler, order):
    """For data N(m, s^2) the flow is x_0 = m + s (x_1 - alpha m) / sqrt(alpha^2 s^2 + sigma^2)."""
    x, bar = normal(50, 1, 1, 1), BARS[-1]
    exact = 1.5 + 0.5 * (x - bar**0.5 * 1.5) / (bar * 0.25 + 1 - bar) ** 0.5
    errors = [
        float((SAMPLERS.build(sampler)(trained_on(1.5, 0.5), x, steps) - exact).abs().max()) for steps in (125, 250)
    ]
    assert errors[1] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


def test_the_sde_ends_in_the_data():
    draws = torch.Generator().manual_seed(3)
    samples = SAMPLERS.build("euler_maruyama:last=0.008")(  # the grid consists of timesteps: (1 - 0.008) / 248 = 0.004
        trained_on(1.5, 0.5), normal(20000, 1, 1, 1), 249,
        lambda like: torch.randn(like.shape, generator=draws, dtype=like.dtype),
    )  # fmt: skip
    assert float(samples.mean()) == pytest.approx(1.5, abs=0.02)
    assert float(samples.std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"objective": "ddmp"}, "'objective' is 'ddmp', but must be 'flow' or 'ddpm'"),
        ({"objective": "ddpm", "path": "vp"}, "path 'vp' applies only to the objective flow, .*: leave it out"),
        ({"objective": "ddpm", "prediction": "noise"}, "prediction 'noise' applies only to the objective flow"),
        ({"objective": "ddpm", "timesteps": "logit_normal"}, "timesteps 'logit_normal' applies only to the objective"),
    ],
)
def test_settings_without_meaning_for_ddpm_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        DiffusionConfig.parse(values)


def test_ddpm_samplers_need_networks_of_timesteps():
    for spec in ("ddpm", "ddim:eta=0.5"):
        assert DiffusionConfig(objective="ddpm").check_sampler(spec) == spec
        with pytest.raises(UserError, match="objective flow: choose one of dopri5, euler, euler_maruyama, heun"):
            DiffusionConfig(prediction="noise").check_sampler(spec)
    for spec in ("euler", "heun:shift=2.0", "euler_maruyama", "mylab.samplers.midpoint"):
        for objective in ("flow", "ddpm"):
            assert DiffusionConfig(objective=objective).check_sampler(spec) == spec


CUT = "uniform:low=0.001,high=0.999"


@pytest.mark.parametrize("weight", ["none", "velocity", "likelihood"])
@pytest.mark.parametrize("prediction", ["noise", "score"])
@pytest.mark.parametrize("path", ["linear", "trigonometric", "vp"])
def test_losses_of_noise_and_score_equal_those_of_sit(path, prediction, weight):
    flow = build_process(DiffusionConfig(path=path, prediction=prediction, timesteps=CUT, loss_weight=weight))
    t = torch.tensor([0.001, 0.02, 0.4, 0.93, 0.999], dtype=torch.float64)
    x, noise, output = (torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    found = flow.losses(output, x, noise, t)["denoising"]
    for n, time in enumerate(t.tolist()):
        wanted = weights.loss(weight, path, prediction, output[n].flatten().tolist(), noise[n].flatten().tolist(), time)
        assert float(found[n]) == pytest.approx(wanted, rel=1e-6)


def test_a_score_is_learned_at_every_time():
    """A network that returns unit noise has loss 1 + sigma^2; the score's own error near t = 0 would be thousands."""
    flow = build_process(DiffusionConfig(prediction="score"))
    stream = torch.Generator().manual_seed(0)
    t = flow.draw_times(4096, stream, torch.device("cpu"))
    x, noise, output = (torch.randn(4096, 1, 4, 4, generator=stream) for _ in range(3))
    assert float(flow.losses(output, x, noise, t)["denoising"].mean()) == pytest.approx(4 / 3, rel=0.02)


def test_the_velocity_weight_gives_the_error_of_the_velocity():
    from repa.diffusion import convert

    flow = build_process(DiffusionConfig(prediction="noise", timesteps=CUT, loss_weight="velocity"))
    t, x, noise, output = (
        torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64),
        normal(3, 1, 2, 2),
        normal(3, 1, 2, 2, seed=1),
        normal(3, 1, 2, 2, seed=2),
    )
    x_t, velocity = interpolate(flow.path, x, noise, t)
    implied = convert(output, x_t, flow.path(t), "noise", "velocity")
    wanted = (implied - velocity).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(flow.losses(output, x, noise, t)["denoising"], wanted, rtol=1e-6, atol=0)


def test_meaningless_or_infinite_weights_are_refused():
    for settings, sentence in [
        ({"prediction": "velocity"}, "weights the errors of noise and score"),
        ({"prediction": "noise", "timesteps": "uniform"}, "infinite at the ends"),
        ({"prediction": "noise", "timesteps": "uniform:low=0.001"}, "infinite at the ends"),
    ]:
        with pytest.raises(UserError, match=sentence):
            DiffusionConfig.parse({"loss_weight": "velocity", "timesteps": CUT, **settings})
    for timesteps, path in (("uniform:low=0.00001", "vp"), ("logit_normal", "linear"), (CUT, "linear")):
        DiffusionConfig(prediction="score", loss_weight="likelihood", timesteps=timesteps, path=path)
    with pytest.raises(UserError, match="loss_weight 'velocity' applies only to the objective flow"):
        DiffusionConfig.parse({"objective": "ddpm", "loss_weight": "velocity"})


def of_golden(golden, *names):
    return [tensor(golden["inputs"][name]) for name in names]


def test_data_prediction_with_a_velocity_loss_equals_that_of_jit():
    golden = load("jit_loss")
    x, noise, predicted = of_golden(golden, "x0", "eps", "x_hat")
    t = 1 - torch.tensor(golden["t_data_time"], dtype=torch.float64)
    process = build_process(DiffusionConfig(prediction="data", loss_weight="velocity"))
    found = process.losses(predicted, x, noise, t)["denoising"]
    assert found.tolist() == pytest.approx(golden["expected"]["per_sample"], rel=1e-9)
    # samplers use the same velocity (x_t - data) / max(t, 0.05)
    denoiser = Denoiser(
        lambda x_t, t: predicted, process.path, "data", dtype=torch.float64, sigma_min=process.sigma_min
    )
    for time in (0.7, 0.03):
        torch.testing.assert_close(denoiser.velocity(noise, time), (noise - predicted) / max(time, 0.05))


def test_contrastive_flow_matching_equals_the_released_code():
    golden = load("cfm_uniform")
    x, noise, predicted = of_golden(golden, "x0", "eps", "v_hat")
    t = torch.tensor(golden["t"], dtype=torch.float64)
    process = build_process(DiffusionConfig(contrastive=0.05))
    found = process.losses(predicted, x, noise, t, process.velocity(x, noise, t).roll(1, 0))
    assert found["denoising"].tolist() == pytest.approx(golden["expected"]["denoising"], rel=1e-9)
    assert float(found["contrastive"].mean()) == pytest.approx(0.05 * golden["expected"]["cfm"], rel=1e-9)
    vectors = [part[:, :, None, None] for part in of_golden(golden, "c0", "eps_c", "c_hat")]
    found = process.losses(vectors[2], *vectors[:2], t, process.velocity(*vectors[:2], t).roll(1, 0))
    assert found["denoising"].tolist() == pytest.approx(golden["expected"]["cls"], rel=1e-9)
    assert float(found["contrastive"].mean()) == pytest.approx(0.05 * golden["expected"]["cfm_cls"], rel=1e-9)


def test_contrastive_flow_matching_can_be_weighted_by_time():
    """SR-DiT's linear weight is t. Its code broadcasts all times over all images; here each image has its own."""
    golden = load("cfm_uniform")
    t = torch.tensor(golden["t"], dtype=torch.float64)
    process = build_process(DiffusionConfig(contrastive=0.05, contrastive_times="linear"))
    for names in (("x0", "eps", "v_hat"), ("c0", "eps_c", "c_hat")):
        x, noise, predicted = (part if part.ndim == 4 else part[:, :, None, None] for part in of_golden(golden, *names))
        found = process.losses(predicted, x, noise, t, process.velocity(x, noise, t).roll(1, 0))["contrastive"]
        for n in range(3):
            distance = (predicted[n] - (noise - x)[n - 1]).square().mean()
            assert float(found[n]) == pytest.approx(-0.05 * golden["t"][n] * float(distance), rel=1e-9)


def test_the_cosine_loss_of_velocities_equals_lightningdits():
    golden = load("velocity_cosine")
    predicted, velocity = of_golden(golden, "v_hat", "v")
    process = build_process(DiffusionConfig(velocity_cosine=1.0))
    zero = torch.zeros_like(velocity)  # noise - data with data = 0
    found = process.losses(predicted, zero, velocity, torch.tensor([0.3, 0.6]))["velocity_cosine"]
    assert float(found.mean()) == pytest.approx(golden["expected"], rel=1e-9)


def test_the_loss_of_a_head_equals_that_of_internal_guidance():
    golden = load("ig_loss")
    x, noise, final, middle = of_golden(golden, "x0", "eps", "v_hat", "v_mid")
    t = torch.tensor(golden["t"], dtype=torch.float64)
    losses = [build_process(DiffusionConfig()).losses(v, x, noise, t)["denoising"] for v in (final, middle)]
    assert losses[0].tolist() == pytest.approx(golden["expected"]["final_per_sample"], rel=1e-9)
    assert losses[1].tolist() == pytest.approx(golden["expected"]["mid_per_sample"], rel=1e-9)
    assert float((losses[0] + 0.5 * losses[1]).mean()) == pytest.approx(golden["expected"]["total"], rel=1e-9)


@pytest.mark.parametrize(
    "config",
    [{}, {"prediction": "data", "loss_weight": "velocity"}, {"velocity_cosine": 1.0}, {"contrastive": 0.1},
     {"contrastive": 0.1, "contrastive_times": "linear"}, {"prediction": "noise", "path": "trigonometric"}],
)  # fmt: skip
def test_equal_times_per_pixel_equal_one_time_per_image(config):
    process = build_process(DiffusionConfig(**config))
    x, noise, output, other = (normal(3, 2, 4, 4, seed=seed) for seed in range(4))
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    spread = t[:, None, None, None].expand(3, 1, 4, 4)
    other = other if config.get("contrastive") else None
    torch.testing.assert_close(process.noised(x, noise, t), process.noised(x, noise, spread))
    one, many = (process.losses(output, x, noise, times, other) for times in (t, spread))
    assert one.keys() == many.keys()
    for name, loss in one.items():
        torch.testing.assert_close(loss, many[name])


def test_velocity_terms_need_a_velocity_prediction():
    for setting in ({"contrastive": 0.1}, {"velocity_cosine": 1.0}):
        for prediction in ("noise", "data"):
            with pytest.raises(UserError, match="data with loss_weight velocity"):
                DiffusionConfig.parse({"prediction": prediction, **setting})
        assert DiffusionConfig.parse({"prediction": "data", "loss_weight": "velocity", **setting})
        with pytest.raises(UserError, match="the objective is ddpm"):
            DiffusionConfig.parse({"objective": "ddpm", **setting})
