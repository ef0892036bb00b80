"""DiT + REPA: the hybrid loss of improved DDPM (Eqs. 10-12) with alignment (Eq. 9)."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repa.alignment import Alignment
from repa.alignment.config import AlignmentConfig
from repa.base.errors import UserError
from repa.diffusion import DiffusionConfig
from repa.encoders.contract import Features
from repa.models import Condition, build_model
from repa.runs import layout, read_metrics
from repa.training import Objective, TrainConfig
from tests.calls import call
from tests.oracles import ddpm as oracle

DDPM = DiffusionConfig(objective="ddpm")
ALIGNMENT = AlignmentConfig(target="tiny", depth=1, weight=0.7, projector="linear")


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    size = {"hidden_dim": 16, "depth": 2, "num_heads": 2}
    model = build_model("DiT-S/2", latent_size=4, latent_channels=2, num_classes=3, **size)
    for p in model.parameters():  # with the zero initialisation every prediction would be 0
        torch.nn.init.normal_(p, std=0.3)
    return Objective(model, [Alignment.of(ALIGNMENT, model, {"tiny": 5})], DDPM, label_dropout=0.3, seed=0)


@pytest.fixture
def config(tiny_config):
    return tiny_config.override(
        model=tiny_config.model.override(name="DiT-S/4"), diffusion=DDPM, num_steps=6, save_every=3
    )


def train_rows(run):
    return [row for row in read_metrics(run) if row["kind"] == "train"]


def batch(num=8):
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(num, 2, 4, 4, generator=stream)
    features = {"tiny": Features(torch.randn(num, 4, 5, generator=stream), None)}
    return x, torch.randint(3, (num,), generator=stream), features


def test_the_total_equals_hybrid_loss_and_alignment_written_out(objective):
    x, labels, features = batch()
    bars = oracle.alpha_bars(oracle.BETAS)
    draws = objective.draw({"x": x}, 3)
    losses = objective({"x": x}, Condition(labels), features, draws, objective.weights(3, x.device))
    assert set(losses.terms) == {"denoising", "vb", "alignment/tiny@1"}
    assert 0 < int(draws.dropped.sum()) < len(x)
    seen = set()
    for n in range(len(x)):
        k = round(float(draws.t[n]) * 1000) - 1
        seen.add(k)
        x_k = math.sqrt(bars[k]) * x[n] + math.sqrt(1 - bars[k]) * draws.noise["x"][n]
        label = 3 if draws.dropped[n] else int(labels[n])
        with torch.no_grad():
            output = call(objective.model, x_k[None], torch.tensor([float(k)]), torch.tensor([label]), (1,))
            projected = objective.alignments["tiny@1"].projector(output.hidden[1])[0]
        arrays = (a.double().numpy()[None] for a in (output.prediction[0], x[n], draws.noise["x"][n]))
        (mse,), (vb,) = oracle.losses(*arrays, [k])
        similarity = 0.0
        for z, y in zip(projected, features["tiny"].patches[n], strict=True):
            similarity += float(z @ y) / math.sqrt(float(z @ z) * float(y @ y)) / len(projected)
        assert float(losses.terms["denoising"][n]) == pytest.approx(mse, rel=1e-4)
        assert float(losses.terms["vb"][n]) == pytest.approx(vb, rel=1e-3, abs=1e-5)
        assert float(losses.total[n].detach()) == pytest.approx(mse + vb - 0.7 * similarity, rel=1e-3)
    assert len(seen) > 4


def test_the_variational_bound_reaches_only_the_variance_outputs(objective):
    """In Eq. 10 the noise prediction's gradient comes only from the squared error; alignment misses the head."""
    x, labels, features = batch()
    rows = objective.model.final_layer.linear.bias  # (p p 2C,), channels fastest: noise, then v
    draws = objective.draw({"x": x}, 0)
    losses = objective({"x": x}, Condition(labels), features, draws, objective.weights(0, x.device))
    (gradient,) = torch.autograd.grad(losses.total.sum(), rows)
    x_t, k = objective.process.noised(x, draws.noise["x"], draws.t), objective.process.network_time(draws.t)
    y = torch.where(draws.dropped, 3, labels)
    noise = call(objective.model, x_t, k, y).prediction[:, :2]
    (wanted,) = torch.autograd.grad((noise - draws.noise["x"]).square().mean((1, 2, 3)).sum(), rows)
    gradient, wanted = gradient.reshape(4, 4), wanted.reshape(4, 4)  # (p p, 2C)
    torch.testing.assert_close(gradient[:, :2], wanted[:, :2])
    assert (gradient[:, 2:] != 0).all()
    assert not wanted[:, 2:].any()


