"""Linear probes of a run and of encoders, with a stand-in network whose hidden states are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from repa.analysis import linear_probes, probe_of_encoder, probe_of_run
from repa.analysis.config import ProbeConfig
from repa.analysis.hidden import spaced_rows
from repa.base.errors import UserError
from repa.diffusion.config import DiffusionConfig
from repa.encoders import load_encoder
from repa.models import DiT, Tap
from repa.runs import LoadedRun
from tests.analysis.stand_ins import Knowing, Rearranged, Sampling


def test_a_probe_finds_classes_only_in_informative_blocks(run, data):
    config = ProbeConfig(times=(0.0, 0.3), depths=(1, 3), epochs=400)
    rows = probe_of_run(run, data, config)
    assert [(row["t"], row["depth"]) for row in rows] == [(0.0, 1), (0.0, 3), (0.3, 1), (0.3, 3)]
    for row in rows:  # 8 test images, whose classes differ in mean colour
        assert row["top1"] == 1 if row["depth"] == 1 else row["top1"] < 0.8, row
        assert row["top5"] is None
        assert row["lr"] == 1e-3


def test_a_probe_of_pure_noise_is_at_chance(run, data):
    shuffled = np.random.default_rng(0).permutation(data.gather("labels", np.arange(40)))
    # enough for a test share of 80
    many = Rearranged(data, rows=np.tile(np.arange(40), 10), fields={"labels": shuffled})
    (row,) = probe_of_run(run, many, ProbeConfig(times=(1.0,), depths=(1,), epochs=100))  # t = 1: only noise
    assert row["top1"] == pytest.approx(0.5, abs=0.2)


def test_training_data_is_trained_on_and_validation_data_is_tested_on(run, data):
    """With swapped labels in the test data, or in the training data, a perfect probe is always wrong."""
    swapped = Rearranged(data, fields={"labels": 1 - data.gather("labels", np.arange(40))})
    config = ProbeConfig(times=(0.0,), depths=(1,), epochs=200)
    seen = []
    assert probe_of_run(run, data, config, data)[0]["top1"] == 1
    assert probe_of_run(run, data, config, swapped, lambda *n: seen.append(n))[0]["top1"] == 0
    assert seen == [(40, 80), (80, 80)]
    wrong = data.gather("labels", np.arange(40))
    wrong[10:15] = 1 - wrong[10:15]
    few = Rearranged(data, rows=np.arange(10, 30), fields={"labels": wrong})  # 20 images, 5 labels of them wrong
    seen.clear()
    assert probe_of_run(run, data, config, few, lambda *n: seen.append(n))[0]["top1"] == 0.75
    assert seen == [(40, 60), (60, 60)]


def test_images_are_spread_over_the_originals():
    mirrored = SimpleNamespace(originals=range(0, 80, 2))
    assert spaced_rows(mirrored, 0).tolist() == list(range(0, 80, 2))
    assert spaced_rows(mirrored, 3).tolist() == [0, 40, 78]
    assert spaced_rows(SimpleNamespace(originals=range(7)), 100).tolist() == list(range(7))


def test_every_learning_rate_has_a_row(run, data):
    config = ProbeConfig(times=(0.0,), depths=(1, 3), learning_rates=(1e-9, 1e-1), epochs=60)
    rows = probe_of_run(run, data, config)
    assert [(row["depth"], row["lr"]) for row in rows] == [(1, 1e-9), (1, 1e-1), (3, 1e-9), (3, 1e-1)]
    assert rows[1]["top1"] == 1


def test_epochs_of_the_heads_are_counted(run, data):
    seen = []
    config = ProbeConfig(times=(0.0, 0.5), depths=(1, 3), epochs=2)
    probe_of_run(run, data, config, heads_progress=lambda *n: seen.append(n))
    assert seen == [(done, 8) for done in range(1, 9)]  # 2 noise levels, 2 blocks, 2 epochs
    seen.clear()
    config = ProbeConfig(epochs=3)
    probe_of_encoder(load_encoder("tiny"), "tiny", data, config, heads_progress=lambda *n: seen.append(n))
    assert seen == [(done, 6) for done in range(1, 7)]  # patches and pooled


def test_a_probe_of_an_encoder_uses_its_features(data):
    encoder = load_encoder("tiny")
    rows = probe_of_encoder(encoder, "tiny", data, ProbeConfig(epochs=3), val=data)
    assert [row["features"] for row in rows] == ["patches", "pooled"]
    features = encoder(torch.from_numpy(data.gather("images", np.arange(40))), 4)
    labels = torch.from_numpy(data.labels)
    for row, x in zip(rows, (features.patches.mean(1), features.pooled), strict=True):
        assert row["top1"] == linear_probes(x, labels, x, labels, epochs=3, batch_size=256)[0].top1


def test_latents_are_drawn_with_one_random_stream_per_image(data):
    """With means 0 and deviations 1, the state at depth 1 and t = 0 is the posterior's noise itself."""
    moments = np.concatenate([np.zeros((40, 3, 4, 4)), np.ones((40, 3, 4, 4))], axis=1).astype(np.float16)
    own = Sampling().identity
    fake = Rearranged(data, fields={"moments": moments}, has_moments=True, latent_size=4, autoencoder=own)
    states = []
    network = Knowing()
    network.state_shapes = {"x": (3, 4, 4)}
    run = LoadedRun(network, DiffusionConfig(), Sampling(), step=0, weights="ema")
    run.model.register_forward_hook(lambda module, args, output: states.append(output.taps[Tap(1)]))
    config = ProbeConfig(times=(0.0,), depths=(1,), batch_size=16, seed=3, epochs=1)
    probe_of_run(run, fake, config)
    drawn = torch.cat(states)
    assert drawn.std() == pytest.approx(1, abs=0.1)
    first = drawn.clone()
    states.clear()
    probe_of_run(run, fake, config.override(batch_size=64))
    assert torch.equal(torch.cat(states), first)
    states.clear()
    probe_of_run(run, fake, config.override(num_images=20))  # other images in the batch
    chosen = np.linspace(0, 39, 20).round().astype(int)
    assert torch.equal(torch.cat(states), first[chosen])
    assert not torch.equal(first[0], first[1])


