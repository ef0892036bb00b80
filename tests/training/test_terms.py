"""Options of terms: shared projectors, weights over time, pooling, frozen runs and captions as targets, warm-up."""

import shutil

import pytest
import torch
import yaml

from repa.alignment import Alignment, AlignmentConfig
from repa.base.config import read_yaml
from repa.base.errors import UserError
from repa.cli.main import run as repa
from repa.data import open_data
from repa.diffusion.config import DiffusionConfig
from repa.encoders.contract import Features
from repa.models import Condition, DiT
from repa.performance.estimate import _averaged_flops
from repa.runs import layout, load_run, read_metrics
from repa.training import Objective, TrainConfig, train

CPU = torch.device("cpu")
TOKENS = {"target": "tiny", "depth": 1, "projector": "linear", "name": "tokens"}
RELATIONS = {**TOKENS, "loss": "gram", "name": "relations", "weight": 1.5}


def network() -> DiT:
    torch.manual_seed(0)
    sizes = {"latent_size": 8, "latent_channels": 3, "patch_size": 2, "hidden_dim": 16, "depth": 2, "num_heads": 2}
    return DiT(**sizes, num_classes=3)


def objective(*terms, **settings) -> Objective:
    model = network()
    built = [Alignment.of(AlignmentConfig(**term), model, {"tiny": 5, "tiny-classifier": 6}) for term in terms]
    return Objective(model, built, DiffusionConfig(), label_dropout=0.3, seed=3, **settings)


def losses_of(part: Objective, step=2):
    stream = torch.Generator().manual_seed(1)
    x, patches = torch.randn(6, 3, 8, 8, generator=stream), torch.randn(6, 16, 5, generator=stream)
    features = {"tiny": Features(patches, None)}
    clean = part.clean(x, features)
    draws = part.draw(clean, step)
    condition = Condition(torch.randint(3, (6,), generator=stream))
    return part(clean, condition, features, draws, part.weights(step, x.device)), draws


def test_two_terms_can_share_a_projector():
    shared = objective(TOKENS, {**RELATIONS, "projector_of": "tokens"})
    own = objective(TOKENS, RELATIONS)
    first, second = own.alignments.values()
    second.load_state_dict(first.state_dict())
    shared.alignments["tokens"].load_state_dict(first.state_dict())
    assert [name for name, _ in shared.alignments.named_parameters()] == [
        "tokens.projector.weight",
        "tokens.projector.bias",
    ]
    assert set(shared.alignments.state_dict()) == {"tokens.projector.weight", "tokens.projector.bias"}
    (found, _), (wanted, _) = losses_of(shared), losses_of(own)
    torch.testing.assert_close(found.total, wanted.total)
    found.total.mean().backward()
    wanted.total.mean().backward()
    both = first.projector.weight.grad + second.projector.weight.grad
    torch.testing.assert_close(shared.alignments["tokens"].projector.weight.grad, both)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"projector": "mlp:width=8"}, "their projector differs"), ({"measure_only": True}, "their measure_only differs"),
     ({"target": "tiny-classifier"}, "a separate projector")],
)  # fmt: skip
def test_projectors_that_cannot_be_shared_are_refused(changes, told):
    with pytest.raises(UserError, match=told):
        objective(TOKENS, {**RELATIONS, "projector_of": "tokens", **changes})


def test_sharing_the_projector_of_a_later_term_is_refused():
    with pytest.raises(UserError, match="relations"):
        TrainConfig.parse({"alignments": [{**TOKENS, "projector_of": "relations"}, RELATIONS]})
    with pytest.raises(UserError, match="leave it out") as alone:
        TrainConfig.parse({"alignments": [{**TOKENS, "projector_of": "tokens"}]})
    assert "none" not in str(alone.value)
    with pytest.raises(UserError, match="Did you mean 'tokens'"):
        TrainConfig.parse({"alignments": [TOKENS, {**RELATIONS, "projector_of": "token"}]})