def test_training_reduces_the_losses(config, run_training, tmp_path):
    faster = config.override(num_steps=120, log_every=10, save_every=120, optimizer={"learning_rate": 3e-3})
    run_training(faster, tmp_path / "r")
    rows = train_rows(tmp_path / "r")
    first, last = rows[0], rows[-1]
    assert last["denoising"] < 0.8 * first["denoising"]
    assert np.mean([row["vb"] for row in rows[-4:]]) < np.mean([row["vb"] for row in rows[:4]])
    assert last["alignment"]["tiny@1"] < first["alignment"]["tiny@1"] - 0.2
    for row in rows:
        total = row["denoising"] + row["vb"] + 0.5 * row["alignment"]["tiny@1"]
        assert row["loss"] == pytest.approx(total, rel=1e-5, abs=1e-6)  # the parts nearly cancel


def test_six_steps_equal_three_a_restart_and_three(config, run_training, tmp_path):
    run_training(config, tmp_path / "whole")
    run_training(config.override(num_steps=3), tmp_path / "halves")
    run_training(config, tmp_path / "halves")
    rows = [[(r["loss"], r["vb"], r["grad_norm"]) for r in train_rows(tmp_path / n)] for n in ("whole", "halves")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 6
    for name in (layout.MODEL_FILE, layout.EMA_FILE, layout.PROJECTORS_FILE):
        whole, halves = (load_file(layout.checkpoint_folder(tmp_path / n, 6) / name) for n in ("whole", "halves"))
        assert all(torch.equal(value, halves[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"diffusion": {"objective": "flow"}}, "DiT-S/4 also predicts a variance.*choose --diffusion.objective ddpm, or 'SiT-S/4'"),
        ({"model": {"name": "SiT-B/2"}}, "also trains a variance, which SiT-B/2 does not predict: choose 'DiT-B/2'.*or.*flow"),
        ({"diffusion": {"objective": "ddpm", "path": "vp"}}, "diffusion: path 'vp' applies only to the objective flow"),
    ],
)  # fmt: skip
def test_a_network_that_does_not_fit_the_objective_is_refused(config, change, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainConfig.parse({**config.model_dump(), "alignments": (), **change})


def test_previews_with_an_unsupported_sampler_are_refused_before_training(tiny_config, config, run_training, tmp_path):
    with pytest.raises(UserError, match="The sampler ddim needs a network trained with the objective ddpm"):
        tiny_config.override(preview={"sampler": "ddim"})
    assert config.override(preview={"sampler": "ddim:eta=1"}).preview.sampler == "ddim:eta=1"
    for preview, sentence in (
        ({"sampler": "ddim", "num_steps": 300}, "No stride visits exactly 300 of 1000 timesteps"),
        ({"sampler": "ddpm", "num_steps": 1}, "DDPM sampling needs 2 to 1000 steps, but got 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            run_training(config.override(preview={"every": 2, **preview}), tmp_path / "r")
        assert not (tmp_path / "r").exists()
        config.override(preview=preview)  # valid, because no preview is made


@pytest.mark.parametrize(
    ("name", "trainable"), [("DiT-B/2", 130_315_808), ("DiT-L/2", 457_840_672), ("DiT-XL/2", 674_834_720)]
)
def test_parameter_counts_of_dit_match_the_paper(name, trainable):
    """SiT's, plus 16 head outputs (2 x 2 patches of 4 variance channels) with D weights and a bias each."""
    with torch.device("meta"):
        dit, sit = (build_model(n, latent_size=32, num_classes=1000) for n in (name, name.replace("DiT", "SiT")))
    count, base = (sum(p.numel() for p in model.parameters()) for model in (dit, sit))
    assert count == trainable == base + 16 * (dit.hidden_dim + 1)
    if name == "DiT-XL/2":
        assert count + dit.pos_embed.numel() == 675_129_632  # as counted by DiT's code, including positions


def test_dit_xl_2_has_the_published_118_6_gmac_at_256_tokens():
    with (
        FakeTensorMode(),
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):  # torch does not count the CPU's fused kernel
        model = build_model("DiT-XL/2", latent_size=32, num_classes=1000)
        inputs = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            call(model, *inputs)
    assert counter.get_total_flops() / 2 / 1e9 == pytest.approx(118.6, abs=0.05)
