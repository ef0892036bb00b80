"""Distances are zero for identical images and grow with corruption; references, metrics and errors."""

import importlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from repa.base.errors import UserError
from repa.data import PrepareConfig, open_data, prepare
from repa.encoders import load_encoder
from repa.evaluation import (
    EvaluateConfig,
    evaluate,
    evaluate_file,
    load_extractor,
    make_reference,
    reference,
    reference_of,
)
from repa.evaluation.config import ReferenceConfig
from repa.evaluation.images import DataImages
from repa.evaluation.reference import kept_reference
from tests.oracles import metrics as oracle

ALL = ("fd", "kd", "precision", "recall")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(data_folder):
    return open_data(data_folder)


@pytest.fixture(scope="module")
def extractor():
    return load_encoder("tiny-classifier")


@pytest.fixture(scope="module")
def images(data):
    return torch.from_numpy(data.gather("images", np.arange(data.num_images)))


@pytest.fixture(scope="module")
def features(images, extractor):
    return pooled(images, extractor)


def pooled(images, extractor):
    return extractor(images, extractor.grid_for(images.shape[-1])).pooled.float()


def noisy(images, level):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + level * noise).clamp(0, 255).to(torch.uint8)


def save(path, images):
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy())
    return path


def test_images_have_distance_zero_to_themselves(data, extractor, images):
    found = evaluate(images.split(7), extractor, reference_of(data, extractor, "tiny-classifier"), ALL)
    assert found.keys() == set(ALL)
    assert found["fd"] < 1e-5
    assert (found["precision"], found["recall"]) == (1.0, 1.0)
    assert found["kd"] < 0  # unbiased, so a set against itself is below 0


def test_distances_grow_with_corruption(data, extractor, images):
    found = [
        evaluate([noisy(images, level)], extractor, reference_of(data, extractor, "tiny-classifier"), ALL)
        for level in (0, 20, 60, 120)
    ]
    for name in ("fd", "kd"):
        values = [row[name] for row in found]
        assert values == sorted(values), name
        assert values[-1] > values[1]
    assert found[-1]["precision"] < 0.5


def test_the_covariance_is_computed_only_when_needed(data, extractor, images, monkeypatch):
    known, updated = reference_of(data, extractor, "tiny-classifier"), []
    monkeypatch.setattr("repa.evaluation.measure.Statistics.update", lambda self, features: updated.append(features))
    assert evaluate([images], extractor, known, ("kd", "precision", "recall")).keys() == {"kd", "precision", "recall"}
    assert not updated


def test_precision_and_recall_are_not_swapped(data, extractor, images):
    """With one class of two, every sample resembles a real image, but half of the real images resemble no sample."""
    one_class = images[torch.from_numpy(data.labels) == 0]
    found = evaluate([one_class], extractor, reference_of(data, extractor, "tiny-classifier"), ("precision", "recall"))
    assert found["precision"] == 1.0
    assert 0.4 < found["recall"] < 0.7
    grey = evaluate(
        [torch.full((20, 3, 16, 16), 255, dtype=torch.uint8)],
        extractor,
        reference_of(data, extractor, "tiny-classifier"),
        ALL[2:],
    )
    assert grey == {"precision": 0.0, "recall": 0.0}


@pytest.mark.parametrize("size", [1, 7, 64])
def test_streaming_equals_computing_on_all_features(size, data, extractor, images, features):
    samples = noisy(images, 40)[:33]
    found = evaluate(samples.split(size), extractor, reference_of(data, extractor, "tiny-classifier"), ALL)
    real = features.double().numpy()
    fake = pooled(samples, extractor).double().numpy()
    wanted = oracle.frechet(real.mean(0), np.cov(real.T), fake.mean(0), np.cov(fake.T))
    assert found["fd"] == pytest.approx(wanted, rel=1e-3)  # the oracle takes the root of an asymmetric low-rank product
    assert found["precision"] == pytest.approx(oracle.share_within(fake, real, 3))
    assert found["recall"] == pytest.approx(oracle.share_within(real, fake, 3))
    # every subset has all 33 samples and 33 of the 40 real images
    assert found["kd"] == pytest.approx(oracle.kernel_distance(real, fake, 3), rel=0.1)


def test_only_requested_metrics_are_computed(data, extractor, images):
    assert evaluate([images], extractor, reference_of(data, extractor, "tiny-classifier")).keys() == {"fd"}
    assert evaluate([images], extractor, reference_of(data, extractor, "tiny-classifier"), ("recall",)).keys() == {
        "recall"
    }


