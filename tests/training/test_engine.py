"""The objective gives the numbers of version 1129c31, which had one kind of alignment; and later features.

`tests/golden/engine.json` holds the losses, gradients (sums of magnitudes) and weights of that version, float32 on a
CPU.
"""

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from repa.alignment import Alignment, AlignmentConfig
from repa.diffusion.config import DiffusionConfig
from repa.encoders.contract import Features
from repa.models import Backbone, Condition, DiT, Output, Tap, TwoTimes
from repa.models.config import Route
from repa.training import Objective
from repa.training.config import StreamConfig
from repa.training.objective import Draws
from tests import golden

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/engine.json").read_text(encoding="utf-8"))
CASES = {
    "repa": ([{"target": "tiny", "depth": 2, "projector": "mlp:width=24"}], {}, 16),
    "ntxent": ([{"target": "tiny", "depth": 1, "projector": "linear", "loss": "nt_xent:temperature=0.1"}], {}, 16),
    "irepa": (
        [{"target": "tiny", "depth": 3, "projector": "conv", "token_norm": "zscore:alpha=0.6", "weight": 1.0}], {}, 25
    ),
    "two": (
        [
            {"target": "tiny", "depth": 2, "schedule": "cosine:steps=10"},
            {"target": "tiny", "depth": 3, "measure_only": True},
        ],
        {"path": "trigonometric", "prediction": "data", "timesteps": "logit_normal"},
        16,
    ),
    "ddpm": ([{"target": "tiny", "depth": 2, "schedule": "stop:step=2"}], {"objective": "ddpm"}, 16),
    "none": ([], {}, 16),
}  # fmt: skip


def network(**settings) -> DiT:
    torch.manual_seed(0)
    sizes = {"latent_size": 8, "latent_channels": 4, "patch_size": 2, "hidden_dim": 32, "depth": 4, "num_heads": 2}
    model = DiT(**{**sizes, "num_classes": 5, **settings})
    for p in model.parameters():  # without the zero initialisation
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.02)
    return model


def objective_of(model, terms, diffusion, dims, **settings) -> Objective:
    alignments = []
    for number, term in enumerate(terms):
        torch.manual_seed(10 + number)
        alignments.append(Alignment.of(AlignmentConfig(**term), model, dims))
    return Objective(model, alignments, DiffusionConfig(**diffusion), label_dropout=0.3, seed=3, **settings)


def images(num=6):
    stream = torch.Generator().manual_seed(1)
    x, labels = torch.randn(num, 4, 8, 8, generator=stream), torch.randint(5, (num,), generator=stream)
    return x, Condition(labels), stream


def step_of(objective, x, condition, features, step, average=None):
    clean = objective.clean(x, features)
    draws = objective.draw(clean, step)
    averaged = objective.averaged(average, clean, condition, draws) if average else None
    return objective(clean, condition, features, draws, objective.weights(step, x.device), averaged)


class Fixed(Backbone):
    """Returns the same tensors for every input."""

    hidden_dim, depth, grid, prefix_tokens = 6, 1, (2, 2), 1
    num_classes, null_label, blocks = 1, 1, ()
    state_shapes: ClassVar = {"x": (4, 4, 4), "class": (6,)}

    def __init__(self, prediction, tokens):
        super().__init__()
        self.prediction, self.tokens = prediction, tokens

    def forward(self, state, t, condition, taps=(), keep=None, **path):
        return Output(self.prediction, dict.fromkeys(taps, self.tokens), {})

    def null(self, like):
        return like

    def matrices(self):
        return []


