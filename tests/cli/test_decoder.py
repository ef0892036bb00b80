"""Previews and samples through a fast decoder for the same latents, on the command line."""

import numpy as np
import pytest

from repa.cli.main import run
from repa.runs import read_metrics
from tests.autoencoders.folders import save_kl, save_tiny


@pytest.fixture(scope="module")
def house(image_folder, tmp_path_factory):
    """A short run in the latents of a tiny KL autoencoder, with previews decoded by a tiny TAESD."""
    root = tmp_path_factory.mktemp("decoder")
    kl, tiny = save_kl(root / "kl", latent_channels=4), save_tiny(root / "tiny")
    words = (
        f"prepare {image_folder} {root / 'data'} --resolution 32 --autoencoder sd-vae-ft-mse --autoencoder-weights {kl}"
    )
    assert run(words.split()) == 0
    words = (
        f"train sit-b2 --data {root / 'data'} --out {root / 'run'} --model.name SiT-S/2 --model.hidden-dim 16 --model.depth 1 "
        f"--model.num-heads 1 --batch-size 4 --num-steps 2 --autoencoder-weights {kl} --preview.every 2 --preview.num-images 2 "
        f"--preview.num-scored 4 --preview.num-steps 2 --preview.decoder taesd --preview.decoder-weights {tiny}"
    )
    assert run(words.split()) == 0
    return root


def sample(house, name, *more):
    out = house / f"{name}.npz"
    assert run(["sample", str(house / "run"), "--num-images", "2", "--steps", "2", "--out", str(out), *more]) == 0
    with np.load(out, allow_pickle=False) as archive:
        return archive["arr_0"]


def test_previews_record_their_decoder(house):
    (row,) = [row for row in read_metrics(house / "run") if row["kind"] == "eval"]
    assert row["decoder"] == "taesd"
    assert row["frechet_distance"] > 0


def test_samples_of_another_decoder_differ_but_have_the_same_size(house):
    own = sample(house, "own")
    fast = sample(house, "fast", "--decoder", "taesd", "--decoder-weights", str(house / "tiny"))
    assert own.shape == fast.shape == (2, 32, 32, 3)
    assert not np.array_equal(own, fast)


def test_a_decoder_for_other_latents_gives_a_one_line_error(house, capsys):
    words = ["sample", str(house / "run"), "--out", str(house / "x.npz"), "--decoder", "pixels"]
    assert run(words) == 2
    assert "cannot be decoded by 'pixels'" in capsys.readouterr().err
