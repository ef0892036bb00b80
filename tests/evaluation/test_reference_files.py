"""Reference files of the ADM evaluator and of repa give the same figures."""

import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.data import open_data
from repa.encoders import load_encoder
from repa.evaluation import evaluate
from repa.evaluation.extractors import EncoderExtractor
from repa.evaluation.images import DataImages, open_images
from repa.evaluation.measure import measure
from repa.evaluation.reference import compute_reference, load_reference, open_reference, subset_of, write_reference
from tests.evaluation.inceptions import small_inception
from tests.oracles import metrics as oracle

ALL = ("fid", "sfid", "inception_score", "kid", "precision", "recall")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def real(data_folder):
    return DataImages(open_data(data_folder))


@pytest.fixture(scope="module")
def samples(real):
    pixels = real.rows(np.arange(30)).float()
    noise = 25 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels + noise).clamp(0, 255).byte()


def numbers(x):
    return x.double().numpy()


def adm_file(path, extractor, images, *leave_out, statistics_of=None):
    """A file with mu, sigma, mu_s, sigma_s and images, as ADM's evaluator computes and stores them."""
    seen = extractor(images if statistics_of is None else statistics_of)
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()}
    for end, x in (("", seen.pooled), ("_s", seen.spatial)):
        arrays |= {"mu" + end: np.mean(x.numpy(), axis=0), "sigma" + end: np.cov(x.numpy(), rowvar=False)}
    np.savez(path, **{name: array for name, array in arrays.items() if name not in leave_out})
    return path


def measured(path, samples, metrics=ALL, extractor=None):
    extractor = extractor or small_inception()
    reference = load_reference(open_reference(path, samples.shape[-1]), extractor, "inception")
    return evaluate(samples.split(7), extractor, reference, metrics)


def test_an_adm_reference_gives_the_evaluators_figures(tmp_path, real, samples):
    extractor, every = small_inception(), real.rows(np.arange(40))
    path = adm_file(tmp_path / "VIRTUAL.npz", extractor, every[::2], statistics_of=every)
    found = measured(path, samples)
    assert list(found) == list(ALL)
    a, b = extractor(every), extractor(samples)
    for name, x, y in (("fid", a.pooled, b.pooled), ("sfid", a.spatial, b.spatial)):
        x, y = numbers(x), numbers(y)
        assert found[name] == pytest.approx(oracle.frechet(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)), rel=1e-5)
    assert found["inception_score"] == pytest.approx(oracle.inception_score(b.logits.double().softmax(1).tolist(), 1))
    x, y = numbers(extractor(every[::2]).pooled), numbers(b.pooled)
    assert found["precision"] == oracle.share_within(y, x, 3)
    assert found["recall"] == oracle.share_within(x, y, 3)
    assert found["recall"] != found["precision"]


def test_statistics_alone_have_no_precision_and_recall(tmp_path, real, samples):
    path = adm_file(tmp_path / "stats.npz", small_inception(), real.rows(np.arange(40)), "arr_0")
    assert measured(path, samples, ("fid", "sfid", "inception_score"))["fid"] > 0
    with pytest.raises(UserError, match="only statistics, but kid, precision, recall needs its images"):
        measured(path, samples)
    path = adm_file(tmp_path / "no-spatial.npz", small_inception(), samples, "mu_s", "sigma_s")
    with pytest.raises(UserError, match="no mu_s and sigma_s, which sfid needs"):
        measured(path, samples)


def test_images_alone_can_be_the_reference(tmp_path, real, samples):
    every = real.rows(np.arange(40))
    with_all = adm_file(tmp_path / "a.npz", small_inception(), every)
    alone = adm_file(tmp_path / "b.npz", small_inception(), every, "mu", "sigma", "mu_s", "sigma_s")
    assert measured(alone, samples) == pytest.approx(measured(with_all, samples), rel=1e-4)


def test_cached_features_are_keyed_by_the_images(tmp_path, samples):
    extractor = EncoderExtractor(load_encoder("tiny-classifier"))
    for name, images in {"a": samples, "b": 255 - samples}.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    distances = [
        evaluate(
            [samples], extractor, load_reference(open_reference(tmp_path / name, 16), extractor, "tiny-classifier")
        )["fd"]
        for name in ("a.npz", "b.npz", "a.npz")
    ]
    assert distances[0] < 1e-5 < 1 < distances[1]
    assert distances[2] == distances[0]
    assert len(list((tmp_path / "cache/reference").iterdir())) == 2


def test_our_reference_file_equals_the_data_and_uses_adms_format(tmp_path, real, samples, monkeypatch):
    monkeypatch.setattr("repa.evaluation.reference.SUBSET", 15)
    extractor = small_inception()
    reference = compute_reference(real, extractor)
    write_reference(tmp_path / "ref.npz", reference, real, extractor, "inception")
    monkeypatch.setattr("repa.evaluation.reference.compute_reference", lambda *a: pytest.fail("looked at again"))
    assert measured(tmp_path / "ref.npz", samples) == evaluate(samples.split(7), extractor, reference, ALL)
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as archive:
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(archive.files)
        wanted = real.rows(subset_of(40)).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(archive["arr_0"], wanted)
        assert len(wanted) == 15


