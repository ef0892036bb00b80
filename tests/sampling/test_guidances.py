"""Samples of a run with guidances, streams and a weaker network, each against the mixture written out."""

import json
from dataclasses import replace

import pytest
import torch

from repa.autoencoders import load_autoencoder
from repa.base.errors import UserError
from repa.base.rng import SampleStreams
from repa.cli.main import run as repa
from repa.diffusion.config import DiffusionConfig
from repa.models import Condition, build_model
from repa.models.config import Route
from repa.runs import LoadedRun, load_run
from repa.sampling import SampleConfig, generate, prepared

EULER = SampleConfig(sampler="euler", steps=4, labels="1", seed=3, precision="fp32")


def random_network(seed=0, **overrides):
    torch.manual_seed(seed)
    model = build_model(
        "SiT-S/4", latent_size=16, latent_channels=3, num_classes=2, hidden_dim=32, depth=2, num_heads=2, **overrides
    )
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.08)
    return LoadedRun(model.eval(), DiffusionConfig(), load_autoencoder("pixels"), 0, "ema")


def euler(run, velocity, index=5):
    """Images from 4 steps of dx = v dt, for a state of named parts."""
    streams = SampleStreams(3, [index])
    state = {name: streams.randn(*shape).double() for name, shape in run.model.state_shapes.items()}
    for t in (1.0, 0.75, 0.5, 0.25):
        v = velocity({name: part.float() for name, part in state.items()}, t)
        state = {name: part - 0.25 * v[name].double() for name, part in state.items()}
    return (127.5 * state["x"][0] + 127.5).round().clamp(0, 255)


def same(found, wanted):
    assert (found[0] - wanted).abs().max() <= 1
    assert (found[0] != wanted).double().mean() < 1e-2
    assert wanted.std() > 10


def asked(run, state, t, label):
    return run.model(state, torch.tensor([t]), Condition(torch.tensor([label])))


def test_internal_guidance_is_applied_before_cfg():
    run = random_network(heads=(1,))

    def velocity(state, t):
        branches = [asked(run, state, t, label) for label in (1, run.model.null_label)]
        c, n = (o.heads[1] + 1.4 * (o.prediction["x"] - o.heads[1]) for o in branches)
        return {"x": n + 1.35 * (c - n) if t <= 0.7 else c}

    config = EULER.override(guidance=["internal:head=1,scale=1.4", "cfg:scale=1.35,high=0.7"])
    same(generate(run, config, [5]).images, euler(run, velocity))
    with pytest.raises(UserError, match="has heads at 1"):
        generate(run, EULER.override(guidance=["internal:head=2,scale=1.4"]), [5])
    with pytest.raises(UserError, match="has no heads"):
        generate(random_network(), config, [5])


def test_a_stream_is_sampled_together_with_the_latents():
    """REG's joint sampler steps both with separate guidance scales; internal guidance affects only the latents."""
    run = random_network(streams={"class": 6}, heads=(1,))

    def velocity(state, t):
        c, n = (asked(run, state, t, label).prediction for label in (1, run.model.null_label))
        return {"x": n["x"] + 2 * (c["x"] - n["x"]), "class": n["class"] + 3 * (c["class"] - n["class"])}

    same(generate(run, EULER.override(guidance=["cfg:scale=2,streams=3"]), [5]).images, euler(run, velocity))

    def internal(state, t):
        o = asked(run, state, t, 1)
        return {"x": o.heads[1] + 1.5 * (o.prediction["x"] - o.heads[1]), "class": o.prediction["class"]}

    same(generate(run, EULER.override(guidance=["internal:head=1,scale=1.5"]), [5]).images, euler(run, internal))
    for sampler in ("euler_maruyama", "heun"):
        config = EULER.override(sampler=sampler, labels="uniform")
        whole = generate(run, config, range(4)).images
        assert torch.equal(torch.cat([generate(run, config, range(i, i + 2)).images for i in (0, 2)]), whole)


def test_autoguidance_uses_the_weaker_network():
    run, weak = random_network(), random_network(seed=1)

    def velocity(state, t):
        strong, ref = (asked(of, state, t, 1).prediction["x"] for of in (run, weak))
        return {"x": ref + 1.5 * (strong - ref)}

    config = EULER.override(weak="a-run", guidance=["autoguidance:scale=1.5"])
    same(generate(run.with_weak(weak), config, [5]).images, euler(run, velocity))
    with pytest.raises(UserError, match="--weak RUN"):
        generate(run, config, [5])
    with pytest.raises(UserError, match="path 'trigonometric'"):
        run.with_weak(replace(weak, diffusion=DiffusionConfig(path="trigonometric")))
    with pytest.raises(UserError, match="other latents"):
        run.with_weak(random_network(streams={"class": 6}))


