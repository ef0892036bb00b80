"""Runs whose blocks skip tokens: taps, compilation, accumulation, several processes, and two stages."""

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from repa.alignment import Alignment, AlignmentConfig
from repa.base.errors import UserError
from repa.cli.main import run as repa
from repa.data import open_data
from repa.diffusion.config import DiffusionConfig
from repa.encoders.contract import Features
from repa.models import Condition, Tap, build, load_exported
from repa.models.config import ModelConfig, Route
from repa.models.routing import placeholder
from repa.performance.counts import activation_bytes, flops_per_image, saved_bytes
from repa.performance.estimate import passes_of
from repa.runs import layout, load_checkpoint, load_run, read_metrics
from repa.training import Objective, TrainConfig, train
from repa.training.log import flops_of
from repa.training.objective import select_samples
from tests.training.processes import run_all
from tests.training.test_engine import images, network
from tests.training.test_objective import losses_of

CPU = torch.device("cpu")
TREAD, SPRINT = Route(2, 3, 0.5), Route(2, 3, 0.25, 2, "fuse", 0.4)
SPRINTED = {"depth": 4, "route": (2, 3), "keep": 0.25, "keep_groups": 2, "merge": "fuse", "path_drop": 0.3}


def objective(route, *terms, **diffusion) -> Objective:
    model = network(route=route)
    alignments = [Alignment.of(AlignmentConfig(**term), model, {"tiny": 24}) for term in terms]
    return Objective(model, alignments, DiffusionConfig(**diffusion), label_dropout=0.3, seed=3)


def features(num=6, tokens=16):
    return {"tiny": Features(torch.randn(num, tokens, 24, generator=torch.Generator().manual_seed(2)), None)}


def term(**settings):
    return {"target": "tiny", "depth": 2, "projector": "linear", **settings}


# alignments


@pytest.mark.parametrize(("norm", "num"), [("none", 16), ("zscore:alpha=0.6", 16), ("none", 64), ("none", 4)])
def test_a_tap_in_the_route_is_compared_at_the_kept_tokens(norm, num):
    """Even if the encoder has as many tokens as are kept: its 4 tokens are a 2 x 2 grid, not the kept tokens."""
    subject, (x, condition, _) = objective(SPRINT, term(token_norm=norm)), images()
    (alignment,) = subject.alignments.values()
    draws = subject.draw({"x": x}, 0)
    assert draws.keep.shape == (6, 4)
    found = losses_of(subject, x, condition.labels, features(tokens=num)).terms["alignment/tiny@2"]
    state = subject._noised({"x": x}, draws.noise, draws.t)
    output = subject.model(
        state, draws.t, subject._condition(condition, draws), (Tap(2),), draws.keep, draws.path_dropped
    )
    whole = features(tokens=num)["tiny"].patches
    side = int(num**0.5)
    maps = whole.mT.unflatten(2, (side, side))
    if num != 16:
        how = {"mode": "area"} if num > 16 else {"mode": "bilinear", "align_corners": False}
        maps = torch.nn.functional.interpolate(maps, (4, 4), **how)
    target = maps.flatten(2).mT
    if norm != "none":
        target = (target - 0.6 * target.mean(1, keepdim=True)) / (target.std(1, keepdim=True) + 1e-6)
    for n in range(6):
        of_tokens = [
            -torch.nn.functional.cosine_similarity(
                alignment.projector(output.taps[Tap(2)][n, k]), target[n, place], dim=0
            )
            for k, place in enumerate(draws.keep[n])
        ]
        torch.testing.assert_close(found[n], torch.stack(of_tokens).mean().detach())


