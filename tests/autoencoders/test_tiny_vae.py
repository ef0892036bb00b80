"""`tiny-vae`, the packaged autoencoder: the quality of its weights, and the tool that trained them."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from repa.autoencoders import PACKAGED, load_autoencoder
from repa.cli.main import run
from repa.data.sources.photographs import photograph_crop

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def vae():
    return load_autoencoder("tiny-vae")


@pytest.fixture(scope="module")
def photographs():
    """uint8 (20, 3, 64, 64): one crop of each photograph, with a seed not used in training."""
    crops = [np.asarray(photograph_crop(index, 64, seed=9)) for index in range(20)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def psnr(a, b):
    return 10 * math.log10(255**2 / float((a.float() - b.float()).square().mean()))


def test_the_packaged_weights_are_small_and_record_their_origin(vae):
    assert (vae.channels, vae.factor, vae.name) == (4, 4, "tiny-vae")
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) < 2_000_000
    with safe_open(PACKAGED / "diffusion_pytorch_model.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["name"] == "tiny-vae"
    assert "CIFAR-10" in facts["data"]


def test_reconstructions_beat_a_small_copy_of_the_photograph(vae, photographs):
    """A copy at a quarter of the size has 3 numbers for every 4 x 4 pixels, a latent has 4."""
    again = vae.decode(vae.sample(vae.encode(photographs), noise=torch.zeros(20, 4, 16, 16)))
    copy = F.interpolate(photographs.float(), size=(16, 16), mode="bicubic", antialias=True)
    enlarged = F.interpolate(copy, size=(64, 64), mode="bicubic").clamp(0, 255)
    assert psnr(again, photographs) > psnr(enlarged, photographs) + 1


def test_latents_have_about_unit_variance(vae, photographs):
    latents = vae.sample(vae.encode(photographs), torch.Generator().manual_seed(0))
    assert 0.7 < latents.std() < 1.4
    assert latents.mean().abs() < 0.3


def test_rotated_latents_decode_to_a_rotated_image(vae, photographs):
    mean = vae.encode(photographs)[:, :4]
    turned = vae.decode((torch.rot90(mean, 1, (2, 3)) - vae.shift) * vae.scale)
    upright = vae.decode((mean - vae.shift) * vae.scale)
    assert psnr(turned, torch.rot90(photographs, 1, (2, 3))) > psnr(upright, photographs) - 2


def test_a_run_trains_and_samples_in_its_latents(tmp_path):
    """Offline, from images to samples."""
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    words = [
        "prepare",
        "photographs:num=20",
        data,
        "--resolution",
        "32",
        "--autoencoder",
        "tiny-vae",
        "--features",
        "tiny",
    ]
    assert run(words) == 0
    small = ["--model.name", "SiT-S/1", "--model.hidden-dim", "16", "--model.depth", "2", "--model.num-heads", "1"]
    small += ["--model.patch-overlap", "0", "--alignments.0.projector", "linear", "--preview.every", "0"]
    words = ["train", "quickstart-repa", "--data", data, "--out", out, "--num-steps", "2", "--batch-size", "4", *small]
    assert run([*words, "--preview.num-scored", "0"]) == 0
    samples = str(tmp_path / "samples.npz")
    assert run(["sample", out, "--num-images", "2", "--steps", "2", "--out", samples]) == 0
    with np.load(samples) as found:
        assert found["arr_0"].shape == (2, 32, 32, 3)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("train_tiny_vae")
    sys.path.remove(str(TOOLS))


def test_the_training_losses_match_their_formulas(tool, photographs):
    class Posterior:
        mean, logvar = torch.full((20, 4, 16, 16), 0.5), torch.full((20, 4, 16, 16), -1.0)

    class Constant:
        """Encodes to a constant posterior and decodes to grey."""

        def encode(self, x):
            return type("Encoded", (), {"latent_dist": Posterior})

        def decode(self, z):
            side = 4 * z.shape[2]
            return type("Decoded", (), {"sample": torch.zeros(20, 3, side, side)})

    x = photographs.float() / 127.5 - 1
    stream = torch.Generator()
    for seed in range(4):  # with and without a transformation
        found = tool.losses(Constant(), lambda x: x.mean((2, 3)), x, stream.manual_seed(seed))
        assert float(found["kl"]) == pytest.approx(tool.KL * 0.5 * (0.25 + math.exp(-1) - 1 + 1), rel=1e-5)
        assert float(found["features"]) == pytest.approx(
            tool.PERCEPTUAL * float(x.mean((2, 3)).square().mean()), rel=0.01
        )
    kept = next(seed for seed in range(9) if _keeps(stream.manual_seed(seed)))
    stream.manual_seed(kept)
    found = tool.losses(Constant(), lambda x: x.mean((2, 3)), x, stream)
    assert float(found["pixels"]) == pytest.approx(float(x.abs().mean()), rel=1e-5)


def _keeps(stream):
    """Whether `losses` leaves the latents untransformed with this stream."""
    torch.randn((20, 4, 16, 16), generator=stream)
    return torch.rand((), generator=stream) >= 0.5


def test_training_resumes(tool, tmp_path, photographs):
    state = tmp_path / "state.pt"
    first = tool.Training(state, seed=0)
    before = first.vae.decoder.conv_out.weight.detach().clone()
    first.step(lambda x: x.mean((2, 3)), photographs[:2], progress=0.1)
    first.save()
    assert not torch.equal(first.vae.decoder.conv_out.weight, before)
    second = tool.Training(state, seed=0)
    assert second.steps == 1
    assert torch.equal(second.vae.decoder.conv_out.weight, first.vae.decoder.conv_out.weight)
    tool.ship(second.vae, tmp_path / "out", 1.25, {"name": "tiny-vae"})
    shipped = load_autoencoder("kl", weights=tmp_path / "out")
    assert (shipped.scale, shipped.factor, shipped.channels) == (1.25, 4, 4)
    weight = second.vae.decoder.conv_out.weight.half().float()
    assert torch.equal(shipped.vae.decoder.conv_out.weight, weight)