@pytest.mark.parametrize("merge", ["identity", "fuse"])
def test_path_drop_adds_a_pass_without_condition_and_middle_blocks(merge):
    run = random_network(route=Route(2, 2, 0.5, 0, merge, 0.1))

    def velocity(state, t):
        null, times = Condition(torch.tensor([run.model.null_label])), torch.tensor([t])
        routed = run.model(state, times, null, keep=torch.empty(1, 0, dtype=torch.long)).prediction["x"]
        return {"x": routed + 2 * (asked(run, state, t, 1).prediction["x"] - routed)}

    config = EULER.override(guidance=["path_drop:scale=2"])
    same(generate(run, config, [5]).images, euler(run, velocity))
    with pytest.raises(UserError, match="path_drop needs a network"):
        generate(random_network(), config, [5])
    with pytest.raises(UserError, match="never trained without them: leave it out, or train with --model.path-drop"):
        generate(random_network(route=Route(2, 2, 0.5)), config, [5])


def test_another_checkpoint_can_guide_on_the_command_line(random_run, tmp_path):
    """The record names the guiding weights; without --weak the command fails before anything is loaded."""
    out = tmp_path / "samples.npz"
    command = ["sample", str(random_run), "--num-images", "2", "--steps", "2", "--out", str(out)]
    command += ["--guidance", "autoguidance:scale=1.5,high=0.9"]
    assert repa(command) == 2
    assert repa([*command, "--weak", str(random_run), "--weak-checkpoint", "10", "--weak-weights", "model"]) == 0
    made = json.loads(out.with_suffix(".json").read_text())
    assert made["guidance"] == ["autoguidance:scale=1.5,high=0.9"]
    assert made["weak_step"] == 10
    assert made["weak_sha256"] == load_run(random_run, "model", step=10).weights_sha256


def test_a_run_with_every_part_trains_previews_and_samples(tiny_config, data_folder, tmp_path, monkeypatch):
    """REG's stream, a head, velocity terms and the automatic time shift in one run."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "num_steps": 2, "streams": [{"source": "tiny"}], "model": {"name": "SiT-S/4", "hidden_dim": 32, "depth": 2, "num_heads": 2,
        "heads": [1]}, "diffusion": {"shift": "auto", "contrastive": 0.05, "velocity_cosine": 1.0},
        "preview": {"every": 2, "num_images": 2, "num_steps": 2, "guidance": ["internal:head=1,scale=1.4", "cfg:scale=2,streams=1"]},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(tiny_config.override(**settings).to_yaml())
    assert repa(["train", "run.yaml", "--data", str(data_folder), "--out", "run"]) == 0
    assert load_run("run").diffusion.shift == 1  # 3 x 16 x 16 numbers are fewer than 4096
    command = ["sample", "run", "--num-images", "3", "--steps", "3", "--out", "s.npz", "--weights", "model"]
    assert repa([*command, "--guidance", "internal:head=1,scale=1.4", "--guidance", "cfg:scale=1.35,high=0.7"]) == 0
    made = json.loads((tmp_path / "s.json").read_text())
    assert made["guidance"] == ["internal:head=1,scale=1.4", "cfg:scale=1.35,high=0.7"]
    assert (tmp_path / "s.npz").exists()


def test_representation_guidance_follows_the_gradient_of_the_alignment_loss(random_run, image_folder, tmp_path):
    """REPA-G: v + scale d loss / d x_t with the loss of the run's term, checked by finite differences."""
    image = str(next(image_folder.glob("*/*.png")))
    config = EULER.override(guidance=["representation:scale=50,high=0.6"], guide_image=image, labels="1")
    run = prepared(load_run(random_run), config)
    x, labels = SampleStreams(3, [5]).randn(3, 16, 16), torch.tensor([1])

    def loss(x):
        t, condition = torch.tensor([0.5]), Condition(labels)
        output = run.model({"x": x}, t, condition, run.guide.taps)
        return float(run.guide.loss(output, t, condition))

    direction = SampleStreams(4, [5]).randn(3, 16, 16)
    slope = (loss(x + 0.01 * direction) - loss(x - 0.01 * direction)) / 0.02
    plain, moved = (run.denoiser(labels, specs).velocity(x, 0.5) for specs in ([], config.guidance))
    assert float(((moved - plain) * direction).sum()) == pytest.approx(50 * slope, rel=0.02)
    assert torch.equal(run.denoiser(labels, config.guidance).velocity(x, 0.7), run.denoiser(labels).velocity(x, 0.7))
    found = generate(run, config, range(4)).images  # runs under inference_mode
    assert torch.equal(torch.cat([generate(run, config, range(i, i + 2)).images for i in (0, 2)]), found)

    out = tmp_path / "s.npz"
    command = ["sample", str(random_run), "--num-images", "2", "--steps", "2", "--out", str(out)]
    command += ["--guidance", "cfg:scale=1.5", "--guidance", "representation:scale=5,term=tiny@1"]
    assert repa(command) == 2
    assert repa([*command, "--guide-image", image]) == 0
    assert len(json.loads(out.with_suffix(".json").read_text())["guide_image_sha256"]) == 64
    with pytest.raises(UserError, match="it has tiny@1"):
        prepared(run, config.override(guidance=["representation:scale=5,term=tiny@2"]))
    with pytest.raises(UserError, match="needs a run folder"):
        prepared(random_network(), config)