def test_each_image_is_weighted_by_its_own_time():
    plain, weighted = objective(TOKENS), objective({**TOKENS, "time_weight": "cosine", "times": (0.2, 1.0)})
    (before, draws), (after, _) = losses_of(plain), losses_of(weighted)
    key = "alignment/tokens"
    weights = torch.where(draws.t >= 0.2, (torch.pi / 2 * draws.t).cos().square(), 0.0)
    torch.testing.assert_close(after.terms[key], weights * before.terms[key])


def test_pooled_tokens_are_averaged_before_the_projector():
    term = Alignment(AlignmentConfig(target="tiny", depth=1, projector="mlp:width=8", pool=True), 16, 5)
    hidden, target = torch.randn(2, 9, 16), torch.randn(2, 1, 5)
    projected = term.projector(hidden.mean(1))
    wanted = -torch.cosine_similarity(projected, target[:, 0])
    torch.testing.assert_close(term.compare(hidden, target), wanted)
    for refused in ({"projector": "conv"}, {"projector": "adapter"}, {"target": "tiny:part=all"}):
        with pytest.raises(UserError, match="one vector"):
            AlignmentConfig.parse({"target": "tiny", "depth": 1, "pool": True, **refused})


@pytest.mark.parametrize("grid", [None, (3, 3), (2, 4)])
@pytest.mark.parametrize("tokens", [9, 6])
def test_a_pooled_tap_is_compared_with_the_mean_of_the_target(grid, tokens):
    """For known and unknown grids, and whatever the target's grid; the 6 tokens are 2 x 3."""
    term = Alignment(AlignmentConfig(target="tiny", depth=1, projector="linear", pool=True), 16, 5, grid)
    hidden, target = torch.randn(2, 8 if grid == (2, 4) else 9, 16), torch.randn(2, tokens, 5)
    wanted = -torch.cosine_similarity(term.projector(hidden.mean(1)), target.mean(1))
    torch.testing.assert_close(term.compare(hidden, target), wanted)
    kept = torch.tensor([[0, 2, 3], [1, 2, 5]])  # in a routed block, the mean over kept tokens
    wanted = -torch.cosine_similarity(term.projector(hidden[:, :3].mean(1)), target.mean(1))
    torch.testing.assert_close(term.compare(hidden[:, :3], target, kept), wanted)


def test_the_denoising_loss_warms_up_and_the_terms_do_not():
    part = objective(TOKENS, denoising_schedule="warmup:steps=4")
    for step, share in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        losses, _ = losses_of(part, step)
        total = share * losses.terms["denoising"] + 0.5 * losses.terms["alignment/tokens"]
        torch.testing.assert_close(losses.total.detach(), total)
    with pytest.raises(UserError, match="plateau"):
        objective(TOKENS, denoising_schedule="plateau")


def second_stage(tiny_config, random_run, **settings) -> TrainConfig:
    target = f"run:path={random_run},depth=2,scale=30"
    term = AlignmentConfig(
        **{"target": target, "depth": 1, "loss": "mse", "projector": "linear", "name": "first", **settings}
    )
    return tiny_config.override(alignments=(term,), num_steps=4, save_every=2)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ({"qk_norm": "rms"}, "do not fit the network"), ({"depth": 1_000}, "do not fit the network"),
        ({"num_heads": 4}, "has model.num_heads: 4, but the checkpoint"),
    ],
)  # fmt: skip
def test_a_frozen_run_with_an_edited_configuration_is_refused(
    edit, why, run_training, tiny_config, random_run, tmp_path
):
    teacher = shutil.copytree(random_run, tmp_path / "teacher")
    config = yaml.safe_load((teacher / layout.CONFIG).read_text())
    (teacher / layout.CONFIG).write_text(yaml.safe_dump({**config, "model": {**config["model"], **edit}}))
    with pytest.raises(UserError, match=why):
        run_training(second_stage(tiny_config, teacher), tmp_path / "run")