def test_a_file_of_samples_is_measured(data, images, tmp_path):
    seen = []
    path = save(tmp_path / "s.npz", noisy(images, 20))
    config = EvaluateConfig(features="tiny-classifier", metrics=ALL, batch_size=16)
    found = evaluate_file(path, data.folder, config, device=CPU, progress=lambda *counts: seen.append(counts))
    assert seen == [(0, 40), (16, 40), (32, 40), (40, 40)]
    assert (found["num_samples"], found["num_reference"]) == (40, 40)
    assert found["encoder"]["name"] == "tiny-classifier"
    extractor = load_encoder("tiny-classifier")
    assert found["metrics"] == evaluate(
        noisy(images, 20).split(16), extractor, reference_of(data, extractor, "tiny-classifier"), ALL
    )
    json.dumps(found)


def test_half_precision_features_are_recorded_and_need_such_a_reference(data, images, tmp_path):
    """Cached references are kept per precision; a reference file of another precision is refused."""
    config = EvaluateConfig(features="tiny-classifier", metrics=("fd",), features_precision="bf16", batch_size=16)
    exact = config.override(features_precision="fp32")
    whole = save(tmp_path / "whole.npz", images)
    itself, path = evaluate_file(whole, data.folder, config, device=CPU), save(tmp_path / "s.npz", noisy(images, 20))
    half, fp32 = (evaluate_file(path, data.folder, c, device=CPU) for c in (config, exact))
    assert (half["arithmetic"]["features"], fp32["arithmetic"]["features"]) == ("bfloat16", "float32")
    assert itself["metrics"]["fd"] < 1e-5  # the reference was also computed in bf16
    assert 0 < abs(half["metrics"]["fd"] / fp32["metrics"]["fd"] - 1) < 0.01
    assert len(half["warnings"]) == len(fp32["warnings"]) + 1
    own = ReferenceConfig(features="tiny-classifier", features_precision="bf16")
    make_reference(data.folder, tmp_path / "bf16.npz", own, device=CPU)
    assert evaluate_file(path, tmp_path / "bf16.npz", config, device=CPU)["metrics"] == half["metrics"]
    with pytest.raises(UserError, match=r"weights [0-9a-f]{12}, bf16\), but the samples .*weights [0-9a-f]{12}\)"):
        evaluate_file(path, tmp_path / "bf16.npz", exact, device=CPU)


def test_another_image_size_is_refused_before_slow_work(data, tmp_path, monkeypatch):
    room = importlib.import_module("repa.evaluation.jobs")
    monkeypatch.setattr(room, "load_extractor", lambda *a, **k: pytest.fail("an encoder was loaded"))
    for shape, sentence in (
        ((4, 8, 8, 3), "samples have 8 pixels, but .* has 16: compare images of the same size"),
        ((4, 16, 8, 3), "holds images of 16x8 pixels: crop them to squares"),
    ):
        np.savez(tmp_path / "s.npz", arr_0=np.zeros(shape, np.uint8))
        with pytest.raises(UserError, match=sentence):
            evaluate_file(tmp_path / "s.npz", data.folder, EvaluateConfig(), device=CPU)


@pytest.mark.parametrize(("num", "message"), [(0, "holds no images"), (1, "has 1 image, but")])
def test_too_few_images_are_refused(num, message, data, images, tmp_path):
    path = save(tmp_path / "s.npz", images[:num])
    with pytest.raises(UserError, match=message):
        evaluate_file(path, data.folder, EvaluateConfig(), device=CPU)