@pytest.mark.parametrize(("own", "other"), [(1, 3), (2, 3), (2, 4), (3, 1), (1, 4)])
def test_two_taps_are_compared_at_the_tokens_they_share(own, other):
    subject, (x, condition, _) = (
        objective(TREAD, term(target=f"block:depth={other}", depth=own, projector="none")),
        images(),
    )
    draws = subject.draw({"x": x}, 0)
    (found,) = (v for k, v in losses_of(subject, x, condition.labels, {}).terms.items() if k.startswith("alignment"))
    taps = Tap(own), Tap(other)
    state = subject._noised({"x": x}, draws.noise, draws.t)
    seen = subject.model(state, draws.t, subject._condition(condition, draws), taps, draws.keep).taps
    if 2 <= own <= 3 or 2 <= other <= 3:
        places = draws.keep[:, :, None].expand(-1, -1, 32)
        seen = {tap: x.gather(1, places) if x.shape[1] == 16 else x for tap, x in seen.items()}
    wanted = -torch.nn.functional.cosine_similarity(*(seen[tap] for tap in taps), dim=2).mean(1)
    torch.testing.assert_close(found, wanted.detach())


def test_the_averaged_network_sees_all_tokens():
    subject, (x, condition, _) = objective(SPRINT, term(target="ema:depth=3,earlier=0.2")), images()
    draws = subject.draw({"x": x}, 0)
    averaged = subject.averaged(network(route=SPRINT), {"x": x}, condition, draws)
    assert averaged.taps[Tap(3)].shape == (6, 16, 32)
    losses = subject({"x": x}, condition, {}, draws, subject.weights(0, CPU), averaged)
    assert losses.total.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projector": "conv"}, "the projector conv needs all"),
        ({"loss": "nt_xent"}, "the loss nt_xent, which compares places of several images, needs all"),
        ({"resample": "target"}, "resample target needs all"),
        ({"target": "tiny:part=attention,layer=1", "tap": "attention", "loss": "attention_ce", "projector": "none"}, "tap attention"),
        ({"target": "block:depth=3", "depth": 1, "loss": "dispersive", "projector": "none"}, "the loss dispersive"),
    ],
)  # fmt: skip
def test_terms_that_need_all_tokens_are_refused_only_in_the_route(settings, message):
    with pytest.raises(UserError, match=message):
        objective(TREAD, term(**settings))
    objective(TREAD._replace(keep=1.0), term(**settings))
    if not settings.get("depth"):
        objective(TREAD, term(**settings, depth=4) if "depth" not in settings else term(**settings))


# one step


@pytest.mark.parametrize("route", [TREAD, SPRINT])
@pytest.mark.parametrize("diffusion", [{}, {"token_times": 0.25, "contrastive": 0.1}])
def test_the_objective_is_one_graph_compiled_once(route, diffusion):
    torch._dynamo.reset()
    subject, counter = objective(route, term(), **diffusion), CompileCounterWithBackend("eager")
    compiled = torch.compile(subject, backend=counter, fullgraph=True)
    x, condition, _ = images()
    for step in (0, 1, 5):
        mine = losses_of(subject, x, condition.labels, features(), step)
        draws, weights = subject.draw({"x": x}, step), subject.weights(step, CPU)
        torch.testing.assert_close(compiled({"x": x}, condition, features(), draws, weights).total, mine.total)
    assert counter.frame_count == 1


def test_blocks_are_compiled_for_both_numbers_of_tokens():
    """As under FSDP2 each block is compiled separately, with one graph for all tokens and one for the kept ones."""
    torch._dynamo.reset()
    subject, (x, condition, _) = objective(SPRINT, term()), images()
    wanted = losses_of(subject, x, condition.labels, features()).total
    sizes = []

    def backend(graph, inputs):
        sizes.append({tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor) and i.ndim == 3})
        assert not any(isinstance(i, (int, torch.SymInt)) for i in inputs)
        return graph.forward

    for block in subject.model.blocks:
        block.compile(dynamic=False, backend=backend)
    torch.testing.assert_close(losses_of(subject, x, condition.labels, features()).total, wanted)
    assert {shape[1] for found in sizes for shape in found} == {4, 16}
    made = len(sizes)
    torch.testing.assert_close(losses_of(subject, x, condition.labels, features()).total, wanted)
    assert len(sizes) == made <= 3  # one more for the first block, whose input has another memory layout
    torch._dynamo.reset()