def test_noise_is_drawn_with_one_random_stream_per_image(run, data):
    states = []
    run.model.register_forward_hook(lambda module, args, output: states.append(output.taps[Tap(1)]))
    config = ProbeConfig(times=(1.0,), depths=(1,), epochs=1)
    probe_of_run(run, data, config)
    probe_of_run(run, data, config.override(num_images=20))
    assert torch.equal(states[1], states[0][np.linspace(0, 39, 20).round().astype(int)])


def test_mistakes_give_one_line_errors(run, data):
    with pytest.raises(UserError, match="no block 4 to tap: choose one of 1 to 3"):
        probe_of_run(run, data, ProbeConfig(depths=(1, 4)))
    with pytest.raises(UserError, match="has one class, but a linear probe needs several"):
        probe_of_run(run, Rearranged(data, num_classes=1), ProbeConfig())
    with pytest.raises(UserError, match="2 classes at 16 pixels .* Give data with the same class names"):
        probe_of_run(run, data, ProbeConfig(), Rearranged(data, class_names=("light", "dark")))
    with pytest.raises(UserError, match="greater than 0"):
        ProbeConfig.parse({"learning_rates": (0.0,)})


def test_a_real_network_can_be_probed(data):
    from repa.autoencoders import load_autoencoder

    model = DiT(
        latent_size=16, latent_channels=3, patch_size=4, hidden_dim=32, depth=2, num_heads=2, num_classes=2
    ).eval()
    real = LoadedRun(model, DiffusionConfig(), load_autoencoder("pixels"), step=0, weights="model")
    rows = probe_of_run(real, data, ProbeConfig(times=(0.0,), epochs=300))
    assert [row["depth"] for row in rows] == [1, 2]
    assert all(row["top1"] == 1 for row in rows)


def test_test_classes_without_training_images_are_refused(run, data):
    config = ProbeConfig(times=(0.0,), depths=(1,), epochs=1)
    zeros, ones = (Rearranged(data, fields={"labels": np.full(40, label)}) for label in (0, 1))
    with pytest.raises(UserError, match="1 of 2 classes occur in the 40 test images but not in the 40 training images"):
        probe_of_run(run, zeros, config, ones)
    rows = spaced_rows(data, 0)
    lone = [Rearranged(data, fields={"labels": (rows == row).astype(np.int64)}) for row in rows]  # a class of one image
    said = []
    for few in lone[:12]:
        try:
            probe_of_run(run, few, config)
        except UserError as error:
            said.append(str(error))
    assert 0 < len(said) < 12  # refused only when this image is in the test set
    assert all("1 of 2 classes occur in the 8 test images" in sentence for sentence in said)