def test_three_images_are_too_few_for_three_neighbours(data, images, tmp_path):
    path = save(tmp_path / "s.npz", images[:3])
    config = EvaluateConfig(features="tiny-classifier", metrics=("fd",))
    assert evaluate_file(path, data.folder, config, device=CPU)["metrics"]["fd"] > 0
    with pytest.raises(UserError, match=r"need more than 3 images, but .*s\.npz has 3"):
        evaluate_file(path, data.folder, EvaluateConfig(features="tiny-classifier"), device=CPU)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"features": "tiny-clasifier"}, "Did you mean 'tiny-classifier'"),
        ({"metrics": ("fdd",)}, "metrics 'fdd' is not measured .* Did you mean 'fid'"),
        ({"metrics": ("fd",)}, "'fd'.* inception.* fid, sfid"),
        ({"features": "tiny", "metrics": ("is",)}, "'inception_score' is not measured in the features of tiny"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_invalid_metrics_and_features_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        EvaluateConfig.parse(change)


class TestReference:
    @pytest.fixture
    def copy(self, image_folder, tmp_path):
        prepare(str(image_folder), tmp_path / "d", PrepareConfig(resolution=16))
        return open_data(tmp_path / "d")

    def test_the_reference_is_computed_once(self, copy, extractor, features, monkeypatch):
        first = reference_of(copy, extractor, "tiny-classifier")
        real = features.double().numpy()
        np.testing.assert_allclose(first.statistics.mean.numpy(), real.mean(0), atol=1e-6)
        np.testing.assert_allclose(first.statistics.covariance.numpy(), np.cov(real.T), atol=1e-6)
        torch.testing.assert_close(first.subset, features)
        monkeypatch.setattr(reference, "compute_reference", lambda *a: pytest.fail("computed again"))
        second = reference_of(copy, extractor, "tiny-classifier")
        assert torch.equal(second.subset, first.subset)
        torch.testing.assert_close(second.statistics.covariance, first.statistics.covariance)
        open_data(copy.folder).check()  # the data is still valid

    def test_every_encoder_has_a_reference(self, copy, extractor):
        assert reference_of(copy, extractor, "tiny-classifier").subset.shape == (40, 128)
        assert reference_of(copy, load_encoder("tiny"), "tiny").subset.shape == (40, 192)

    @pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"hello" * 100])
    def test_a_damaged_reference_is_computed_again_when_removed(self, damage, copy, extractor):
        first = reference_of(copy, extractor, "tiny-classifier")
        (path,) = (copy.folder / "reference").iterdir()
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(UserError, match="cannot be read as a reference: .* Delete it; it will be computed again"):
            reference_of(copy, extractor, "tiny-classifier")
        path.unlink()
        assert torch.equal(reference_of(copy, extractor, "tiny-classifier").subset, first.subset)

    def test_other_data_in_the_same_folder_have_another_reference(self, copy, image_folder, extractor, tmp_path):
        """As after `rsync` or `cp -r` of new data over old, which leaves the folder `reference`."""
        first = reference_of(copy, extractor, "tiny-classifier")
        for path in image_folder.rglob("*.png"):
            (tmp_path / "other" / path.parent.name).mkdir(parents=True, exist_ok=True)
            ImageOps.invert(Image.open(path).convert("RGB")).save(tmp_path / "other" / path.parent.name / path.name)
        config = PrepareConfig(resolution=16, features=("tiny",), shard_size=16)
        prepare(str(tmp_path / "other"), tmp_path / "new", config)
        shutil.copytree(tmp_path / "new", copy.folder, dirs_exist_ok=True)
        second = reference_of(open_data(copy.folder), extractor, "tiny-classifier")
        assert torch.equal(
            second.subset, reference_of(open_data(tmp_path / "new"), extractor, "tiny-classifier").subset
        )
        assert not torch.allclose(second.subset, first.subset)

    def test_a_subset_is_evenly_spaced(self, copy, extractor, features, monkeypatch):
        monkeypatch.setattr(reference, "SUBSET", 10)
        images = DataImages(copy)
        # 7: not a multiple of 4
        found = kept_reference(images, load_extractor("tiny-classifier"), "tiny-classifier", batch_size=7)
        torch.testing.assert_close(found.subset, features[::4])
        assert found.statistics.count == 40
        assert reference.subset_of(25).tolist() == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
        assert reference.subset_of(4).tolist() == [0, 1, 2, 3]

    def test_mirrored_copies_are_not_in_the_reference(self, copy, extractor, features, monkeypatch):
        monkeypatch.setattr(copy, "originals", range(25))
        found = reference_of(copy, extractor, "tiny-classifier")
        torch.testing.assert_close(found.subset, features[:25])
        assert found.statistics.count == 25

    def test_the_reference_of_read_only_data_goes_to_the_cache(self, copy, extractor, tmp_path, monkeypatch):
        monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        reference_of(copy, extractor, "tiny-classifier")
        assert not (copy.folder / "reference").exists()
        assert len(list((tmp_path / "cache/reference").iterdir())) == 1
        monkeypatch.setattr(reference, "compute_reference", lambda *a: pytest.fail("computed again"))
        reference_of(copy, extractor, "tiny-classifier")

    def test_data_without_images_is_refused_as_reference(self, copy, extractor, monkeypatch):
        monkeypatch.setattr(copy, "has_images", False)
        with pytest.raises(
            UserError, match="stores no images to measure against: prepare the data with --store-images true"
        ):
            reference_of(copy, extractor, "tiny-classifier")


def energy(samples, reference, *, power=1.0):
    def between(a, b):
        return torch.cdist(a, b).pow(power).mean()

    return 2 * between(samples, reference) - between(samples, samples) - between(reference, reference)


def vector(samples, reference):
    return samples.mean(0)


def test_a_private_metric_is_computed(data, extractor, images, features):
    real, mine = reference_of(data, extractor, "tiny-classifier"), f"{__name__}.energy:power=0.5"
    assert EvaluateConfig(features="tiny", metrics=("fd", mine)).wanted == ("fd", mine)
    noise = noisy(images[:9], 40)
    found = evaluate([noise], extractor, real, ("fd", mine))
    assert list(found) == ["fd", mine]
    assert found[mine] == pytest.approx(energy(pooled(noise, extractor), features, power=0.5).item(), rel=1e-5)
    for name, sentence in (
        ("energi", "no attribute 'energi'"),
        ("vector", "must return one finite number, but returned tensor"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate([noise], extractor, real, (f"{__name__}.{name}",))
