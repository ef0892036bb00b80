"""A DiT run (objective ddpm): its own and other samplers, guidance, analysis, and what is refused."""

import math
import re
from shutil import copytree

import pytest
import torch
import yaml

from repa.autoencoders import load_autoencoder
from repa.base.errors import UserError
from repa.base.rng import SampleStreams
from repa.cli.main import run as repa
from repa.data import open_data
from repa.diffusion import DiffusionConfig
from repa.models import build_model
from repa.runs import LoadedRun, layout, load_run, save_checkpoint
from repa.sampling import SampleConfig, generate
from repa.training.resolve import claim_folder, resolve
from repa.training.state import build_state
from tests.calls import call
from tests.oracles import ddpm as oracle

BARS = oracle.alpha_bars(oracle.BETAS)
CONFIG = SampleConfig(
    sampler="ddpm", steps=5, guidance=("cfg:scale=1.5,channels=2",), labels="1", seed=1, precision="fp32"
)


@pytest.fixture(scope="module")
def folder(tiny_config, data_folder, tmp_path_factory):
    """Like random_run, for a DiT; weights are random, because the initial prediction is zero."""
    run, data = tmp_path_factory.mktemp("runs") / "dit", open_data(data_folder)
    model, diffusion = tiny_config.model.override(name="DiT-S/4"), DiffusionConfig(objective="ddpm")
    config = resolve(tiny_config.override(model=model, diffusion=diffusion, alignments=()), data, torch.device("cpu"))
    claim_folder(run, config, data)
    state = build_state(config, {}, torch.device("cpu"))
    stream = torch.Generator().manual_seed(0)
    for p in state.ema.model.parameters():
        p.data = torch.randn(p.shape, generator=stream) * 0.1
    save_checkpoint(run, state.snapshot())
    return run


@pytest.fixture(scope="module")
def run(folder):
    return load_run(folder)


def answers(run, x, k, channels, scale=1.5):
    """[noise; v] for class 1 at timestep k, with the first noise channels guided; the null label is 2."""
    both = [call(run.model, x.float(), torch.tensor([float(k)]), torch.tensor([y])).prediction.double() for y in (1, 2)]
    both[0][:, :channels] = both[1][:, :channels] + scale * (both[0] - both[1])[:, :channels]
    return both[0].chunk(2, dim=1)


def close(image, x):
    """Equal up to rounding of single grey levels."""
    wanted = (127.5 * x + 127.5).round().clamp(0, 255)
    return (image - wanted).abs().max() <= 1 and (image != wanted).double().mean() < 1e-2


@torch.no_grad()
def test_ddpm_sampling_equals_the_reverse_chain_written_out(run):
    """Eq. 12 and the posterior mean of the respaced process at timesteps 999, 749, 500, 250 and 0."""
    kept = [0, 250, 500, 749, 999]
    for index, image in zip((3, 8), generate(run, CONFIG, [3, 8]).images, strict=True):
        streams = SampleStreams(1, [index])
        x = streams.randn(3, 16, 16).double()
        for place in (4, 3, 2, 1, 0):
            k = kept[place]
            bar, before = BARS[k], BARS[kept[place - 1]] if place else 1.0
            beta = 1 - bar / before
            tilde = beta * (1 - before) / (1 - bar)
            noise, v = answers(run, x, k, channels=2)
            data = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
            x = (math.sqrt(before) * beta * data + math.sqrt(1 - beta) * (1 - before) * x) / (1 - bar)
            if place:
                log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(tilde)
                x = x + torch.exp(log_variance / 2) * streams.randn_like(x)
        assert close(image, x[0])


@torch.no_grad()
def test_ddim_sampling_equals_the_deterministic_chain_written_out(run):
    config = CONFIG.override(sampler="ddim", steps=4)
    for index, image in zip((3, 8), generate(run, config, [3, 8]).images, strict=True):
        x = SampleStreams(1, [index]).randn(3, 16, 16).double()
        for k, previous in ((750, 500), (500, 250), (250, 0), (0, None)):
            bar, before = BARS[k], 1.0 if previous is None else BARS[previous]
            noise, _ = answers(run, x, k, channels=2)
            data = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
            x = math.sqrt(before) * data + math.sqrt(1 - before) * noise
        assert close(image, x[0])


