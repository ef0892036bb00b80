"""Improved DDPM against published constants, literal loops, and Gaussians with a known reverse chain."""

import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.diffusion import GUIDANCES, PATHS, SAMPLERS, CountedCalls, Denoiser, ImprovedDDPM, guided
from tests.calls import passes
from tests.oracles import ddpm as oracle

PROCESS = ImprovedDDPM()


def in_timesteps(network):
    """Wrap a network of timesteps k as a network of our t, below guidance, so that intervals keep their meaning."""
    return lambda x, t, *rest: network(x, PROCESS.network_time(t), *rest)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_schedule_matches_published_constants():
    assert PROCESS.alpha_bar.dtype == np.float64
    assert PROCESS.alpha_bar[[0, 500, 999]] == pytest.approx([0.9999, 0.0777966584, 4.0358298e-5], rel=1e-8)
    np.testing.assert_allclose(PROCESS.betas, oracle.BETAS, rtol=1e-12)
    assert PROCESS.alpha_bar == pytest.approx(np.array(oracle.alpha_bars(oracle.BETAS)), rel=1e-10)


def test_fewer_timesteps_reach_the_same_noise():
    assert ImprovedDDPM(100).alpha_bar[-1] == pytest.approx(PROCESS.alpha_bar[-1], rel=0.7)
    assert ImprovedDDPM(100).alpha_bar[-1] < 1e-4


def test_respacing_to_250_steps_keeps_the_noise_levels():
    spaced = PROCESS.respaced(250)
    assert spaced.timesteps[:4].tolist() == [0, 4, 8, 12]
    assert spaced.timesteps[-5:].tolist() == [983, 987, 991, 995, 999]
    assert spaced.betas[[0, 1, -1]] == pytest.approx([1e-4, 5.99066e-4, 0.0775193], rel=1e-5)
    np.testing.assert_allclose(spaced.alpha_bar, PROCESS.alpha_bar[spaced.timesteps], rtol=1e-14)
    np.testing.assert_allclose(np.cumprod(1 - spaced.betas), spaced.alpha_bar, rtol=1e-10)
    assert spaced.respaced(2).timesteps.tolist() == [0, 999]


def test_ddim_stride_is_an_integer():
    assert PROCESS.respaced(50, integer_stride=True).timesteps[[0, 1, -1]].tolist() == [0, 20, 980]
    with pytest.raises(UserError, match="divisor"):
        PROCESS.respaced(300, integer_stride=True)
    for num_steps in (1, 1001, 2.5):
        with pytest.raises(UserError, match="2 to 1000"):
            PROCESS.respaced(num_steps)
    with pytest.raises(UserError, match="more than 20"):
        ImprovedDDPM(20)