def test_a_frozen_run_guides_the_second_stage(run_training, tiny_config, random_run, tmp_path):
    """Four steps equal two and two more, the configuration names the step, and the target is the guided state."""
    config = second_stage(tiny_config, random_run)
    states = []
    run_training(config, tmp_path / "whole", progress=states.append)
    run_training(config.override(num_steps=2), tmp_path / "parts")
    run_training(config, tmp_path / "parts", progress=states.append)
    whole, parts = states[0], states[-1]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    (term,) = read_yaml(tmp_path / "whole" / "config.yaml")["alignments"]
    assert term["target"].endswith(",step=20")
    rows = [row for row in read_metrics(tmp_path / "whole") if row["kind"] == "train"]
    assert all(row["alignment"]["first"] > 0 for row in rows)

    part, frozen = whole.objective, load_run(random_run).model
    x, condition = torch.randn(4, 3, 16, 16), Condition(torch.tensor([0, 1, 0, 1]))
    draws = part.draw({"x": x}, 7)
    (tap,) = part.averaged_taps
    found = part.averaged(whole.frozen, {"x": x}, condition, draws).taps[tap]
    t = draws.t[:, None, None, None]
    state = {"x": (1 - t) * x + t * draws.noise["x"]}
    with torch.no_grad():
        c, u = (frozen(state, draws.t, each, (tap,)).taps[tap] for each in (condition, frozen.null(condition)))
    torch.testing.assert_close(found, u + 30 * (c - u), rtol=1e-4, atol=1e-4)


def test_a_run_that_does_not_fit_is_refused(run_training, tiny_config, random_run, tmp_path):
    config = second_stage(tiny_config, random_run)
    with pytest.raises(UserError, match="hidden_dim"):
        run_training(config.override(model=config.model.override(hidden_dim=16)), tmp_path / "thin")
    with pytest.raises(UserError, match="path"):
        run_training(config.override(diffusion={"path": "trigonometric"}), tmp_path / "other")
    with pytest.raises(UserError, match="folder of a trained run"):
        run_training(second_stage(tiny_config, tmp_path / "nothing"), tmp_path / "none")
    with pytest.raises(UserError, match="share one pass"):
        first, other = (
            second_stage(tiny_config, random_run).alignments[0],
            AlignmentConfig(target="ema:depth=1", depth=1),
        )
        tiny_config.override(alignments=(first, other))


def test_the_estimate_counts_two_forwards_of_a_frozen_run(tiny_config, random_run):
    complete = {"latent_size": 16, "latent_channels": 3, "num_classes": 2}
    config = second_stage(tiny_config, random_run)
    config = config.override(model=config.model.override(**complete))
    averaged = config.override(alignments=(AlignmentConfig(target="ema:depth=2", depth=1),))
    assert _averaged_flops(config) == 2 * _averaged_flops(averaged) > 0


def with_text(tiny_config) -> TrainConfig:
    term = AlignmentConfig(target="text", depth=2, projector="linear", pool=True, name="caption")
    return tiny_config.override(alignments=(*tiny_config.alignments, term), num_steps=2)


def test_captions_can_be_targets_of_a_class_conditional_network(tiny_config, captioned_data, tmp_path):
    """The target is the mean of the caption's real tokens, also for dropped labels, with the data's width."""
    seen = []

    def look(state):
        term = state.objective.alignments["caption"]
        term.register_forward_pre_hook(lambda _, args: seen.append((term.target(args[0]), args[0])))

    run = tmp_path / "run"
    train(
        with_text(tiny_config),
        open_data(captioned_data / "stored"),
        run,
        device=CPU,
        say=lambda text: None,
        progress=look,
    )
    target, given = seen[0]
    assert target.shape == (8, 1, 8)
    for n, mask in enumerate(given.given.text_mask):
        torch.testing.assert_close(target[n, 0], given.given.text[n][mask].mean(0) if mask.any() else torch.zeros(8))
    assert read_yaml(run / "config.yaml")["alignments"][1]["target"] == "text:width=8"
    assert repa(["sample", str(run), "--num-images", "2", "--steps", "2", "--out", str(tmp_path / "s.npz")]) == 0


def test_missing_captions_are_reported(tiny_config, captioned_data, tmp_path):
    with pytest.raises(UserError, match="--text NAME"):
        train(with_text(tiny_config), open_data(captioned_data / "plain"), tmp_path / "run", device=CPU)
    with pytest.raises(UserError, match="set pool to true"):
        AlignmentConfig.parse({"target": "text", "depth": 1})
