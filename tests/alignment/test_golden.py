"""Losses, projectors and norms against values recorded from the methods' released code in float64 (`tests/golden/`)."""

import pytest
import torch

from repa.alignment import LOSSES, PROJECTORS, TIME_WEIGHTS, TOKEN_NORMS, Alignment, AlignmentConfig
from tests import golden


def test_haste_attention_equals_the_released_code():
    case = golden.load("haste_attention")
    student, target = golden.tensor(case["inputs"]["S"]), golden.tensor(case["inputs"]["U"])
    loss = LOSSES.build("attention_ce:heads=12")
    pairs = [((1 + 0.1 * k) * student, (1 + 0.05 * (k + 4)) * target) for k in range(4, 8)]
    found = sum(float(loss(*pair).mean()) for pair in pairs) / 4
    assert found == pytest.approx(case["expected"]["attn_loss"], rel=1e-9)
    z, z_tilde = (golden.tensor(case["feature_inputs"][name]) for name in ("z", "z_tilde"))
    features = float(LOSSES.build("cosine")(z_tilde, z).mean())
    assert features == pytest.approx(case["expected"]["feature_loss"], rel=1e-9)


def test_layersync_equals_the_released_code():
    case = golden.load("layersync")
    shallow, deep = (golden.tensor(case["inputs"][name]) for name in ("shallow", "deep_detached"))
    assert float(LOSSES.build("cosine")(shallow, deep).mean()) == pytest.approx(case["expected"]["reg"], rel=1e-9)


def test_urepa_equals_the_released_code():
    case = golden.load("urepa")
    student, target = (golden.tensor(case["inputs"][name]) for name in ("student", "teacher"))
    wanted = case["expected"]
    cosine = float(LOSSES.build("cosine")(student, target).mean())
    sample, batch = (float(LOSSES.build(f"gram:scope={s}")(student, target).mean()) for s in ("sample", "batch"))
    assert cosine == pytest.approx(wanted["cosine"], rel=1e-9)
    assert sample == pytest.approx(wanted["manifold_within_sample"], rel=1e-9)
    assert batch == pytest.approx(wanted["manifold_over_batch"], rel=1e-9)
    assert 0.5 * (cosine + 3 * sample) == pytest.approx(wanted["total_lambda_0_5_w_3"], rel=1e-9)


def test_irepa_equals_the_released_code():
    case = golden.load("irepa")
    target, hidden, weight, bias = (
        golden.tensor(case["inputs"][name]) for name in ("target", "hidden", "conv_weight", "conv_bias")
    )
    for alpha, wanted in case["expected"]["zscore"].items():
        golden.check(TOKEN_NORMS.build(f"zscore:alpha={alpha}")(target), wanted)
    projector = PROJECTORS.build("conv:kernel=3")(5, 4, (3, 3)).double()
    projector.conv.load_state_dict({"weight": weight, "bias": bias})
    golden.check(projector(hidden), case["expected"]["projected"])
    loss = LOSSES.build("cosine")(projector(hidden), TOKEN_NORMS.build("zscore:alpha=0.6")(target))
    assert loss.mean().item() == pytest.approx(case["expected"]["align_loss_alpha_0_6"], rel=1e-9)


def test_the_sra_head_equals_the_released_code():
    case = golden.load("sra_head")
    head = PROJECTORS.build("mlp2")(6, 6).double()
    golden.fill([head[0].bias, head[0].weight, head[2].bias, head[2].weight])  # in the order of their official names
    golden.check(head(golden.tensor(case["inputs"])), case["expected"])


def test_sra_with_two_times_equals_the_released_code():
    case = golden.load("sra_dts_as")
    velocity, wanted_velocity, student, target = (
        golden.tensor(case["inputs"][name]) for name in ("v_tokens", "target_tokens", "student", "teacher")
    )
    wanted = case["expected"]
    by_tokens = float(LOSSES.build("cosine:axis=tokens")(student, target).mean())
    assert 1 + by_tokens == pytest.approx(wanted["align_as_released_dim1_tokens"]["sum"] / 12, rel=1e-9)
    by_channels = float(LOSSES.build("cosine")(student, target).mean())
    assert 1 + by_channels == pytest.approx(wanted["align_over_channels_recommended"], rel=1e-9)
    denoising = LOSSES.build("mse")(velocity, wanted_velocity)
    assert denoising.tolist() == pytest.approx(wanted["denoising_per_sample"], rel=1e-9)


def test_the_vavae_vf_loss_equals_the_released_code():
    """VA-VAE's tokenizer loss consists of terms that exist here: relations with a margin, and the cosine."""
    case = golden.load("vavae_vf")
    own, target = (golden.tensor(case["inputs"][name]).mT for name in ("z_proj", "f"))  # (2, 4, 6)
    wanted = case["expected"]
    for margin, name in ((0, "mdms_0"), (0.25, "mdms_0_25")):
        found = float(LOSSES.build(f"gram:norm=l1,margin={margin}")(own, target).mean())
        assert found == pytest.approx(wanted[name], rel=1e-9)
    for margin, name in ((0, "mcos_0"), (0.5, "mcos_0_5")):  # the released loss is ours plus 1 - margin
        found = 1 - margin + float(LOSSES.build(f"cosine:margin={margin}")(own, target).mean())
        assert found == pytest.approx(wanted[name], rel=1e-9)


