"""Properties of every kind of source."""

import io
import os
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from repa.base.errors import UserError
from repa.data import open_source
from tests.data.kinds import ARRAYS, CLASSES, FILES, Picture, labels, pictures, pixels, png
from tests.oracles.data import noise_image

KINDS = FILES | ARRAYS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make(kind, tmp_path, items=None):
    items = pictures() if items is None else items
    return open_source(KINDS[kind](tmp_path, items))


def expected_pixels(kind):
    images = pixels(pictures())
    if kind == "cifar":
        images = np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in images])
    return images


def test_pixels_labels_names_and_captions_are_read(kind, tmp_path):
    source = make(kind, tmp_path)
    assert len(source) == 5
    for index, image in enumerate(expected_pixels(kind)):
        decoded = source.decode(index)
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(decoded), image)
        assert source.image(index, 8).size == (8, 8)
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == ([0] * 5 if kind == "npy" else labels(pictures()).tolist())
    named = {"npy": ["all"], "npz": ["0", "1"], "compressed npz": ["0", "1"], "cifar": [*CLASSES, *"cdefghij"]}
    assert list(source.class_names) == named.get(kind, list(CLASSES))
    assert len({source.name(index) for index in range(5)}) == 5
    assert source.has_captions == (kind in FILES)
    if source.has_captions:
        assert [source.captions(index) for index in range(5)] == [item.captions for item in pictures()]


def test_sources_work_in_threads_after_pickling_and_after_a_fork(kind, tmp_path):
    source = make(kind, tmp_path)
    first = [np.asarray(source.decode(i)).tobytes() for i in range(5)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: np.asarray(source.decode(i % 5)).tobytes(), range(40))) == first * 8
    again = pickle.loads(pickle.dumps(source))
    assert [np.asarray(again.decode(i)).tobytes() for i in (4, 0)] == [first[4], first[0]]
    assert [again.captions(i) for i in range(5)] == [source.captions(i) for i in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking with threads
        child = os.fork()
    if child == 0:
        same = [np.asarray(source.decode(i)).tobytes() for i in (3, 1)] == [first[3], first[1]]
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.asarray(source.decode(2)).tobytes() == first[2]


def test_the_identity_changes_only_with_labels_and_images(kind, tmp_path):
    before, later, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for folder in (before, later, other):
        folder.mkdir()
    items = pictures()
    first = make(kind, before, items).identity
    again = make(kind, later, items)
    assert again.identity["sha256"] == first["sha256"]
    assert ("one class" in again.labels_from) == (kind == "npy")  # only this source has no labels
    width = 12 if kind in ARRAYS else 13  # for image files the size in bytes must change
    changed = [items[0]._replace(data=png(noise_image(99, width, 12))), *items[1:]]
    assert make(kind, other, changed).identity["sha256"] != first["sha256"]
    unlabelled = open_source(KINDS[kind](tmp_path, items), labels="none")
    assert unlabelled.labels.tolist() == [0] * 5
    assert unlabelled.class_names == ["all"]
    if kind != "npy":
        assert unlabelled.identity != {**first, "name": unlabelled.identity["name"]}


def _saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    return _saved(noise_image(0, 20, 12), "JPEG", exif=exif)


ODD = {  # images and their size as RGB
    "CMYK": (_saved(noise_image(0, 12, 12).convert("CMYK"), "JPEG"), "jpg", (12, 12)),
    "16 bit": (_saved(Image.fromarray(np.full((12, 12), 40_000, np.uint16)), "PNG"), "png", (12, 12)),
    "animated": (
        _saved(noise_image(0, 12, 12), "GIF", save_all=True, append_images=[noise_image(1, 12, 12)]),
        "gif",
        (12, 12),
    ),
    "turned": (_turned(), "jpg", (12, 20)),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", FILES)
def test_unusual_images_are_read(kind, odd, tmp_path):
    data, ending, size = ODD[odd]
    source = make(kind, tmp_path, [Picture(data, ending, 0), *pictures()[1:]])
    image = source.decode(0)
    assert (image.mode, image.size) == ("RGB", size)
    if odd == "16 bit":
        assert np.asarray(image).max() == np.asarray(image).min() == 40_000 >> 8


def _huge() -> bytes:
    """A PNG whose header announces 20,000 x 20,000 pixels."""
    data = bytearray(png(noise_image(0, 12, 12)))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "cut": (png(noise_image(0, 12, 12))[:200], "is not a readable image"),
    "empty": (b"", "is not a readable image: its format is unknown"),
    "no image": (b"GIF? no, a text", "is not a readable image: its format is unknown"),
    "huge": (_huge(), "is refused: it has more than .* pixels"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", FILES)
def test_bad_images_are_named_and_the_others_stay(kind, bad, tmp_path):
    data, message = BAD[bad]
    items = [*pictures()[:1], Picture(data, "png", 0), *pictures()[2:]]
    source = make(kind, tmp_path, items)
    with pytest.raises(UserError, match=message) as error:
        source.image(1, 8)
    assert str(error.value).startswith(source.name(1))
    assert source.image(2, 8).size == (8, 8)