def test_dits_guidance_applies_to_the_first_three_channels():
    torch.manual_seed(0)
    size = {"hidden_dim": 16, "depth": 1, "num_heads": 2}
    model = build_model("DiT-S/2", latent_size=4, latent_channels=4, num_classes=5, **size)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    run = LoadedRun(
        model.requires_grad_(False), DiffusionConfig(objective="ddpm"), load_autoencoder("pixels"), 0, "ema"
    )
    x, labels = torch.randn(2, 4, 4, 4), torch.tensor([1, 4])
    got = run.denoiser(labels, ["cfg:scale=4,channels=3"]).output(x, 0.5)
    k = torch.full((2,), 499.0)
    conditional, null = (call(model, x, k, y).prediction for y in (labels, torch.tensor([5, 5])))
    wanted = null[:, :3] + 4 * (conditional - null)[:, :3]
    # 4 times the rounding error of another batch size
    torch.testing.assert_close(got[:, :3], wanted, rtol=1e-3, atol=1e-3)
    # the fourth channel and the variance are not guided
    torch.testing.assert_close(got[:, 3:], conditional[:, 3:], rtol=1e-4, atol=1e-4)
    assert (got[:, :3] - conditional[:, :3]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("sampler", "nfe"), [("ddpm", 10), ("ddim", 10), ("ddim:eta=1.0", 10), ("euler", 10), ("heun", 19), ("euler_maruyama", 10)]
)  # fmt: skip
def test_every_sampler_works_and_its_calls_are_counted(sampler, nfe, run):
    config = CONFIG.override(sampler=sampler, steps=10)
    whole = generate(run, config, range(4))
    assert whole.nfe == nfe
    assert torch.equal(generate(run, config, [2, 3]).images, whole.images[2:])
    assert whole.images.float().std() > 1


@torch.no_grad()
def test_other_samplers_see_the_velocity_of_the_discrete_process(run):
    """dx/dt = alpha' data + sigma' noise on the path through alpha_bar, with derivatives by finite differences."""
    x = SampleStreams(1, [0]).randn(3, 16, 16).double()
    for k in (50, 499, 900):
        noise, _ = answers(run, x, k, channels=2, scale=1.0)
        data = (x - math.sqrt(1 - BARS[k]) * noise) / math.sqrt(BARS[k])
        d_alpha = (math.sqrt(BARS[k + 1]) - math.sqrt(BARS[k - 1])) * 500
        d_sigma = (math.sqrt(1 - BARS[k + 1]) - math.sqrt(1 - BARS[k - 1])) * 500
        velocity = run.denoiser(torch.tensor([1])).velocity(x, (k + 1) / 1000)
        torch.testing.assert_close(velocity, d_alpha * data + d_sigma * noise, rtol=1e-3, atol=1e-3)


def test_ddpm_samplers_are_refused_for_a_flow(random_run):
    for sampler in ("ddpm", "ddim:eta=0.5"):
        with pytest.raises(
            UserError, match="needs a network trained with the objective ddpm, but this network .* flow"
        ):
            generate(load_run(random_run), CONFIG.override(sampler=sampler), range(2))


@pytest.mark.parametrize(
    ("sampler", "steps", "sentence"), [("ddim", 300, "No stride visits exactly 300"), ("ddpm", 1, "2 to 1000 steps")]
)
def test_an_impossible_number_of_steps_is_refused(sampler, steps, sentence, run):
    with pytest.raises(UserError, match=sentence):
        generate(run, CONFIG.override(sampler=sampler, steps=steps), range(2))


def test_a_run_whose_objective_does_not_fit_its_network_is_refused(folder, tmp_path):
    other = copytree(folder, tmp_path / "other")
    config = yaml.safe_load((other / layout.CONFIG).read_text())
    del config["diffusion"]["objective"]  # as in old runs, before there were two objectives
    (other / layout.CONFIG).write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="DiT-S/4 also predicts a variance.*choose --diffusion.objective ddpm"):
        load_run(other)


@torch.no_grad()
def test_analysis_uses_the_networks_timesteps(run):
    from repa.analysis import collect_hidden

    x = SampleStreams(5, range(3)).randn(3, 16, 16)
    settings = {"depths": (2,), "t": 0.3, "path": run.path, "seed": 4}
    got = collect_hidden(run.model, [x], network_time=run.process.network_time, **settings)[2]
    x_t = math.sqrt(BARS[299]) * x + math.sqrt(1 - BARS[299]) * SampleStreams(4, range(3)).randn(3, 16, 16)
    wanted = call(run.model, x_t, torch.full((3,), 299.0), torch.full((3,), 2), (2,)).hidden[2].mean(1)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_command_prints_the_number_of_network_calls(folder, tmp_path, capsys):
    out = tmp_path / "samples.npz"
    asked = ["--sampler", "ddim", "--steps", "10", "--guidance", "cfg:scale=1.5,channels=3"]
    assert repa(["sample", str(folder), "--num-images", "3", "--batch-size", "2", "--out", str(out), *asked]) == 0
    printed = "".join(capsys.readouterr())
    assert re.search(r"3 images of step 0 \(ema weights\), NFE 10, [0-9.e+]+ images/s;", printed)
    out.unlink()  # samples of another job are not overwritten
    assert (
        repa(["sample", str(folder), "--num-images", "3", "--out", str(out), "--sampler", "heun", "--steps", "3"]) == 0
    )
    assert "NFE 5, " in "".join(capsys.readouterr())