def on_the_cosine_path(t, given):
    """The values of `reg_loss_linear` with data cos(pi t / 2) and noise sin(pi t / 2), one number at a time."""
    h, wanted = math.pi / 2, {"align": golden.load("reg_loss_linear")["expected"]["align"]}
    for key, clean, noise, found in (("denoising", "x0", "eps", "v_hat"), ("cls", "c0", "eps_c", "c_hat")):
        errors = []
        for n, time in enumerate(t.tolist()):
            triples = zip(*(given[name][n].flatten().tolist() for name in (clean, noise, found)), strict=True)
            squares = [(v + h * math.sin(h * time) * x - h * math.cos(h * time) * e) ** 2 for x, e, v in triples]
            errors.append(sum(squares) / len(squares))
        wanted[f"{key}_per_sample"] = errors
    means = [sum(wanted[f"{key}_per_sample"]) / len(t) for key in ("denoising", "cls")]
    return {**wanted, "total": means[0] + 0.03 * means[1] + 0.5 * wanted["align"]}


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_the_loss_of_reg_equals_the_released_code(path):
    """Latents and vector share their times, and all tokens with the vector's are aligned; weights 0.5 and 0.03."""
    case = golden.load("reg_loss_linear")
    given = {name: golden.tensor(formula) for name, formula in case["inputs"].items()}
    t = torch.tensor(case["t"], dtype=torch.float64)
    wanted = case["expected"] if path == "linear" else on_the_cosine_path(t, given)
    model = Fixed({"x": given["v_hat"], "class": given["c_hat"]}, given["z_tilde"])
    term = AlignmentConfig(target="tiny:part=all", depth=1, projector="none", name="tiny")
    objective = Objective(
        model, [Alignment.of(term, model, {"tiny": 6})], DiffusionConfig(path=path), label_dropout=0.0,
        seed=0, streams=[StreamConfig(source="tiny", weight=0.03)],
    )  # fmt: skip
    clean, noise = {"x": given["x0"], "class": given["c0"]}, {"x": given["eps"], "class": given["eps_c"]}
    features = {"tiny": Features(given["z"][:, 1:], given["z"][:, 0])}
    draws = Draws(t, noise, torch.zeros(2, dtype=torch.bool))
    losses = objective(clean, Condition(torch.zeros(2).long()), features, draws, objective.weights(0, t.device))
    assert losses.terms["denoising"].tolist() == pytest.approx(wanted["denoising_per_sample"], rel=1e-9)
    assert losses.terms["stream/class"].tolist() == pytest.approx(wanted["cls_per_sample"], rel=1e-9)
    assert float(losses.terms["alignment/tiny"].mean()) == pytest.approx(wanted["align"], rel=1e-9)
    assert float(losses.total.mean()) == pytest.approx(wanted["total"], rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_weights_match_the_recorded_version(case):
    terms, diffusion, tokens = CASES[case]
    model = network(learn_sigma=case == "ddpm")
    objective = objective_of(model, terms, diffusion, {"tiny": 20})
    x, condition, stream = images()
    patches = torch.randn(6, tokens, 20, generator=stream)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    for step, wanted in enumerate(GOLDEN[case]["rows"]):
        features = {need.encoder: Features(patches, None) for need in objective.needs(step)}
        losses = step_of(objective, x, condition, features, step)
        losses.total.mean().backward()
        assert float(losses.total.detach().mean()) == pytest.approx(wanted["loss"], rel=1e-6)
        found = {name: float(term.double().abs().sum()) for name, term in losses.terms.items()}
        assert found == pytest.approx(wanted["terms"], rel=1e-6)
        gradients = sum(float(p.grad.double().abs().sum()) for p in objective.parameters() if p.grad is not None)
        assert gradients == pytest.approx(wanted["gradients"], rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    weights = sum(float(p.detach().double().abs().sum()) for p in objective.parameters())
    assert weights == pytest.approx(GOLDEN[case]["end"], rel=1e-6)


def test_all_kinds_of_target_together_train_every_parameter():
    """With a stream, a head and five targets, every parameter has a gradient, and the total is the weighted sum."""
    model = network(streams={"class": 20}, heads=(2,))
    terms = [
        {"target": "tiny:part=all", "depth": 2, "projector": "linear"},
        {"target": "tiny:part=attention,layer=1", "tap": "attention", "depth": 1, "projector": "none", "loss": SQUARED},
        {"target": "block:depth=4", "depth": 3, "projector": "none", "weight": 0.2},
        {"target": "ema:depth=4,earlier=0.2", "depth": 2, "projector": "linear", "weight": 0.3},
        {"target": "latent", "depth": 1, "projector": "linear", "resample": "target"},
    ]
    streams = [StreamConfig(source="tiny")]
    objective = objective_of(model, terms, {}, {"tiny": 20}, streams=streams, head_weight=0.4)
    x, condition, stream = images()
    (need,) = objective.needs(0)
    assert need == ("tiny", True, (1,))
    patches, pooled = torch.randn(6, 16, 20, generator=stream), torch.randn(6, 20, generator=stream)
    logits = torch.randn(6, 2, 16, 16, generator=stream)
    features = {"tiny": Features(patches, pooled, {1: logits})}
    average = network(streams={"class": 20}, heads=(2,))
    losses = step_of(objective, x, condition, features, 0, average)
    weights = {"denoising": 1.0, "head/2": 0.4, "stream/class": 0.03}
    weights |= {f"alignment/{a.config.key}": a.config.weight for a in objective.alignments.values()}
    assert weights.keys() == losses.terms.keys()
    torch.testing.assert_close(losses.total, sum(weight * losses.terms[name] for name, weight in weights.items()))
    losses.total.mean().backward()
    unreached = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == []
    assert all(p.grad is None for p in average.parameters())


SQUARED = f"{__name__}.squared"


def squared(student, target):
    """The mean squared difference of two tensors (N, ...) -> (N,)."""
    return (student - target).square().flatten(1).mean(1)


def test_the_averaged_network_sees_less_noise():
    model = network()
    terms = [{"target": "ema:depth=4,earlier=0.25", "depth": 2, "projector": "linear"}]
    objective = objective_of(model, terms, {}, {})
    x, _, _ = images(num=2000)
    draws = objective.draw({"x": x}, 0)
    less = draws.t - draws.t_averaged
    assert (less >= 0).all()
    assert float(less.max()) <= 0.25
    assert float(less[draws.t > 0.25].mean()) == pytest.approx(0.125, abs=0.01)


def test_two_times_per_image_go_to_a_quarter_and_the_rest_of_the_tokens():
    model = network(separate_times=True)
    terms = [{"target": "ema:depth=4,cleanest=true", "depth": 2, "projector": "linear"}]
    objective = objective_of(model, terms, {"token_times": 0.25}, {})
    x, condition, _ = images()
    draws = objective.draw({"x": x}, 0)
    assert draws.t.of_tokens().shape == (6, 16)
    for times in draws.t.of_tokens():
        _, counts = times.unique(return_counts=True)
        assert sorted(counts.tolist()) == [4, 12]
    assert torch.equal(draws.t_averaged, draws.t.of_tokens().amin(1))
    losses = step_of(objective, x, condition, {}, 0, network())
    assert losses.total.isfinite().all()


def test_the_averaged_network_sees_the_same_token_groups_at_earlier_times():
    terms = [{"target": "ema:depth=4,earlier=0.25", "depth": 2, "projector": "linear"}]
    objective = objective_of(network(), terms, {"token_times": 0.25}, {})
    draws = objective.draw({"x": images(num=400)[0]}, 0)
    less = draws.t.values - draws.t_averaged.values
    assert torch.equal(draws.t.second, draws.t_averaged.second)
    assert (less >= 0).all()
    assert float(less.max()) <= 0.25
    assert not torch.allclose(less[:, 0], less[:, 1])


@pytest.mark.parametrize(
    "settings", [{}, {"separate_times": True}, {"separate_times": True, "route": Route(2, 3, 0.5)}]
)
def test_two_times_per_image_equal_one_time_per_token(settings):
    """Two modulations per image and a choice per token equal one modulation per token in all outputs and gradients."""
    model = network(heads=(4,), **settings).double()
    keep = torch.arange(1, 16, 2).expand(6, -1) if "route" in settings else None
    x, condition, stream = images()
    second = torch.rand(6, 16, generator=stream) < 0.75
    two = TwoTimes(torch.rand(6, 2, generator=stream).double(), second)
    found = []
    for t in (two, two.of_tokens()):
        output = model({"x": x.double()}, t, condition, (Tap(3), Tap(2, "attention")), keep)
        total = sum(part.square().sum() for part in (*output.taps.values(), *output.heads.values()))
        gradients = torch.autograd.grad(total + output.prediction["x"].square().sum(), list(model.parameters()))
        found.append((output.prediction["x"], *output.taps.values(), output.heads[4], *gradients))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_two_equal_times_equal_one_time():
    model = network().double()
    x, condition, _ = images()
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    two = TwoTimes(t[:, None].expand(-1, 2), torch.arange(16).expand(6, -1) > 5)
    one, both = (model({"x": x.double()}, times, condition).prediction["x"] for times in (t, two))
    torch.testing.assert_close(one, both, rtol=0, atol=1e-12)


def test_equal_token_times_equal_one_image_time():
    model = network(separate_times=True).double()
    x, condition, _ = images()
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    one = model({"x": x.double()}, t, condition).prediction["x"]
    each = model({"x": x.double()}, t[:, None].expand(-1, 16), condition).prediction["x"]
    torch.testing.assert_close(one, each, rtol=0, atol=1e-10)


def test_tokens_of_another_time_group_have_no_influence():
    """Changing the latents of one group of tokens does not change the prediction of the other group."""
    model = network(separate_times=True)
    x, condition, _ = images()
    first = torch.zeros(16, dtype=torch.bool)
    first[:4] = True  # the top row of patches
    t = torch.where(first, 0.2, 0.7).expand(6, -1)
    changed = x.clone()
    changed[:, :, :2] += 1.0
    a, b = (model({"x": value}, t, condition).prediction["x"] for value in (x, changed))
    assert torch.equal(a[:, :, 2:], b[:, :, 2:])
    assert not torch.equal(a[:, :, :2], b[:, :, :2])


def test_attention_taps_are_the_logits_of_the_attention():
    model = network(depth=1, streams={"class": 3})
    x, condition, stream = images()
    state = {"x": x, "class": torch.randn(6, 3, generator=stream)}
    taps = (Tap(1, "attention"), Tap(1))
    output = model(state, torch.rand(6), condition, taps)
    assert output.taps[Tap(1, "attention")].shape == (6, 2, 16, 16)
    assert output.taps[Tap(1)].shape == (6, 17, 32)
    assert output.prediction["class"].shape == (6, 3)


@pytest.mark.parametrize("latent_size", [(8, 4), (4, 8)])
def test_rectangular_latents_and_patches_of_one_pixel_train(latent_size):
    model = network(latent_size=latent_size, patch_size=1)
    assert model.grid == latent_size
    terms = [{"target": "tiny", "depth": 2, "projector": "conv"}]
    objective = objective_of(model, terms, {}, {"tiny": 20})
    x = torch.randn(3, 4, *latent_size)
    features = {"tiny": Features(torch.randn(3, 8, 20), None)}  # a grid of 4 x 2 or 2 x 4, resampled to the network's
    losses = step_of(objective, x, Condition(torch.zeros(3, dtype=torch.int64)), features, 0)
    losses.total.mean().backward()
    assert losses.total.isfinite().all()
