"""CKNNA and probe of a whole run, with stand-ins for the network whose hidden states can be foretold."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from repa.analysis import cknna_of_run, probe_of_run
from repa.analysis.config import AnalyseConfig
from repa.autoencoders import load_autoencoder
from repa.autoencoders.contract import Autoencoder
from repa.base.errors import UserError
from repa.data import open_data
from repa.diffusion.config import DiffusionConfig
from repa.encoders import load_encoder
from repa.models import DiT, Output
from repa.runs import LoadedRun
from tests.oracles.analysis import cknna_paper


class Knowing(nn.Module):
    """Depth 1 holds the pixels it sees, as tokens; depth 2 holds the tokens that `tiny` has of them; depth 3 nothing."""

    depth, null_label = 3, 2
    check_taps = DiT.check_taps

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.encoder = load_encoder("tiny")

    def forward(self, x_t, t, labels, taps=()):
        assert (labels == self.null_label).all(), "the true class must not be told"
        images = (127.5 * x_t + 128).clamp(0, 255).to(torch.uint8)
        pixels = x_t.flatten(2).transpose(1, 2)  # (N, T, C)
        states = {1: pixels, 2: self.encoder(images, x_t.shape[-1] // 4).patches, 3: torch.zeros_like(pixels)}
        return Output(x_t, {tap: states[tap] for tap in taps})


@pytest.fixture
def run() -> LoadedRun:
    return LoadedRun(Knowing(), DiffusionConfig(), load_autoencoder("pixels"), step=0, weights="ema")


@pytest.fixture
def data(data_folder):
    return open_data(data_folder)


def test_a_probe_finds_the_classes_where_they_are_and_not_where_nothing_is(run, data):
    config = AnalyseConfig(times=(0.0, 0.3), depths=(1, 3), epochs=400)
    rows = probe_of_run(run, data, config)
    assert [(row["t"], row["depth"]) for row in rows] == [(0.0, 1), (0.0, 3), (0.3, 1), (0.3, 3)]
    for row in rows:  # 8 test images: dark and light ones are told apart by their mean colour alone
        assert row["accuracy"] == 1 if row["depth"] == 1 else row["accuracy"] < 0.8, row


def test_a_probe_of_labels_that_mean_nothing_is_no_better_than_chance(run, data):
    shuffled = np.random.default_rng(0).permutation(data.gather("labels", np.arange(40)))
    many = np.tile(np.arange(40), 10)  # each image ten times: enough rows for a test share of 80

    def gather(field, indices):
        return shuffled[many[indices]] if field == "labels" else data.gather(field, many[indices])

    fake = SimpleNamespace(
        num_images=400, num_classes=2, resolution=16, has_images=True, has_moments=False, gather=gather, folder="fake"
    )
    (row,) = probe_of_run(run, fake, AnalyseConfig(times=(1.0,), depths=(1,), epochs=100))  # t = 1: noise alone
    assert row["accuracy"] == pytest.approx(0.5, abs=0.2)


def test_cknna_is_that_of_the_pooled_tokens(run, data):
    config = AnalyseConfig(times=(0.0,), neighbours=5)
    rows = cknna_of_run(run, data, config)
    assert [row["depth"] for row in rows] == [1, 2, 3]  # no depth asked for: all
    images = torch.from_numpy(data.gather("images", np.arange(40)))
    target = load_encoder("tiny")(images, 4).patches.mean(1)
    pixels = (images.float() / 127.5 - 1).mean((2, 3))
    assert rows[0]["cknna"] == pytest.approx(cknna_paper(pixels.tolist(), target.tolist(), 5), abs=1e-4)
    assert rows[1]["cknna"] == pytest.approx(1.0, abs=1e-6)
    assert rows[0]["cknna"] < 0.9


def test_noise_hides_what_the_network_knows(run, data):
    clean, noisy = cknna_of_run(run, data, AnalyseConfig(times=(0.0, 0.9), depths=(2,), neighbours=5))
    assert noisy["cknna"] < clean["cknna"] - 0.2


def test_the_images_are_spread_over_the_data_and_the_batches_do_not_matter(run, data):
    seen = []
    config = AnalyseConfig(times=(0.5,), depths=(1,), num=20, batch_size=7, neighbours=5)
    rows = cknna_of_run(run, data, config, lambda done, total: seen.append((done, total)))
    assert seen == [(7, 20), (14, 20), (20, 20)]
    whole = cknna_of_run(run, data, config.override(batch_size=64))
    assert rows[0]["cknna"] == pytest.approx(whole[0]["cknna"], rel=1e-4)
    assert rows[0]["cknna"] != pytest.approx(
        cknna_of_run(run, data, config.override(num=40))[0]["cknna"], rel=1e-3
    )  # the first 20 alone would be of one class


class Sampling(Autoencoder):
    """Latents are drawn from N(0, 1) whatever the image."""

    def __init__(self):
        super().__init__("sampling", channels=3, factor=1, scale=1.0, shift=0.0)


def test_latents_are_drawn_from_stored_moments_by_a_stream_per_image(run, data):
    """With means 0 and deviations 1 at t = 0 the state at depth 1 is the posterior's noise itself."""
    moments = np.concatenate([np.zeros((40, 3, 4, 4)), np.ones((40, 3, 4, 4))], axis=1).astype(np.float16)

    def gather(field, indices):
        return moments[indices] if field == "moments" else data.gather(field, indices)

    fake = SimpleNamespace(
        num_images=40, num_classes=2, resolution=16, has_images=True, has_moments=True, gather=gather, folder="fake"
    )
    states = []
    run = LoadedRun(Knowing(), DiffusionConfig(), Sampling(), step=0, weights="ema")
    run.model.register_forward_hook(lambda module, args, output: states.append(output.hidden[1]))
    config = AnalyseConfig(times=(0.0,), depths=(1,), batch_size=16, seed=3, epochs=1)
    probe_of_run(run, fake, config)
    drawn = torch.cat(states)
    assert drawn.std() == pytest.approx(1, abs=0.1)
    first = drawn.clone()
    states.clear()
    probe_of_run(run, fake, config.override(batch_size=64))
    assert torch.equal(torch.cat(states), first)
    states.clear()
    probe_of_run(run, fake, config.override(num=20))  # other companions
    chosen = np.linspace(0, 39, 20).round().astype(int)
    assert torch.equal(torch.cat(states), first[chosen])
    assert not torch.equal(first[0], first[1])


