"""The objective against the paper's Eqs. 1, 4, 8 and 9 in loops, and its random draws."""

import math

import pytest
import torch

from repa.alignment import Alignment
from repa.alignment.config import AlignmentConfig
from repa.base.device import autocast
from repa.base.errors import UserError
from repa.diffusion.config import DiffusionConfig
from repa.encoders.contract import Features
from repa.models import Condition, build_model
from repa.training import Objective
from repa.training.config import StreamConfig
from repa.training.objective import select_samples
from tests.calls import call


def make(alignments=(), label_dropout=0.1, seed=0, **diffusion) -> Objective:
    torch.manual_seed(0)
    model = build_model("SiT-S/2", latent_size=4, latent_channels=2, num_classes=3, hidden_dim=16, depth=2, num_heads=2)
    for p in model.parameters():  # with the zero initialisation every prediction would be 0
        torch.nn.init.normal_(p, std=0.3)
    terms = [Alignment.of(config, model, {"tiny": 5}) for config in alignments]
    return Objective(model, terms, DiffusionConfig(**diffusion), label_dropout=label_dropout, seed=seed)


def batch(num=6):
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(num, 2, 4, 4, generator=stream)
    features = {"tiny": Features(torch.randn(num, 4, 5, generator=stream), None)}
    return x, torch.randint(3, (num,), generator=stream), features


def losses_of(objective, x, labels, features, step=0):
    return objective(
        {"x": x}, Condition(labels), features, objective.draw({"x": x}, step), objective.weights(step, x.device)
    )


COSINE = AlignmentConfig(target="tiny", depth=2, weight=0.7, projector="linear")


def test_the_total_is_equation_9_written_out():
    objective = make([COSINE])
    x, labels, features = batch()
    losses = losses_of(objective, x, labels, features, step=3)
    draws = objective.draw({"x": x}, 3)
    for n in range(len(x)):
        t = float(draws.t[n])
        x_t = (1 - t) * x[n] + t * draws.noise["x"][n]
        label = 3 if draws.dropped[n] else int(labels[n])
        output = call(objective.model, x_t[None], torch.tensor([t]), torch.tensor([label]), (2,))
        error = output.prediction[0] - (draws.noise["x"][n] - x[n])
        denoising = sum(float(e) ** 2 for e in error.detach().flatten()) / error.numel()
        projected = objective.alignments["tiny@2"].projector(output.hidden[2])[0]
        similarity = 0.0
        for z, y in zip(projected, features["tiny"].patches[n], strict=True):
            norms = math.sqrt(float(z @ z)) * math.sqrt(float(y @ y))
            similarity += float(z @ y) / norms / len(projected)
        assert float(losses.terms["denoising"][n]) == pytest.approx(denoising, rel=1e-4)
        assert float(losses.terms["alignment/tiny@2"][n]) == pytest.approx(-similarity, abs=1e-5)
        assert float(losses.total[n]) == pytest.approx(denoising - 0.7 * similarity, rel=1e-4)


@pytest.mark.parametrize(("path", "d_alpha", "d_sigma"), [
    ("linear", lambda t: -1.0, lambda t: 1.0),
    ("trigonometric", lambda t: -math.pi / 2 * math.sin(math.pi * t / 2), lambda t: math.pi / 2 * math.cos(math.pi * t / 2)),
])  # fmt: skip
def test_the_velocity_target_follows_the_path(path, d_alpha, d_sigma):
    objective = make(path=path)
    torch.nn.init.zeros_(objective.model.final_layer.linear.weight)
    # for a prediction of 0 the loss is the target's mean square
    torch.nn.init.zeros_(objective.model.final_layer.linear.bias)
    x, labels, _ = batch()
    losses, draws = losses_of(objective, x, labels, {}), objective.draw({"x": x}, 0)
    for n, t in enumerate(draws.t.tolist()):
        target = d_alpha(t) * x[n] + d_sigma(t) * draws.noise["x"][n]
        assert float(losses.total[n].detach()) == pytest.approx(float(target.square().mean()), rel=1e-5)


def test_draws_depend_only_on_seed_and_step():
    x, _, _ = batch()
    a, b = make().draw({"x": x}, 5), make().draw({"x": x}, 5)
    assert torch.equal(a.noise["x"], b.noise["x"])
    assert torch.equal(a.t, b.t)
    assert not torch.equal(a.noise["x"], make().draw({"x": x}, 6).noise["x"])
    assert not torch.equal(a.noise["x"], make(seed=1).draw({"x": x}, 5).noise["x"])


def test_labels_are_dropped_at_the_configured_rate():
    x = torch.zeros(20_000, 1, 1, 1)
    for rate in (0.0, 0.1, 1.0):
        assert float(make(label_dropout=rate).draw({"x": x}, 0).dropped.float().mean()) == pytest.approx(rate, abs=0.01)


