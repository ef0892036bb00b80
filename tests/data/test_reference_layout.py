"""The folder layout of REPA's own preprocessing: files are paired by number, everything else is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from repa.base.errors import UserError
from repa.data import PrepareConfig, open_data, open_source, prepare
from tests.oracles.data import noise_image

SIDE, NUM = 32, 5


def moments_of(index: int) -> np.ndarray:
    rng = np.random.default_rng(index)
    return np.concatenate([rng.normal(size=(4, 4, 4)), rng.uniform(0.1, 1, (4, 4, 4))]).astype(np.float32)


def latent(index: int) -> str:
    return f"00000/img-mean-std-{index:08d}.npy"


def write_layout(root: Path, num: int = NUM) -> Path:
    for index in range(num):
        for path in (root / f"images/00000/img{index:08d}.png", root / "vae-sd" / latent(index)):
            path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(index, SIDE, SIDE).save(root / f"images/00000/img{index:08d}.png")
        np.save(root / "vae-sd" / latent(index), moments_of(index))
    write_labels(root, [[latent(index), index % 3] for index in range(num)])
    return root


def write_labels(root: Path, labels, where: str = "vae-sd") -> None:
    (root / where / "dataset.json").write_text(json.dumps({"labels": labels}))


@pytest.fixture
def layout(tmp_path) -> Path:
    return write_layout(tmp_path / "ref")


def test_images_moments_and_labels_belong_together(layout):
    write_labels(layout, [[latent(index), index % 3] for index in reversed(range(NUM))])
    source = open_source(layout)
    assert (len(source), source.side, source.moments_shape) == (NUM, SIDE, (8, 4, 4))
    assert source.labels.tolist() == [0, 1, 2, 0, 1]
    assert source.labels_from == "vae-sd/dataset.json"
    for index in range(NUM):
        np.testing.assert_array_equal(source.moments(index), moments_of(index))
        np.testing.assert_array_equal(np.asarray(source.image(index, SIDE)), np.asarray(noise_image(index, SIDE, SIDE)))
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.moments(2), moments_of(2))


def test_null_labels_become_one_class(layout):
    write_labels(layout, None)
    assert open_source(layout).class_names == ["all"]


def test_labels_none_ignores_existing_labels(layout):
    assert open_source(layout, labels="none").class_names == ["all"]
    assert open_source(layout, labels="none").identity != open_source(layout).identity


def test_images_and_moments_are_paired_by_number(layout):
    """Without image 1 and moments 3 both sides have equally many files, and pairing by position would be wrong."""
    (layout / "images/00000/img00000001.png").unlink()
    (layout / "vae-sd" / latent(3)).unlink()
    with pytest.raises(
        UserError, match=r"has 1 files without their moments in vae-sd/; the first is 00000/img00000003"
    ):
        open_source(layout)


def test_moments_without_an_image_are_refused(layout):
    (layout / "images/00000/img00000001.png").unlink()
    with pytest.raises(UserError, match="has 1 files without their image in images/; the first is .*00000001.npy"):
        open_source(layout)


def test_two_images_with_one_number_are_refused(layout):
    noise_image(9, SIDE, SIDE).save(layout / "images/00000/img00000001.jpg")
    with pytest.raises(UserError, match="two images or moments with the same number"):
        open_source(layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.astype(np.float64), r"holds float64 \(8, 4, 4\), not float32"),
        (lambda m: m[None], r"holds float32 \(1, 8, 4, 4\)"),
        (lambda m: m[:7], r"holds float32 \(7, 4, 4\)"),
        (lambda m: m * np.nan, "numbers that are not finite"),
        (
            lambda m: np.concatenate([m[:4], np.log(m[4:] ** 2)]),
            "negative standard deviations: .*log-variances",
        ),
        (lambda m: np.array([{}], object), "cannot be read as an array: .*Python objects"),
    ],
)
def test_moments_of_an_unexpected_form_are_refused(layout, change, message):
    np.save(layout / "vae-sd" / latent(0), change(moments_of(0)))
    with pytest.raises(UserError, match=rf"img-mean-std-00000000\.npy .*{message}"):
        open_source(layout)
    np.save(layout / "vae-sd" / latent(0), moments_of(0))
    np.save(layout / "vae-sd" / latent(4), change(moments_of(4)))
    with pytest.raises(UserError, match=rf"img-mean-std-00000004\.npy .*{message}"):
        open_source(layout).moments(4)


def test_shapes_that_differ_are_refused(layout):
    np.save(layout / "vae-sd" / latent(3), np.ones((8, 8, 8), np.float32))
    with pytest.raises(UserError, match=r"holds \(8, 8, 8\), but other images have \(8, 4, 4\)"):
        open_source(layout).moments(3)
    for index in range(NUM):
        np.save(layout / "vae-sd" / latent(index), np.ones((8, 5, 5), np.float32))
    with pytest.raises(UserError, match="has moments of 5 x 5 for images of 32 pixels"):
        open_source(layout)


def test_another_resolution_is_refused(layout):
    with pytest.raises(UserError, match="is 32 x 32, but its moments are for another size: .*--resolution 32"):
        open_source(layout).image(0, 16)


def test_missing_and_contradicting_labels_are_refused(layout):
    write_labels(layout, [[f"00000/img{index:08d}.png", index % 3] for index in range(NUM)], "images")
    assert open_source(layout).labels.tolist() == [0, 1, 2, 0, 1]
    write_labels(layout, [[f"00000/img{index:08d}.png", 0] for index in range(NUM)], "images")
    with pytest.raises(UserError, match=r"img00000001\.png has the label 0 in images/dataset\.json, but 1 in vae-sd"):
        open_source(layout)
    write_labels(layout, [[latent(0), 1]])
    with pytest.raises(UserError, match=r"img-mean-std-00000001\.npy has no label"):
        open_source(layout)
    (layout / "vae-sd/dataset.json").unlink()
    with pytest.raises(UserError, match=r"vae-sd/dataset\.json is missing"):
        open_source(layout)


def test_files_with_unexpected_names_are_refused(layout):
    np.save(layout / "vae-sd/00000/latent7.npy", moments_of(0))
    with pytest.raises(UserError, match=r"latent7\.npy is not named like REPA's files"):
        open_source(layout)


def block_moments(image: np.ndarray) -> np.ndarray:
    """The fake autoencoder's moments of (H, W, 3): means of 4 x 4 blocks of red and green, deviations of 1/2."""
    side = image.shape[0] // 4
    mean = np.zeros((2, side, side))
    for c in range(2):
        for y in range(side):
            for x in range(side):
                mean[c, y, x] = (image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4, c].astype(np.float64) / 255).mean()
    return np.concatenate([mean, np.full_like(mean, 0.5)]).astype(np.float32)