def test_self_transcendence_equals_the_released_code():
    case = golden.load("self_transcendence")
    conditional, null, projected = (golden.tensor(case["inputs"][name]) for name in ("cond", "uncond", "projected"))
    target = null + case["cfg"] * (conditional - null)
    golden.check(target, case["expected"]["target"])
    assert float(LOSSES.build("mse")(projected, target).mean()) == pytest.approx(case["expected"]["mse"], rel=1e-9)


def test_reed_equals_the_released_code():
    case = golden.load("reed")
    inputs = {name: golden.tensor(formula) for name, formula in case["inputs"].items()}
    wanted, cosine = case["expected"]["constant"], LOSSES.build("cosine")
    image = float(cosine(inputs["z_img_tilde"], inputs["z_img"]).mean())
    text = float(cosine(inputs["z_txt_tilde"][:, None], inputs["z_txt"][:, None]).mean())
    assert image == pytest.approx(wanted["img_proj_loss"], rel=1e-9)
    assert text == pytest.approx(wanted["text_proj_loss"], rel=1e-9)
    assert case["weights"][0] * image + case["weights"][1] * text == pytest.approx(wanted["proj_loss"], rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [("distance=1", "d1_unnormalised_paper"), ("distance=1,normalize=true", "d1_tau1"), ("distance=0", "d0"),
     ("distance=2,normalize=true", "d2_tau1_cumulative"),
     ("distance=2,normalize=true,cumulative=false", "d2_tau1_adjacent")],
)  # fmt: skip
def test_crepa_equals_the_released_code(settings, wanted):
    case = golden.load("crepa")
    student, target = (golden.tensor(case["inputs"][name]).flatten(1, 2) for name in ("projected", "features"))
    found = LOSSES.build(f"crepa:frames=4,{settings}")(student, target)
    assert found.shape == (2,)
    assert float(found.mean()) == pytest.approx(case["expected"][wanted], rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "loglinear", "cosine", "sigmoid"])
def test_reeds_weights_over_time_apply_to_each_image(name):
    """The released code multiplies the mean weight by the mean loss; here each image is weighted by its own time."""
    case = golden.load("reed")
    inputs = {key: golden.tensor(formula) for key, formula in case["inputs"].items()}
    t, cosine = torch.tensor(case["t"], dtype=torch.float64), LOSSES.build("cosine")
    image = cosine(inputs["z_img_tilde"], inputs["z_img"])
    text = cosine(inputs["z_txt_tilde"][:, None], inputs["z_txt"][:, None])
    losses, weights = case["weights"][0] * image + case["weights"][1] * text, TIME_WEIGHTS.build(name)(t)
    released = float(weights.mean() * losses.mean())
    assert released == pytest.approx(case["expected"][name]["proj_loss"], rel=1e-9)
    assert float((weights * losses).mean()) != pytest.approx(released, rel=1e-3)


def test_reeds_cut_off_in_time_is_a_time_interval():
    """Of the times 0.2 and 0.6 the released cut-off at 0.3 counts one, and so does the time interval of a term."""
    case = golden.load("reed")
    own, target = (golden.tensor(case["inputs"][name]) for name in ("z_img_tilde", "z_img"))
    config = AlignmentConfig(target="features", depth=1, projector="none", times=(0.0, case["cutoffs"][0]))
    term, loss = Alignment(config, own.shape[2], own.shape[2]), LOSSES.build("cosine")(own, target)
    found = term.at_times(loss, torch.tensor(case["t"], dtype=torch.float64))
    assert found.tolist() == [float(loss[0]), 0.0]
    share = float((found != 0).double().mean())
    assert share * case["expected"]["constant"]["proj_loss"] == pytest.approx(case["expected"]["cutoff"]["proj_loss"])


def test_dispersive_equals_the_formula_written_out():
    """The published PyTorch form: the log of the mean over all pairs, including the zero diagonal."""
    z = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = [[float(((a - b) ** 2).sum()) / 12 for b in z] for a in z]
    for temperature in (1.0, 0.5):
        wanted = torch.tensor(pairs, dtype=torch.float64).div(-temperature).exp().mean().log()
        found = LOSSES.build(f"dispersive:temperature={temperature}")(z, None)
        assert found.shape == (5,)
        torch.testing.assert_close(found, wanted.expand(5))


def test_token_relation_distillation_equals_the_formula_written_out():
    stream = torch.Generator().manual_seed(0)
    student, target = (torch.randn(2, 5, width, dtype=torch.float64, generator=stream) for width in (3, 4))
    found = LOSSES.build("gram:norm=l1,margin=0.1")(student, target)
    for n in range(2):
        total = 0.0
        for i in range(5):
            for j in range(5):
                own, wanted = (
                    float(u[n, i] @ u[n, j]) / float(u[n, i].norm() * u[n, j].norm()) for u in (student, target)
                )
                total += max(abs(own - wanted) - 0.1, 0.0) / 25
        assert float(found[n]) == pytest.approx(total, rel=1e-9)


def test_smooth_l1_equals_torchs():
    a, b = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.smooth_l1_loss(a, b, beta=0.05)
    torch.testing.assert_close(LOSSES.build("smooth_l1:beta=0.05")(a, b).mean(), wanted)