def test_mistakes_are_sentences(run, data):
    with pytest.raises(UserError, match="no hidden state at depth 4: this model has blocks 1 to 3"):
        probe_of_run(run, data, AnalyseConfig(depths=(1, 4)))
    with pytest.raises(UserError, match="no hidden state at depth 0"):
        cknna_of_run(run, data, AnalyseConfig(depths=(0,)))
    with pytest.raises(UserError, match="one class: a linear probe needs at least two"):
        probe_of_run(run, SimpleNamespace(num_classes=1, folder="plain"), AnalyseConfig())
    bare = SimpleNamespace(num_images=40, resolution=16, has_images=False, folder="bare")
    with pytest.raises(UserError, match="bare holds no images: prepare it with --store-images"):
        cknna_of_run(run, bare, AnalyseConfig())
    with pytest.raises(UserError, match="Unknown encoder 'tinny'.*'tiny'"):
        cknna_of_run(run, data, AnalyseConfig(encoder="tinny"))


def test_a_real_network(data):
    model = DiT(
        latent_size=16, latent_channels=3, patch_size=4, hidden_dim=32, depth=2, num_heads=2, num_classes=2
    ).eval()
    real = LoadedRun(model, DiffusionConfig(), load_autoencoder("pixels"), step=0, weights="model")
    rows = probe_of_run(real, data, AnalyseConfig(times=(0.0,), epochs=300))
    assert [row["depth"] for row in rows] == [1, 2]
    assert all(row["accuracy"] == 1 for row in rows)
