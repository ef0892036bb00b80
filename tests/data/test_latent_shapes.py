"""From images to samples with other latent shapes: channels, factor and resolution come from the autoencoder."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from repa.alignment.config import AlignmentConfig
from repa.autoencoders import load_autoencoder, load_decoder
from repa.base.errors import UserError
from repa.data import PrepareConfig, open_data, prepare
from repa.models.config import ModelConfig
from repa.runs import load_run
from repa.sampling import SampleConfig, generate
from repa.training import TrainConfig, train
from tests.autoencoders.folders import save_dc, save_kl, save_rae, save_tiny
from tests.calls import call
from tests.data.conftest import all_rows

CASES = {  # spec, tiny stand-in, its settings, resolution, expected (channels, side)
    "shifted-16-channels": ("sd3-vae", save_kl, {"latent_channels": 16, "shift_factor": 0.6}, 32, (16, 8)),
    "twice-the-resolution": ("sd3-vae", save_kl, {"latent_channels": 16, "shift_factor": 0.6}, 64, (16, 16)),
    "per-channel": ("kl", save_kl, {"latents_mean": [1.0] * 5, "latents_std": [2, 3, 4, 5, 6]}, 32, (5, 8)),
    "deterministic": ("dc-ae-f32", save_dc, {"scaling_factor": 0.3}, 32, (8, 8)),
    "representation": ("rae", save_rae, {}, 32, (64, 4)),
    "distilled": ("taesd", save_tiny, {}, 48, (4, 12)),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request, image_folder, tmp_path_factory):
    """Data prepared with one of these: spec, weight folder, data, resolution, expected shape."""
    spec, save, settings, resolution, shape = request.param
    root = tmp_path_factory.mktemp("shapes")
    weights = save(root / "weights", **settings)
    config = PrepareConfig(
        resolution=resolution, autoencoder=spec, autoencoder_weights=str(weights), features=("tiny",), shard_size=16
    )
    prepare(str(image_folder), root / "data", config)
    return spec, weights, open_data(root / "data"), resolution, shape


def test_stored_moments_match_the_images(case):
    spec, weights, data, resolution, (channels, side) = case
    autoencoder = load_autoencoder(spec, weights=weights)
    assert (data.latent_channels, data.latent_size, data.resolution) == (channels, side, resolution)
    assert data.manifest.autoencoder == {"spec": spec, **json.loads(json.dumps(autoencoder.identity))}
    rows = [0, 17, 39]
    images, moments = all_rows(data, "images")[rows], all_rows(data, "moments")[rows]
    assert (images.shape, images.dtype) == ((3, 3, resolution, resolution), np.uint8)
    stored = (2 if autoencoder.stochastic else 1) * channels
    assert (moments.shape, moments.dtype) == ((3, stored, side, side), np.float16)
    for image, stored in zip(images, moments, strict=True):
        expected = autoencoder.encode(torch.from_numpy(image[None]))[0].numpy()
        np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=2e-4)  # float16
    assert moments[:, -channels:].any()  # no half of zeros


def test_a_run_trains_and_samples_at_that_shape(case, tmp_path):
    spec, weights, data, resolution, (channels, side) = case
    config = TrainConfig(
        model=ModelConfig(name="SiT-S/4", hidden_dim=16, depth=1, num_heads=2),
        alignments=(AlignmentConfig(target="tiny", depth=1, projector="mlp:width=8"),),
        autoencoder_weights=str(weights), batch_size=4, num_steps=2, log_every=1, precision="fp32",
    )  # fmt: skip
    train(config, data, tmp_path / "run", device=torch.device("cpu"), say=lambda text: None)
    run = load_run(tmp_path / "run")
    assert run.autoencoder.name == spec
    assert run.latent_shape == (channels, side, side)
    assert call(run.model, torch.zeros(1, *run.latent_shape), torch.ones(1), torch.zeros(1).long(), (1,)).hidden[1].shape == (
        1, (side // 4) ** 2, 16,
    )  # fmt: skip
    samples = generate(run, SampleConfig(sampler="euler", steps=2, precision="fp32"), range(2)).images
    assert (samples.dtype, samples.shape) == (torch.uint8, (2, 3, resolution, resolution))


def test_a_faster_decoder_previews_a_run(image_folder, tmp_path):
    """A fast decoder replaces the run's autoencoder and receives the same latents."""
    weights = save_kl(tmp_path / "kl", latent_channels=4, shift_factor=0.3)
    config = PrepareConfig(resolution=32, autoencoder="sd-vae-ft-mse", autoencoder_weights=str(weights))
    prepare(str(image_folder), tmp_path / "data", config)
    training = TrainConfig(
        model=ModelConfig(name="SiT-S/4", hidden_dim=16, depth=1, num_heads=2),
        autoencoder_weights=str(weights), batch_size=4, num_steps=1, precision="fp32",
    )  # fmt: skip
    train(training, open_data(tmp_path / "data"), tmp_path / "run", device=torch.device("cpu"), say=lambda text: None)
    run = load_run(tmp_path / "run")
    tiny = save_tiny(tmp_path / "tiny")
    fast = dataclasses.replace(run, autoencoder=load_decoder("taesd", run.autoencoder, weights=tiny))
    seen = []
    decode = fast.autoencoder.decoder.decode
    fast.autoencoder.decoder.decode = lambda latents, *dtype: seen.append(latents) or decode(latents, *dtype)
    sampling = SampleConfig(sampler="euler", steps=2, precision="fp32")
    images = generate(fast, sampling, range(2)).images
    full = generate(run, sampling, range(2)).images
    assert images.shape == full.shape == (2, 3, 32, 32)
    assert torch.equal(run.autoencoder.decode(seen[0]), full)
    assert not torch.equal(images, full)


def test_a_resolution_that_the_factor_does_not_divide_is_refused(image_folder, tmp_path):
    weights = save_dc(tmp_path / "weights")
    config = PrepareConfig(resolution=30, autoencoder="dc-ae-f32", autoencoder_weights=str(weights))
    with pytest.raises(UserError, match="needs images with sides that are multiples of 4, but got 30 x 30"):
        prepare(str(image_folder), tmp_path / "data", config)
