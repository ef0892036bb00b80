"""torch.compile traces the whole step: no graph breaks, no recompilation between steps, the same numbers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from repa.alignment import Alignment
from repa.base.device import autocast
from repa.diffusion.config import DiffusionConfig
from repa.encoders.contract import Features
from repa.models import Condition, build_model
from repa.training import Objective
from tests.training.test_objective import COSINE, losses_of

CPU = torch.device("cpu")


def make(alignment, checkpointed=False, **diffusion) -> Objective:
    torch.manual_seed(0)
    name = "DiT-S/2" if diffusion.get("objective") == "ddpm" else "SiT-S/2"
    model = build_model(name, latent_size=4, latent_channels=2, num_classes=3, hidden_dim=16, depth=2, num_heads=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.checkpoint_activations = checkpointed
    return Objective(
        model, [Alignment.of(alignment, model, {"tiny": 5})], DiffusionConfig(**diffusion), label_dropout=0.3, seed=0
    )


def batch(num=6):
    stream = torch.Generator().manual_seed(1)
    features = {"tiny": Features(torch.randn(num, 4, 5, generator=stream), None)}
    return torch.randn(num, 2, 4, 4, generator=stream), torch.randint(3, (num,), generator=stream), features


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")  # traces like every backend and runs the traced graph
    torch._dynamo.reset()


@pytest.mark.parametrize(("precision", "off"), [("fp32", 2**-20), ("bf16", 2**-8)])
@pytest.mark.parametrize(
    ("settings", "alignment"),
    [
        ({}, COSINE.override(schedule="linear:steps=10")),
        ({"path": "vp", "prediction": "noise"}, COSINE.override(loss="nt_xent", token_norm="zscore")),
        ({"path": "trigonometric"}, COSINE.override(measure_only=True)),
        ({"contrastive": 0.1, "velocity_cosine": 1.0, "shift": 2.0, "token_times": 0.25}, COSINE),
        ({"prediction": "data", "loss_weight": "velocity", "contrastive": 0.1}, COSINE),
    ],
)
def test_the_objective_is_one_graph_compiled_once(settings, alignment, precision, off, counter):
    """`off` is the rounding error of GELU, which has another formula when compiled for a CPU."""
    objective = make(alignment, **settings)
    compiled = torch.compile(objective, backend=counter, fullgraph=True)  # raises at a graph break
    x, labels, features = batch()
    for step in (0, 1, 5):  # with other draws and another weight
        with autocast(CPU, precision):
            mine = losses_of(objective, x, labels, features, step)
            theirs = compiled(
                {"x": x}, Condition(labels), features, objective.draw({"x": x}, step), objective.weights(step, CPU)
            )
        mine.total.sum().backward()
        wanted = [p.grad.clone() for p in objective.parameters() if p.requires_grad]
        objective.zero_grad()
        theirs.total.sum().backward()
        assert mine.terms.keys() == theirs.terms.keys()
        torch.testing.assert_close(theirs.total, mine.total, rtol=off, atol=off)
        for p, value in zip((p for p in objective.parameters() if p.requires_grad), wanted, strict=True):
            assert (p.grad - value).norm() <= off * value.norm() + 1e-6
        objective.zero_grad()
    assert counter.frame_count == 1


def test_ddpm_and_a_weight_that_becomes_zero_compile_without_graph_breaks(counter):
    objective = make(COSINE.override(schedule="stop:step=2"), objective="ddpm")
    compiled = torch.compile(objective, backend=counter, fullgraph=True)
    x, labels, features = batch()
    frames = []
    for step in range(5):
        tokens = features if objective.needs(step) else {}
        losses = compiled(
            {"x": x}, Condition(labels), tokens, objective.draw({"x": x}, step), objective.weights(step, CPU)
        )
        torch.testing.assert_close(losses.total, losses_of(objective, x, labels, tokens, step).total)
        frames.append(counter.frame_count)
    assert frames[4] == frames[2]  # compiled once more without the alignment, then never again


def test_recomputed_blocks_are_part_of_the_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")  # the plain eager backend does not support recomputed regions
    plain, objective = make(COSINE), make(COSINE, checkpointed=True)
    compiled = torch.compile(objective, backend=counter, fullgraph=True)
    x, labels, features = batch()
    with autocast(CPU, "bf16"):
        losses_of(plain, x, labels, features).total.sum().backward()
        losses = compiled({"x": x}, Condition(labels), features, objective.draw({"x": x}, 0), objective.weights(0, CPU))
    losses.total.sum().backward()
    assert counter.frame_count == 1
    for (name, p), q in zip(plain.named_parameters(), objective.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.slow
def test_the_default_backend_gives_the_gradients_of_the_eager_step():
    torch._dynamo.reset()
    objective, (x, labels, features) = make(COSINE), batch()
    losses_of(objective, x, labels, features).total.sum().backward()
    wanted = [p.grad.clone() for p in objective.parameters() if p.requires_grad]
    objective.zero_grad()
    objective.compile(fullgraph=True)  # in place, as in the loop, so names stay
    losses_of(objective, x, labels, features).total.sum().backward()
    assert not any(name.startswith("_orig_mod") for name in objective.state_dict())
    for p, value in zip((p for p in objective.parameters() if p.requires_grad), wanted, strict=True):
        # Sums in another order: the rounding of a small gradient is that of the large ones it was summed from.
        torch.testing.assert_close(p.grad, value, rtol=0, atol=1e-5 * float(value.abs().max()))
