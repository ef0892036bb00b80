"""Learning rates in closed form, Muon against its iteration written out, and skipped steps."""

import math
import os
import signal

import pytest
import torch

from repa.alignment import Alignment
from repa.alignment.config import AlignmentConfig
from repa.base.errors import UserError
from repa.diffusion.config import DiffusionConfig
from repa.models import build_model
from repa.runs import read_metrics
from repa.runs.checkpoint import OwnedTensor
from repa.training import Objective, OptimizerConfig, TrainConfig
from repa.training.state import build_optimizer, load_named_state, named_state
from repa.training.update import clip, learning_rate, set_learning_rate, step_unless_skipped
from tests.oracles.muon import orthogonalised

GOOD, SKIPPED = torch.zeros(()), torch.ones(())
muon_too = pytest.mark.parametrize("name", ["adamw", "muon"])


def make(name: str, precision: str = "fp32", **settings):
    torch.manual_seed(0)
    size = {"hidden_dim": 16, "depth": 2, "num_heads": 2}
    model = build_model("SiT-S/2", latent_size=4, latent_channels=2, num_classes=3, **size)
    alignment = Alignment.of(AlignmentConfig(target="tiny", depth=1, projector="linear"), model, {"tiny": 5})
    objective = Objective(model, [alignment], DiffusionConfig(), label_dropout=0.1, seed=0)
    for p in objective.parameters():
        torch.nn.init.normal_(p, std=0.1)
    config = TrainConfig(optimizer=OptimizerConfig(name=name, learning_rate=0.01, **settings), precision=precision)
    return objective, build_optimizer(objective, config)


def gradients(objective, seed: int, value: float | None = None) -> None:
    stream = torch.Generator().manual_seed(seed)
    for p in objective.parameters():
        p.grad = torch.randn(p.shape, generator=stream)
        if value is not None:
            p.grad.view(-1)[0] = value


def weights(objective) -> list[torch.Tensor]:
    return [p.detach().clone() for p in objective.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_learning_rate_warms_up_and_follows_its_schedule():
    def rates(**settings):
        settings = OptimizerConfig(learning_rate=0.1, **settings)
        return [learning_rate(settings, 12, step) for step in range(12)]

    assert rates() == [0.1] * 12
    assert rates(warmup_steps=4) == pytest.approx([0.025, 0.05, 0.075, *[0.1] * 9])
    linear = rates(warmup_steps=4, schedule="linear")
    assert linear == pytest.approx([0.025, 0.05, 0.075, 0.1, *(0.1 * (1 - k / 8) for k in range(8))])
    cosine = rates(schedule="cosine")
    assert cosine == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 12)) for k in range(12)])
    assert cosine[6] == pytest.approx(0.05)
    assert rates(warmup_steps=100)[11] == pytest.approx(0.1 * 12 / 100)


@pytest.mark.parametrize("size", [0.01, 30.0])
def test_clipping_in_the_optimizer_equals_clipping_before_it(size):
    """Three AdamW steps that scale gradients while reading them, against torch's clipping before the step."""
    found = []
    for fused in (True, False):
        objective, optimizer = make("adamw")
        for seed in range(3):
            gradients(objective, seed)
            for p in objective.parameters():
                p.grad *= size / 100
            if fused:
                [norm] = clip(optimizer, [list(objective.parameters())], 1.0)
            else:
                norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            step_unless_skipped(GOOD, optimizer)
            assert not hasattr(optimizer, "grad_scale")
            found.append(norm)
        found.append(weights(objective))
    assert torch.equal(torch.stack(found[:3]), torch.stack(found[4:7]))
    assert (found[0] > 1) == (size > 1)
    for a, b in zip(found[3], found[7], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_groups_with_separate_norms_are_clipped_before_the_step():
    objective, optimizer = make("adamw")
    gradients(objective, 1)
    first, *rest = objective.parameters()
    wanted = first.grad / first.grad.norm()
    norms = clip(optimizer, [[first], rest], 1.0)
    assert len(norms) == 2
    torch.testing.assert_close(first.grad, wanted, rtol=1e-4, atol=1e-6)
    assert not hasattr(optimizer, "grad_scale")


def test_the_learning_rate_scales_the_step():
    moved = []
    for rate in (0.01, 0.03):
        objective, optimizer = make("adamw")
        before = weights(objective)
        gradients(objective, 1)
        set_learning_rate(optimizer, rate)
        step_unless_skipped(GOOD, optimizer)
        moved.append([new - old for new, old in zip(weights(objective), before, strict=True)])
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-3, atol=1e-6)