def test_measuring_moves_the_projector_but_not_the_network():
    objective = make([COSINE.override(measure_only=True)])
    x, labels, features = batch()
    alone = make()
    losses_of(objective, x, labels, features).total.mean().backward()
    losses_of(alone, x, labels, {}).total.mean().backward()
    for (name, p), q in zip(objective.model.named_parameters(), alone.model.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, msg=name)
    assert all(p.grad.abs().sum() > 0 for p in objective.alignments.parameters())
    groups = objective.clipping_groups()
    assert len(groups) == 2
    assert {id(p) for p in groups[1]} == {id(p) for p in objective.alignments.parameters()}


def test_an_encoder_with_weight_zero_is_not_needed():
    objective = make([COSINE.override(schedule="stop:step=10")])
    assert [need.encoder for need in objective.needs(9)] == ["tiny"]
    assert objective.needs(10) == ()
    x, labels, _ = batch()
    losses = losses_of(objective, x, labels, {}, step=10)
    assert set(losses.terms) == {"denoising"}
    losses.total.mean().backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)  # else DDP would wait forever


def test_half_precision_keeps_norms_and_losses_in_float32():
    """In float16, squares of tokens of this size overflow, and sums of many small errors vanish."""
    objective = make([COSINE])
    x, labels, features = batch()
    large = {"tiny": Features(3000 * features["tiny"].patches, None)}
    exact = losses_of(objective, x, labels, large)
    for precision, tolerance in (("fp16", 2e-2), ("bf16", 1e-1)):
        with autocast(x.device, precision):
            tokens = {
                "tiny": Features(large["tiny"].patches.half() if precision == "fp16" else large["tiny"].patches, None)
            }
            losses = losses_of(objective, x, labels, tokens)
        assert losses.total.dtype == torch.float32
        assert all(term.dtype == torch.float32 for term in losses.terms.values())
        torch.testing.assert_close(losses.total, exact.total, rtol=tolerance, atol=tolerance)
        objective.zero_grad()
        losses.total.mean().backward()
        assert all(p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)


def test_a_micro_batch_has_the_draws_of_its_samples():
    objective = make([COSINE])
    x, labels, features = batch()
    draws, weights = objective.draw({"x": x}, 2), objective.weights(2, x.device)
    whole = objective({"x": x}, Condition(labels), features, draws, weights)
    part = slice(2, 4)
    tokens = {"tiny": Features(features["tiny"].patches[part], None)}
    losses = objective({"x": x[part]}, Condition(labels[part]), tokens, select_samples(draws, part), weights)
    torch.testing.assert_close(losses.total, whole.total[part])


def test_weights_follow_the_schedules_of_the_alignments():
    falling = COSINE.override(schedule="linear:steps=10")
    objective = make([COSINE.override(depth=1), falling])
    assert objective.weights(5, torch.device("cpu")).tolist() == pytest.approx([1.0, 0.7, 0.35])
    assert make().weights(5, torch.device("cpu")).tolist() == [1.0]


@pytest.mark.parametrize("token_times", [0.0, 0.25])
def test_contrastive_terms_use_the_previous_image_of_the_global_batch(token_times, monkeypatch):
    """This holds for one process and for two, and micro-batches keep the neighbours of their images."""
    objective = make(contrastive=0.2, token_times=token_times)
    x, labels, _ = batch()
    whole = objective.draw({"x": x}, 3)
    expected = (whole.noise["x"] - x).roll(1, 0)  # the linear path's velocity does not depend on time
    assert torch.equal(whole.other["x"], expected)
    losses = losses_of(objective, x, labels, {}, step=3)
    assert (losses.terms["contrastive"] < 0).all()
    torch.testing.assert_close(losses.total, losses.terms["denoising"] + losses.terms["contrastive"])
    assert torch.equal(select_samples(whole, slice(2, 4)).other["x"], expected[2:4])
    last = x[[2, 5]]  # of each of two processes
    monkeypatch.setattr("repa.base.dist.world", lambda: 2)
    monkeypatch.setattr("repa.base.dist.gather", lambda rows: last)
    for rank in (0, 1):
        monkeypatch.setattr("repa.base.dist.rank", lambda rank=rank: rank)
        part = slice(3 * rank, 3 * rank + 3)
        assert torch.equal(objective.draw({"x": x[part]}, 3).other["x"], expected[part])
    assert make().draw({"x": x}, 0).other is None


def test_a_stream_needs_an_encoder_with_pooled_features():
    objective = make()
    objective.streams = (StreamConfig(source="tiny"),)
    x, _, features = batch()
    with pytest.raises(UserError, match="the encoder tiny has none"):
        objective.clean(x, features)