@pytest.mark.parametrize("route", [TREAD, SPRINT])
def test_accumulated_gradients_equal_those_of_the_whole_batch(route):
    subject, (x, condition, _) = objective(route, term()), images()
    whole, draws, weights = features(), subject.draw({"x": x}, 0), subject.weights(0, CPU)
    subject({"x": x}, condition, whole, draws, weights).total.mean().backward()
    wanted = [p.grad.clone() for p in subject.parameters()]
    assert all(g.isfinite().all() for g in wanted)
    subject.zero_grad()
    for rows in (slice(0, 3), slice(3, 6)):
        losses = subject(*(select_samples(each, rows) for each in ({"x": x}, condition, whole, draws)), weights)
        (losses.total.mean() / 2).backward()
    for p, grad in zip(subject.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("route", [TREAD, SPRINT._replace(keep=1.0, path_drop=0.0)])
def test_every_parameter_has_a_gradient_at_every_step(route):
    """DDP needs all gradients, also that of the mask token, which a second stage does not use."""
    subject, (x, condition, _) = objective(route, term()), images()
    losses_of(subject, x, condition.labels, features()).total.mean().backward()
    assert all(p.grad is not None for p in subject.parameters() if p.requires_grad)


def test_the_route_does_not_change_other_random_draws():
    x, _condition, _ = images()
    plain, routed = (objective(route, term()).draw({"x": x}, 4) for route in (None, SPRINT))
    assert plain.keep is None
    assert plain.path_dropped is None
    for field in ("t", "noise", "dropped"):
        torch.testing.assert_close(getattr(plain, field), getattr(routed, field), rtol=0, atol=0)


# runs


@pytest.fixture(scope="module")
def config(tiny_config) -> TrainConfig:
    """A SPRINT run with a term in its route and one on the averaged network."""
    terms = (
        AlignmentConfig(target="tiny", depth=2, projector="mlp:width=16"),
        AlignmentConfig(target="ema:depth=3,earlier=0.2", depth=1, projector="mlp2", weight=0.2),
    )
    return tiny_config.override(
        model=tiny_config.model.override(**SPRINTED), alignments=terms, num_steps=8, save_every=4, keep_checkpoints=0,
        optimizer={"learning_rate": 1e-3},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(config, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed")

    def alone(config, name):
        train(config, open_data(data_folder), folder / name, device=CPU, say=lambda text: None)

    alone(config, "one")
    alone(config.override(num_steps=4), "stopped")
    alone(config, "stopped")
    alone(config.override(accumulate=2, checkpoint_activations=True), "parts")
    jobs = [(config, "ddp"), (config.override(parallel="fsdp", checkpoint_activations=True), "fsdp")]
    run_all([(config, data_folder, folder / name) for config, name in jobs], 2, folder)
    return folder


def weights(run, step=8):
    folder = layout.checkpoint_folder(run, step)
    return {f"{p.name}/{key}": value for p in folder.glob("*.safetensors") for key, value in load_file(p).items()}


def test_a_run_resumes_bit_for_bit(runs):
    mine, yours = weights(runs / "stopped"), weights(runs / "one")
    assert mine.keys() == yours.keys()
    assert {"model.safetensors/router.fuse.weight", "model.safetensors/router.mask_token"} <= mine.keys()
    assert all(torch.equal(value, yours[key]) for key, value in mine.items())


@pytest.mark.parametrize("name", ["ddp", "fsdp", "parts"])
def test_two_processes_train_like_one(name, runs):
    mine, yours = ([r for r in read_metrics(runs / n) if r["kind"] == "train"] for n in (name, "one"))
    assert [row["step"] for row in mine] == [row["step"] for row in yours] == list(range(1, 9))
    for a, b in zip(mine, yours, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["alignment"] == pytest.approx(b["alignment"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    other = weights(runs / "one")
    for key, value in weights(runs / name).items():
        torch.testing.assert_close(value, other[key], atol=2e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_two_training_stages_then_sampling_and_export(config, runs, data_folder, tmp_path, capsys):
    """SPRINT's second stage uses all tokens, path-drop guidance skips its middle blocks, and the export is equal."""
    first, second = runs / "one", tmp_path / "second"
    stage = [str(first), "--data", str(data_folder), "--out", str(second), "--init", str(first), "--model.keep", "1"]
    stage += ["--num-steps", "2"]
    assert repa(["train", *stage]) == 0
    assert load_run(second).model.route == Route(2, 3, 1.0, 2, "fuse", 0.3)
    start, end = load_checkpoint(first).ema, load_checkpoint(second).model
    assert 0 < (end["router.fuse.weight"] - start["router.fuse.weight"]).abs().max() < 0.01

    images = {}
    for guidance in ("path_drop:scale=3", "cfg:scale=3"):
        out = tmp_path / f"{guidance[:4]}.npz"
        command = [
            "sample",
            str(second),
            "--num-images",
            "4",
            "--steps",
            "3",
            "--guidance",
            guidance,
            "--out",
            str(out),
        ]
        assert repa(command) == 0
        images[guidance] = out.read_bytes()
    assert len(set(images.values())) == 2

    assert repa(["export", str(second), str(tmp_path / "out")]) == 0
    exported, model = load_exported(tmp_path / "out"), load_run(second).model
    assert exported.route == model.route
    x, t, condition = torch.randn(2, 3, 16, 16), torch.rand(2), Condition(torch.tensor([0, 1]))
    nobody = torch.empty(2, 0, dtype=torch.long)
    for keep in (None, nobody):
        wanted = model({"x": x}, t, condition, (), keep).prediction
        torch.testing.assert_close(exported({"x": x}, t, condition, (), keep).prediction, wanted, rtol=0, atol=0)

    capsys.readouterr()
    assert repa(["export", str(second), str(tmp_path / "other"), "--format", "diffusers"]) == 2
    assert "merge is fuse" in capsys.readouterr().err
    plain = [*stage[:3], "--out", str(tmp_path / "plain"), "--init", str(first), "--model.merge", "identity"]
    assert repa(["train", *plain]) == 2
    assert "a network with the merge fuse" in capsys.readouterr().err


def test_skipped_tokens_save_work_and_memory():
    settings = {
        "name": "SiT-S/2",
        "hidden_dim": 64,
        "depth": 6,
        "num_heads": 2,
        "latent_size": 16,
        "latent_channels": 4,
    }
    plain = TrainConfig(model=ModelConfig(**settings, num_classes=10), precision="fp32")
    aligned = AlignmentConfig(target="tiny", depth=3, projector="mlp:width=96")
    for merge in ("identity", "fuse"):
        config = plain.override(model=plain.model.override(route=(2, 5), keep=0.25, keep_groups=2, merge=merge))
        model = build(config.model)

        def forward(num, model=model):
            keep = placeholder(model.route, num, model.grid)
            state = {"x": torch.randn(num, 4, 16, 16)}
            output = model(state, torch.rand(num), Condition(torch.zeros(num, dtype=torch.long)), (), keep)
            return output.prediction["x"].square().sum()

        kept = saved_bytes(lambda: forward(3), 64, 16) - saved_bytes(lambda: forward(2), 64, 16)
        assert activation_bytes(config, {}) == pytest.approx(kept, rel=0.02)
        assert kept < 0.65 * activation_bytes(plain, {})
        again = config.override(checkpoint_activations=True)
        assert activation_bytes(again, {}) < activation_bytes(config, {})

        config = config.override(alignments=(aligned,))
        subject = Objective(
            model, [Alignment.of(aligned, model, {"tiny": 48})], config.diffusion, label_dropout=0.0, seed=0
        )
        flops = flops_per_image(config, {"tiny": 48})
        assert flops_of(subject) == pytest.approx(flops, rel=0.01)
        assert flops < 0.6 * flops_per_image(plain.override(alignments=(aligned,)), {"tiny": 48})


def test_short_passes_are_counted_for_path_drop():
    assert passes_of(5, ["cfg:scale=1.8,high=0.7"]) == (8, 0)
    assert passes_of(5, ["path_drop:scale=3"]) == (5, 5)
    assert passes_of(5, ["path_drop:scale=3,high=0.7"]) == (5, 3)