def test_q_sample_matches_its_formula():
    x, eps = noise(3, 2, 2, 2), noise(3, 2, 2, 2, seed=1)
    x_t = PROCESS.q_sample(x, eps, torch.tensor([0, 500, 999]))
    for n, bar in enumerate((0.9999, 0.0777966584, 4.0358298e-5)):
        torch.testing.assert_close(x_t[n], bar**0.5 * x[n] + (1 - bar) ** 0.5 * eps[n], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(PROCESS.q_sample(x, eps, 500)[1], x_t[1])
    torch.testing.assert_close(PROCESS.data(eps, x_t, torch.tensor([0, 500, 999])), x)


def test_losses_equal_literal_loops():
    t = [0, 1, 2, 417, 999, 0]
    x, eps, output = noise(6, 2, 2, 2), noise(6, 2, 2, 2, seed=1), noise(6, 4, 2, 2, seed=2)
    x[5] *= 3  # puts some elements beyond +-0.999, where the bins are open
    output[5, :2] = eps[5] + 0.1 * output[5, :2]
    mse, vb = PROCESS.hybrid_losses(output, x, eps, torch.tensor(t))
    expected_mse, expected_vb = oracle.losses(output.numpy(), x.numpy(), eps.numpy(), t)
    np.testing.assert_allclose(mse.numpy(), expected_mse, rtol=1e-10)
    np.testing.assert_allclose(vb.numpy(), expected_vb, rtol=1e-7)


def test_the_variational_bound_trains_only_the_variance():
    output = noise(4, 4, 2, 2).requires_grad_()
    mse, vb = PROCESS.hybrid_losses(
        output, noise(4, 2, 2, 2, seed=1), noise(4, 2, 2, 2, seed=2), torch.tensor([0, 3, 500, 999])
    )
    (gradient,) = torch.autograd.grad(vb.sum(), output, retain_graph=True)
    assert (gradient[:, :2] == 0).all()
    assert (gradient[:, 2:] != 0).any()
    (gradient,) = torch.autograd.grad(mse.sum(), output)
    assert (gradient[:, :2] != 0).all()
    assert (gradient[:, 2:] == 0).all()


def test_low_precision_outputs_are_compared_in_float32():
    x = torch.zeros(2, 1, 2, 2)
    mse, vb = PROCESS.hybrid_losses(torch.zeros(2, 2, 2, 2, dtype=torch.bfloat16), x, x + 1, torch.tensor([0, 9]))
    assert mse.dtype == vb.dtype == torch.float32
    assert mse.tolist() == [1, 1]


def test_networks_receive_the_trained_timesteps():
    for num_steps in (250, 1000):
        spaced, seen = PROCESS.respaced(num_steps), []
        network = in_timesteps(lambda x, k, seen=seen: seen.append(k) or x)
        for k in range(num_steps):
            network(torch.zeros(1), torch.tensor([spaced.time(k)], dtype=torch.float32))
        assert torch.cat(seen).tolist() == spaced.timesteps.tolist()  # exactly


def test_vp_is_the_continuous_limit_of_ddpm():
    t = torch.tensor([PROCESS.time(k) for k in (0, 99, 500, 999)], dtype=torch.float64)
    alpha_bar = PROCESS.alpha_bar[[0, 99, 500, 999]]
    np.testing.assert_allclose(PATHS.build("vp")(t).alpha.numpy() ** 2, alpha_bar, rtol=0.1)
    received = []
    in_timesteps(lambda x, k: received.append(k.item()) or x)(torch.zeros(1), torch.tensor([0.50055]))
    assert received == pytest.approx([499.55], abs=1e-3)  # times between timesteps are not rounded


def exact_noise(mean, std, v):
    """[E[noise | x_t]; v] of data N(mean, std^2), as a network of timesteps."""
    bars = torch.tensor(PROCESS.alpha_bar)

    def predict(x, k, *labels):
        bar = bars[k.long()].reshape(-1, 1, 1, 1)
        eps = (1 - bar).sqrt() / (bar * std**2 + 1 - bar) * (x - bar.sqrt() * mean)
        return torch.cat([eps, torch.full_like(eps, v)], dim=1)

    return predict


def denoiser(predict):
    return Denoiser(in_timesteps(predict), PATHS.build("vp"), "noise", dtype=torch.float64)


def test_ancestral_sampling_of_unit_gaussian_data_is_exact_with_the_upper_variance():
    """For data N(1.5, 1) every step has unit variance, and the reverse steps have variance beta: v = 1."""
    draws = torch.Generator().manual_seed(3)
    samples = SAMPLERS.build("ddpm")(
        denoiser(exact_noise(1.5, 1.0, 1.0)),
        noise(20000, 1, 1, 1),
        50,
        lambda like: torch.randn(like.shape, generator=draws, dtype=like.dtype),
    )
    assert float(samples.mean()) == pytest.approx(1.5, abs=0.03)
    assert float(samples.std()) == pytest.approx(1.0, abs=0.02)


def test_ancestral_sampling_of_one_point_is_exact():
    """Data at one point m has reverse variance beta~ (v = -1), and x_t is N(sqrt(alpha_bar) m, 1 - alpha_bar)."""
    seen = {}
    exact = exact_noise(1.5, 0.0, -1.0)

    def predict(x, k):
        seen[int(k[0])] = x
        return exact(x, k)

    draws = torch.Generator().manual_seed(3)
    samples = SAMPLERS.build("ddpm")(
        denoiser(predict),
        noise(20000, 1, 1, 1),
        25,
        lambda like: torch.randn(like.shape, generator=draws, dtype=like.dtype),
    )
    torch.testing.assert_close(samples, torch.full_like(samples, 1.5))
    timesteps = PROCESS.respaced(25).timesteps
    assert sorted(seen) == timesteps.tolist()
    for k in timesteps[[1, 5, 12, 20]]:
        bar = PROCESS.alpha_bar[k]
        assert float(seen[k].mean()) == pytest.approx(1.5 * bar**0.5, abs=0.03)
        assert float(seen[k].std()) == pytest.approx((1 - bar) ** 0.5, rel=0.03)


def test_ddim_maps_gaussians_affinely_and_needs_no_noise():
    x = noise(6, 1, 1, 1)

    def no_noise(like):
        raise AssertionError

    bar = PROCESS.alpha_bar[PROCESS.respaced(200, integer_stride=True).timesteps[-1]]
    scale = 0.5 / (bar * 0.25 + 1 - bar) ** 0.5  # the probability flow from the start of the chain
    exact = 1.5 + scale * (x - bar**0.5 * 1.5)
    errors = [
        float((SAMPLERS.build("ddim")(denoiser(exact_noise(1.5, 0.5, 0.0)), x, steps, no_noise) - exact).abs().max())
        for steps in (100, 200)
    ]
    assert errors[1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.25)  # first order


def test_ddim_with_eta_one_is_ancestral_with_the_lower_variance():
    x, spaced = noise(3, 1, 1, 1), PROCESS.respaced(2, integer_stride=True)
    draw = noise(3, 1, 1, 1, seed=5)
    got = SAMPLERS.build("ddim:eta=1.0")(denoiser(exact_noise(1.5, 0.5, -1.0)), x, 2, lambda like: draw)
    state = x
    for k in (1, 0):
        output = exact_noise(1.5, 0.5, -1.0)(state, torch.full((3,), float(spaced.timesteps[k])))
        mean, log_variance = spaced.p_mean_log_variance(output, state, k)
        state = mean + (0.5 * log_variance).exp() * draw if k else mean
    torch.testing.assert_close(got, state)


def test_guidance_follows_dit_with_an_interval_in_our_time():
    """Only the first channel is guided, and at noisy times the batch is not doubled."""
    rows = {}

    def network(x, k, labels):
        rows[int(k[0])] = len(labels)
        return labels.double().reshape(-1, 1, 1, 1).expand(-1, 4, *x.shape[2:])

    predict = guided(
        passes(in_timesteps(network), torch.tensor([1, 2]), 0), [GUIDANCES.build("cfg:scale=3,high=0.5,channels=1")]
    )
    calls = CountedCalls(predict)
    model = Denoiser(calls, PATHS.build("vp"), "noise", dtype=torch.float64)
    output = model.output(noise(2, 2, 1, 1), PROCESS.time(10))
    assert output[:, :, 0, 0].tolist() == [[3, 1, 1, 1], [6, 2, 2, 2]]
    assert SAMPLERS.build("ddpm")(model, noise(2, 2, 1, 1), 20, torch.zeros_like).shape == (2, 2, 1, 1)
    assert calls.calls == 1 + 20
    assert all(count == (4 if (k + 1) / 1000 <= 0.5 else 2) for k, count in rows.items())
    assert len(rows) == 21


def test_invalid_input_is_refused():
    linear = PATHS.build("linear")
    with pytest.raises(UserError, match="predicts velocity"):
        SAMPLERS.build("ddpm")(Denoiser(lambda x, t: x, linear), noise(1, 1, 1, 1), 4)
    with pytest.raises(UserError, match="learn_sigma=True"):
        SAMPLERS.build("ddpm")(Denoiser(lambda x, t: x, linear, "noise"), noise(1, 1, 1, 1), 4)
    with pytest.raises(UserError, match="'eta'.*is 2"):
        SAMPLERS.build("ddim:eta=2")(Denoiser(lambda x, t: x, linear, "noise"), noise(1, 1, 1, 1), 4)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_every_step_reports_its_prediction_of_the_data(name):
    """For a network that returns x_t, the predicted data is (x_t - sigma x_t) / alpha."""
    steps = []
    denoiser = Denoiser(lambda x, t: torch.cat([x, x], 1), PROCESS.path, "noise", dtype=torch.float64)
    SAMPLERS.build(name)(denoiser, noise(2, 1, 1, 1), 5, torch.zeros_like, steps.append)
    assert [(step.index, step.done) for step in steps] == [(i, pytest.approx((i + 1) / 5)) for i in range(5)]
    for step in steps:
        bar = PROCESS.alpha_bar[round(step.t * 1000) - 1]
        torch.testing.assert_close(step.data, step.x * (1 - (1 - bar) ** 0.5) / bar**0.5)