@pytest.fixture
def made(layout, fakes) -> Path:
    """The fake autoencoder's moments, changed by a third of a percent so that they differ from recomputed ones."""
    for index in range(NUM):
        np.save(layout / "vae-sd" / latent(index), 1.003 * block_moments(np.asarray(noise_image(index, SIDE, SIDE))))
    return layout


def test_stored_moments_are_kept_in_half_precision(made, tmp_path):
    config = PrepareConfig(resolution=SIDE, autoencoder="sd-vae-ft-mse", shard_size=2, num_workers=0)
    prepare(made, tmp_path / "out", config)
    data = open_data(tmp_path / "out")
    rows = np.arange(NUM)
    stored = np.stack([np.load(made / "vae-sd" / latent(index)) for index in range(NUM)])
    moments = data.gather("moments", rows).astype(np.float64)
    assert (abs(moments - stored) <= abs(stored) * 2.0**-11 + 2.0**-25).all()  # float16 rounding
    assert (moments != stored / 1.003).mean() > 0.5  # they were not computed again
    assert data.gather("labels", rows).tolist() == [0, 1, 2, 0, 1]
    images = np.stack([np.asarray(noise_image(index, SIDE, SIDE)) for index in range(NUM)])
    np.testing.assert_array_equal(data.gather("images", rows), images.transpose(0, 3, 1, 2))


def test_flipped_copies_are_encoded_by_the_autoencoder(made, tmp_path):
    config = PrepareConfig(resolution=SIDE, autoencoder="sd-vae-ft-mse", flip=True, num_workers=0)
    prepare(made, tmp_path / "out", config)
    moments = open_data(tmp_path / "out").gather("moments", np.arange(2 * NUM)).astype(np.float64)
    mirrored = block_moments(np.asarray(noise_image(1, SIDE, SIDE))[:, ::-1])
    np.testing.assert_allclose(moments[NUM + 1], mirrored, atol=1e-3)


@pytest.mark.parametrize("wrong", ["other images", "other autoencoder", "other shape"])
def test_moments_of_other_images_are_refused(made, tmp_path, wrong):
    for index in range(NUM):
        path = made / "vae-sd" / latent(index)
        other = block_moments(np.asarray(noise_image(index + 1, SIDE, SIDE)))
        stored = {"other images": other, "other autoencoder": np.load(path)[[1, 0, 2, 3]], "other shape": moments_of(0)}
        np.save(path, stored[wrong])
    config = PrepareConfig(resolution=SIDE, autoencoder="sd-vae-ft-mse", num_workers=0)
    with pytest.raises(UserError, match="The stored m(eans differ by|oments have .*choose the autoencoder)"):
        prepare(made, tmp_path / "out", config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"autoencoder": "pixels"}, "is 'pixels': choose the one that computed them .*images as the source"),
        ({"resolution": 16}, "moments of images of 32 pixels, but the resolution is 16: give 32"),
    ],
)
def test_another_autoencoder_or_resolution_is_refused_at_once(made, tmp_path, settings, message):
    config = PrepareConfig(**{"resolution": SIDE, "autoencoder": "sd-vae-ft-mse", **settings})
    with pytest.raises(UserError, match=message):
        prepare(made, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
