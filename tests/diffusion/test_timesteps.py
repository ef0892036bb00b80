"""Training times and sampling grids."""

import math

import pytest
import torch

from repa.base.errors import UserError
from repa.diffusion import (
    PATHS,
    TIMESTEPS,
    DiffusionConfig,
    build_process,
    latent_shift,
    ode_grid,
    sde_grid,
    time_shift,
)  # fmt: skip
from tests.golden import load


def draw(spec, num=20000):
    return TIMESTEPS.build(spec)(num, generator=torch.Generator().manual_seed(0), device="cpu")


def test_uniform_times_are_uniform():
    t = draw("uniform").sort().values
    assert t.shape == (20000,)
    assert t.dtype == torch.float32
    assert (t - torch.linspace(0, 1, 20000)).abs().max() < 0.015  # Kolmogorov-Smirnov, p < 1e-3


def test_uniform_times_stay_within_the_interval():
    t = draw("uniform:low=0.2,high=0.7")
    torch.testing.assert_close(t, 0.2 + 0.5 * draw("uniform"))
    assert 0.2 <= float(t.min()) < 0.201
    assert 0.699 < float(t.max()) < 0.7
    for spec in ("uniform:low=0.5,high=0.5", "uniform:low=-0.1", "uniform:high=1.1"):
        with pytest.raises(UserError, match="0 <= low < high <= 1"):
            TIMESTEPS.build(spec)


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_logit_normal_is_a_log_normal_noise_to_signal_ratio_on_its_path(path):
    c = PATHS.build(path)(draw(f"logit_normal:mean=0.4,std=0.7,path={path}").double())
    log_ratio = torch.log(c.sigma / c.alpha)
    assert float(log_ratio.mean()) == pytest.approx(0.4, abs=0.02)
    assert float(log_ratio.std()) == pytest.approx(0.7, abs=0.02)


def test_logit_normal_equals_the_references_lognormal():
    generator = torch.Generator().manual_seed(5)
    ratio = torch.randn(8, generator=generator).exp()
    for spec, expected in (
        ("logit_normal", ratio / (1 + ratio)),
        ("logit_normal:path=trigonometric", 2 / math.pi * torch.atan(ratio)),
    ):
        torch.testing.assert_close(TIMESTEPS.build(spec)(8, torch.Generator().manual_seed(5)), expected)


def test_times_depend_only_on_the_generator():
    assert torch.equal(draw("uniform", 5), draw("uniform", 5))
    sample, generator = TIMESTEPS.build("uniform"), torch.Generator().manual_seed(0)
    assert not torch.equal(sample(5, generator), sample(5, generator))


def test_the_shift_moves_times_towards_noise_and_keeps_the_ends():
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(time_shift(t, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    # the shift multiplies the noise-to-signal ratio of the linear path
    log_ratio = torch.logit(time_shift(draw("logit_normal"), 2.0).double())
    assert float(log_ratio.mean()) == pytest.approx(math.log(2), abs=0.02)


def test_shifts_equal_those_of_the_released_code():
    golden = load("time_shift")
    t = torch.tensor(golden["expected"]["t"], dtype=torch.float64)
    for shift, expected in golden["expected"]["values"].items():
        assert time_shift(t, float(shift)).tolist() == pytest.approx(expected, rel=1e-9)
        from_data = (1 - t) / ((1 - t) + t * float(shift))  # LightningDiT's formula, where t = 1 is data
        assert (1 - from_data).tolist() == pytest.approx(expected, rel=1e-9)
    for name, shape in {"rae_dinov2b_s": (768, 16, 16), "raev2_dinov3l_s": (1024, 16, 16), "srdit_invae_s": (32, 16, 16),
                        "sdvae_f8d4_s": (4, 32, 32)}.items():  # fmt: skip
        assert latent_shift(shape) == pytest.approx(golden["expected"][name], rel=1e-9)
    assert latent_shift((3, 32, 32), base=3072) == 1


def test_one_setting_shifts_training_times_and_sampling_grids():
    config = DiffusionConfig(shift="auto", timesteps="logit_normal").for_latents((16, 32, 32))
    assert config.shift == 2
    process, cpu = build_process(config), torch.device("cpu")
    plain = build_process(DiffusionConfig(timesteps="logit_normal"))
    times, unshifted = (p.draw_times(50, torch.Generator().manual_seed(0), cpu) for p in (process, plain))
    assert torch.equal(times, time_shift(unshifted, 2.0))
    assert DiffusionConfig(shift="auto").for_latents((3, 8, 8)).shift == 1  # auto never shifts below 1
    with pytest.raises(UserError, match="shape of the latents"):
        build_process(DiffusionConfig(shift="auto"))


def test_an_inverse_shift_is_refused_with_the_right_value():
    with pytest.raises(UserError, match=r"3\.333"):
        DiffusionConfig.parse({"shift": 0.3})
    for shift in (0, -1, float("nan"), "automatic"):
        with pytest.raises(UserError, match="shift"):
            DiffusionConfig.parse({"shift": shift})
    for spec in ("logit_normal:std=0", "logit_normal:mean=left", "logit_normal:path=vp", "uniform:low=1"):
        with pytest.raises(UserError):
            TIMESTEPS.build(spec)


def test_grids_equal_those_of_the_reference():
    assert ode_grid(5).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0], abs=1e-15)
    assert sde_grid(5).tolist() == pytest.approx([1, 0.76, 0.52, 0.28, 0.04, 0], abs=1e-15)
    full = sde_grid(250)
    assert len(full) == 251
    assert float(full[0] - full[1]) == pytest.approx(0.96 / 249)
    assert sde_grid(3, last=0.1).tolist() == pytest.approx([1, 0.55, 0.1, 0])
    assert ode_grid(2, shift=3.0).tolist() == pytest.approx([1, 0.75, 0])
    assert sde_grid(2, last=0.5, shift=3.0).tolist() == pytest.approx([1, 0.75, 0])
    assert ode_grid(4).dtype == sde_grid(4).dtype == torch.float64


@pytest.mark.parametrize("call", [lambda: ode_grid(0), lambda: ode_grid(2.5), lambda: sde_grid(4, last=1.0)])
def test_impossible_grids_are_refused(call):
    with pytest.raises(UserError):
        call()
