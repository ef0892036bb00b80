"""CKNNA and CKA of a whole run, with a stand-in network whose hidden states are known."""

import shutil

import pytest
import torch

from repa.analysis import cknna_of_run, features
from repa.analysis.config import SimilarityConfig, checkpoints_of
from repa.base import files
from repa.base.errors import UserError
from repa.encoders import load_encoder
from repa.runs import layout, load_run
from tests.analysis.stand_ins import Rearranged
from tests.oracles import analysis as oracle


def test_cknna_is_computed_on_pooled_tokens(run, data):
    config = SimilarityConfig(times=(0.0,), neighbours=5)
    rows = cknna_of_run(run, data, config)
    assert [row["depth"] for row in rows] == [1, 2, 3]  # by default all depths
    images = torch.from_numpy(data.gather("images", range(40)))
    target = load_encoder("tiny")(images, 4).patches.mean(1)
    pixels = (images.float() / 127.5 - 1).mean((2, 3))
    assert rows[0]["cknna"] == pytest.approx(oracle.cknna_paper(pixels.tolist(), target.tolist(), 5), abs=1e-4)
    assert rows[1]["cknna"] == pytest.approx(1.0, abs=1e-6)
    assert rows[0]["cknna"] < 0.9


def test_cknna_falls_with_the_noise_level(run, data):
    clean, noisy = cknna_of_run(run, data, SimilarityConfig(times=(0.0, 0.9), depths=(2,), neighbours=5))
    assert noisy["cknna"] < clean["cknna"] - 0.2


def test_images_are_spread_over_the_data_and_the_batch_size_does_not_matter(run, data):
    seen = []
    config = SimilarityConfig(times=(0.5,), depths=(1,), num_images=20, batch_size=7, neighbours=5)
    rows = cknna_of_run(run, data, config, lambda done, total: seen.append((done, total)))
    assert seen == [(20, 40), (40, 40)]  # the encoder, then the network
    whole = cknna_of_run(run, data, config.override(batch_size=64))
    assert rows[0]["cknna"] == pytest.approx(whole[0]["cknna"], rel=1e-4)
    # the first 20 images are all of one class
    assert rows[0]["cknna"] != pytest.approx(
        cknna_of_run(run, data, config.override(num_images=40))[0]["cknna"], rel=1e-3
    )


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_of_a_run_is_that_of_its_tokens(run, data, unbiased):
    measure = "cka-unbiased" if unbiased else "cka"
    config = SimilarityConfig(times=(0.0,), depths=(1, 2), measure=measure)
    first, second = cknna_of_run(run, data, config)
    images = torch.from_numpy(data.gather("images", range(40)))
    target = load_encoder("tiny")(images, 4).patches.mean(1)
    pixels = (images.float() / 127.5 - 1).mean((2, 3))
    assert first[measure] == pytest.approx(oracle.cka(pixels.tolist(), target.tolist(), unbiased), abs=1e-4)
    assert second[measure] == pytest.approx(1, abs=1e-6)


def test_mistakes_give_one_line_errors(run, data):
    with pytest.raises(UserError, match="no block 0"):
        cknna_of_run(run, data, SimilarityConfig(depths=(0,)))
    with pytest.raises(UserError, match="encoder 'tinny'.*'tiny'"):
        SimilarityConfig.parse({"encoder": "tinny"})
    with pytest.raises(UserError, match=r"10 neighbours need more than 10 images, but there are 10"):
        cknna_of_run(run, data, SimilarityConfig(num_images=10))
    with pytest.raises(UserError, match="stores no images: prepare the data with --store-images"):
        cknna_of_run(run, Rearranged(data, has_images=False), SimilarityConfig())
    with pytest.raises(UserError, match="latents of side 32 for this run, which was trained on 16"):
        cknna_of_run(run, Rearranged(data, resolution=32), SimilarityConfig())
    facts = {"sha256": "other", "scale": 1.0, "shift": 0.0, "name": "sd-vae-ft-ema"}
    with pytest.raises(UserError, match=r"latents of sd-vae-ft-ema, but .* those of pixels \(different: sha256\)"):
        cknna_of_run(run, Rearranged(data, has_moments=True, autoencoder=facts), SimilarityConfig())


def test_features_are_collected_again_only_after_a_change(run, data, tmp_path):
    """The second call runs neither network nor encoder; a new noise level, seed or weights run them again."""
    calls = []
    run.model.register_forward_hook(lambda *_: calls.append(1))
    config = SimilarityConfig(times=(0.0,), depths=(1, 3), measure="cka", cache=str(tmp_path))
    first = cknna_of_run(run, data, config)
    assert len(calls) == 1
    assert str(cknna_of_run(run, data, config.override(batch_size=5))) == str(first)
    assert len(calls) == 1
    cknna_of_run(run, data, config.override(depths=(3,)))
    assert len(calls) == 1
    for count, change in enumerate([{"depths": (2,)}, {"times": (0.1,)}, {"seed": 1}, {"num_images": 30}], start=2):
        cknna_of_run(run, data, config.override(**change))
        assert len(calls) == count, change
    run.model.anchor.data += 1
    cknna_of_run(run, data, config)
    assert len(calls) == count + 1


def test_cached_features_are_keyed_by_the_checksum_of_the_weights(random_run, data, monkeypatch):
    """The file is read once for all noise levels; checkpoints and averages have separate caches."""
    monkeypatch.setattr(features, "digest_of", lambda tensors: pytest.fail("read the weights again"))
    runs = [load_run(random_run, weights, step=step) for weights, step in (("ema", 20), ("ema", 10), ("model", 20))]
    identities = [features._identity_of_run(loaded)["weights"] for loaded in runs]
    assert len(set(identities)) == 3
    assert identities[0] == files.sha256(layout.checkpoint_folder(random_run, 20) / layout.EMA_FILE)


def test_features_of_a_read_only_run_go_to_the_users_cache(tmp_path, monkeypatch):
    assert features._cache_of(tmp_path) == tmp_path / "analysis" / "cache"
    monkeypatch.setattr(features.os, "access", lambda folder, mode: False)
    assert features._cache_of(tmp_path) == files.cache_folder() / "analysis"


def test_the_newest_checkpoint_is_chosen_at_loading_time(random_run, tmp_path):
    """Training may remove the checkpoint that was the newest when the command began."""
    run = tmp_path / "run"
    shutil.copytree(random_run, run)
    (chosen,) = checkpoints_of([run])
    shutil.rmtree(layout.checkpoint_folder(run, 20))
    assert chosen.load("ema", "", "cpu").step == 10