def test_muon_updates_attention_and_mlp_matrices_and_adamw_the_rest():
    objective, optimizer = make("muon")
    names = {p: name for name, p in objective.named_parameters()}
    muon, adamw = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    inside = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert muon == {f"model.blocks.{block}.{part}.weight" for block in (0, 1) for part in inside}
    assert muon | adamw == set(names.values())
    assert not muon & adamw


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02)])
def test_muon_steps_along_the_orthogonalised_momentum(precision, tolerance):
    """Two steps against the iteration in float64; all other parameters are updated as by AdamW alone."""
    objective, optimizer = make("muon", precision, weight_decay=0.1)
    plain, adamw = make("adamw", weight_decay=0.1)
    names = [name for name, _ in objective.named_parameters()]
    momentum = {}
    for seed in (1, 2):
        before = dict(zip(names, weights(objective), strict=True))
        for each, other in ((objective, optimizer), (plain, adamw)):
            gradients(each, seed)
            step_unless_skipped(GOOD, other)
        for name, p in objective.named_parameters():
            if p.ndim != 2 or "blocks" not in name or "adaln" in name.lower():
                continue
            momentum[name] = 0.95 * momentum.get(name, 0.0) + 0.05 * p.grad.double()
            direction = orthogonalised(0.05 * p.grad.double() + 0.95 * momentum[name])
            wanted = before[name] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(max(p.shape)) * direction
            moved = (wanted - before[name]).norm()
            assert (p.detach() - wanted).norm() < tolerance * moved, name
    rest = dict(plain.named_parameters())
    assert len(momentum) == 8
    for name, p in objective.named_parameters():
        assert torch.equal(p, rest[name]) == (name not in momentum), name


def test_muon_in_bf16_equals_torchs_bit_for_bit():
    objective, optimizer = make("muon", "bf16", weight_decay=0.1)
    other, _ = make("muon", "bf16")
    reference = torch.optim.Muon(other.model.matrices(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in (1, 2, 3):
        gradients(objective, seed)
        gradients(other, seed)
        step_unless_skipped(GOOD, optimizer)
        reference.step()
    assert same(objective.model.matrices(), other.model.matrices())


@muon_too
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_leaves_no_trace(name, first):
    objective, optimizer = make(name, weight_decay=0.1)
    other, reference = make(name, weight_decay=0.1)
    for seed, skipped in ((1, first), (2, False), (3, True), (4, False)):
        gradients(objective, seed, float("nan") if skipped else None)
        before = weights(objective)
        step_unless_skipped(SKIPPED if skipped else GOOD, optimizer)
        assert same(before, weights(objective)) == skipped
        if not skipped:
            gradients(other, seed)
            reference.step()
    assert same(weights(objective), weights(other))
    mine, yours = named_state(optimizer, objective), named_state(reference, other)
    assert mine.keys() == yours.keys()
    for key, value in mine.items():
        assert torch.equal(value, yours[key]), key


@muon_too
def test_four_steps_equal_two_a_restart_and_two(name):
    whole, optimizer = make(name)
    halves, first = make(name)
    for seed in (1, 2):
        for each, other in ((whole, optimizer), (halves, first)):
            gradients(each, seed)
            step_unless_skipped(GOOD, other)
    saved = {key: value.clone() for key, value in named_state(first, halves).items()}
    again, second = make(name)
    again.load_state_dict(halves.state_dict())
    load_named_state(second, again, {key: OwnedTensor(value, 0) for key, value in saved.items()})
    for seed in (3, 4):
        for each, other in ((whole, optimizer), (again, second)):
            gradients(each, seed)
            set_learning_rate(other, 0.02)
            step_unless_skipped(GOOD, other)
    assert same(weights(whole), weights(again))


def test_muon_is_refused_where_it_is_unsupported():
    with pytest.raises(UserError, match="parallel fsdp shards them"):
        TrainConfig.parse({"optimizer": {"name": "muon"}, "parallel": "fsdp"})
    objective, _ = make("adamw")
    objective.model.matrices = list  # as for a private network
    with pytest.raises(UserError, match="muon needs matrices"):
        build_optimizer(objective, TrainConfig(optimizer=OptimizerConfig(name="muon")))


@muon_too
def test_a_run_uses_the_learning_rates_that_it_logs(name, tiny_config, run_training, tmp_path):
    settings = OptimizerConfig(name=name, learning_rate=0.002, warmup_steps=2, schedule="linear")
    config, taken = tiny_config.override(num_steps=6, save_every=6, optimizer=settings.model_dump()), []

    def progress(state):
        taken.append({group["lr"] for group in state.optimizer.param_groups})
        if state.step == 4 and len(taken) == 4:
            os.kill(os.getpid(), signal.SIGTERM)  # to be resumed at the same place of the schedule

    while len(taken) < 6:
        run_training(config, tmp_path / "r", progress=progress)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "r") if row["kind"] == "train"]
    assert taken == [{rate} for rate in rates]
    assert rates == pytest.approx([0.001, 0.002, 0.002, 0.0015, 0.001, 0.0005])