def test_a_reference_file_can_hold_features_of_an_encoder(tmp_path, real, samples):
    extractor = EncoderExtractor(load_encoder("tiny-classifier"))
    write_reference(tmp_path / "ref.npz", compute_reference(real, extractor), real, extractor, "tiny-classifier")
    opened = open_reference(tmp_path / "ref.npz", 16)
    assert evaluate([samples], extractor, load_reference(opened, extractor, "tiny-classifier"), ("fd",))["fd"] > 0
    with pytest.raises(UserError, match="has features of tiny-classifier .* samples use features of inception"):
        load_reference(opened, small_inception(), "inception")
    with pytest.raises(UserError, match="samples have 8 pixels, but .* has 16: compare images of the same size"):
        open_reference(tmp_path / "ref.npz", 8)


def test_statistics_of_other_features_are_refused(tmp_path, real, samples):
    path = adm_file(tmp_path / "stats.npz", small_inception(), samples, "arr_0")
    with pytest.raises(UserError, match="statistics of Inception's features and no images"):
        measured(path, samples, ("fd",), EncoderExtractor(load_encoder("tiny-classifier")))
    with pytest.raises(UserError, match="from the published weights of Inception, but --features-weights names others"):
        measured(path, samples, ("fid",), small_inception("0" * 64))
    extractor = small_inception()
    extractor.dim = 2048
    with pytest.raises(UserError, match="mu has 6 entries, but the features have 2048"):
        measured(path, samples, ("fid",), extractor)
    with_images = adm_file(tmp_path / "images.npz", small_inception(), samples)
    found = measured(with_images, samples, ("fd",), EncoderExtractor(load_encoder("tiny-classifier")))
    assert found["fd"] < 1e-5  # the file's own images in the encoder's features


def test_damaged_and_unexpected_files_are_refused(tmp_path, samples):
    path = adm_file(tmp_path / "r.npz", small_inception(), samples)
    with pytest.raises(UserError, match=r"samples have 8 pixels, but .*r\.npz has 16"):
        open_reference(path, 8)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as a reference"):
        open_reference(path, 16)
    np.savez(path, mu=np.array([{}], dtype=object), sigma=np.eye(2))
    with pytest.raises(UserError, match="cannot be read as a reference: .*Python objects"):
        open_reference(path, 16)
    np.savez(path, mu=np.zeros(6))
    with pytest.raises(UserError, match="mu and sigma belong together"):
        open_reference(path, 16)
    np.savez(path, mu=np.full(6, np.nan), sigma=np.eye(6))
    with pytest.raises(UserError, match="mu .*finite"):
        measured(path, samples, ("fid",))
    with pytest.raises(UserError, match="There is no"):
        open_reference(tmp_path / "none.npz", 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sigma": np.triu(np.full((6, 6), 0.5)) + np.eye(6)}, "sigma is not a covariance"),
        ({"sigma": -np.eye(6)}, "sigma is not a covariance"),
        # a diagonal that is right, but no features have these correlations
        ({"sigma_s": np.eye(4) - 0.9 * (1 - np.eye(4))}, "sigma_s is not a covariance"),
        ({"sigma": np.eye(6, dtype=np.int64)}, "sigma must hold finite floating-point numbers"),
        ({"count": 30.5}, "count must be a whole number, but is 30.5"),
        ({"count": -1}, "count must be a whole number, but is -1"),
        ({"count": 3, "subset": np.zeros((4, 6), np.float32)}, "subset has 4 images, more than its count 3"),
        ({"resolution": 16.5}, "resolution must be a whole number, but is 16.5"),
    ],
)
def test_impossible_statistics_are_refused(changed, message, tmp_path, samples):
    path = adm_file(tmp_path / "r.npz", small_inception(), samples, "arr_0")
    assert measured(path, samples, ("fid", "sfid"))["fid"] < 1e-5
    np.savez(path, **{**np.load(path), **changed})
    with pytest.raises(UserError, match=rf"r\.npz cannot be read as a reference: {message}"):
        measured(path, samples, ("fid", "sfid"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rounded_statistics_are_read(dtype, tmp_path, samples):
    path = adm_file(tmp_path / "r.npz", small_inception(), samples, "arr_0")
    np.savez(path, **{name: array.astype(dtype) for name, array in np.load(path).items()})
    assert measured(path, samples, ("fid",))["fid"] < 0.01


def test_an_image_folder_is_cropped_to_the_samples_size(image_folder, samples):
    opened = open_reference(image_folder, 16)
    assert (opened.num, opened.height, opened.width) == (40, 16, 16)
    with pytest.raises(UserError, match="There is no source"):
        open_reference(image_folder / "none", 16)


def test_samples_of_different_sizes_are_refused(image_folder, tmp_path):
    from PIL import Image

    images = open_images(image_folder)
    assert (images.num, images.height, images.width) == (40, 20, 20)
    first = np.asarray(Image.open(image_folder / "dark" / "00.png"))
    assert np.array_equal(images.rows(np.arange(1))[0].permute(1, 2, 0).numpy(), first)
    for name, side in (("a.png", 8), ("b.png", 9)):
        Image.new("RGB", (side, side)).save(tmp_path / name)
    with pytest.raises(UserError, match=r"b\.png in .* has 9 x 9 pixels, but the first image 8 x 8"):
        list(open_images(tmp_path).batches(4))


def test_splits_of_the_inception_score_follow_the_image_numbers(real, samples, monkeypatch):
    monkeypatch.setattr("repa.metrics.distances.RunningScore.__init__.__defaults__", (10,), raising=False)
    extractor = small_inception()
    reference = compute_reference(real, extractor)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    stream = [(order[start : start + 8], samples[order[start : start + 8]]) for start in range(0, 30, 8)]
    found = measure(stream, extractor, reference, ("inception_score",))
    assert found["inception_score"] == pytest.approx(
        oracle.inception_score(extractor(samples).logits.double().softmax(1).tolist(), 3)
    )
