"""Arrays and CIFAR's binaries as sources: axes, keys, labels, and what is refused."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from repa.base.errors import UserError
from repa.data import open_source
from repa.data.sources import arrays
from tests.data.kinds import CLASSES, as_cifar, as_npz, cifar_record, pictures

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)


def save(path: Path, **fields) -> Path:
    np.savez(path, **fields)
    return path


@pytest.mark.parametrize(
    "array",
    [IMAGES, IMAGES.transpose(0, 3, 1, 2), np.asfortranarray(IMAGES)],
    ids=["channels last", "channels first", "fortran"],
)
@pytest.mark.parametrize("packed", [np.savez, np.savez_compressed])
def test_channels_may_come_first_or_last(tmp_path, array, packed):
    packed(tmp_path / "a.npz", x=array)
    np.save(tmp_path / "a.npy", array)
    for name in ("a.npz", "a.npy"):
        source = open_source(tmp_path / name)
        for i in range(4):
            np.testing.assert_array_equal(np.asarray(source.decode(i)), IMAGES[i])


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 5, 1), (4, 1, 6, 5)])
def test_grey_arrays_become_rgb(tmp_path, shape):
    grey = IMAGES[..., 0]
    np.save(tmp_path / "g.npy", grey.reshape(shape))
    np.testing.assert_array_equal(
        np.asarray(open_source(tmp_path / "g.npy").decode(2)), grey[2][..., None].repeat(3, 2)
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IMAGES.astype(np.float32), r"holds float32 \(4, 6, 5, 3\): convert the images to uint8"),
        (IMAGES.astype(np.int64), "holds int64"),
        (IMAGES[:0], "holds uint8 .0, 6, 5, 3."),
        (IMAGES[0, 0], "convert the images to uint8"),
        (IMAGES[..., :2], "colour axis is ambiguous or missing"),
        (np.zeros((2, 3, 8, 3), np.uint8), "colour axis is ambiguous or missing"),
        (np.array([{"a": 1}], object), "holds Python objects, which can run any program"),
    ],
)
@pytest.mark.parametrize("packed", [None, np.savez, np.savez_compressed])
def test_arrays_that_are_not_images_are_refused(tmp_path, array, message, packed):
    path = tmp_path / ("a.npy" if packed is None else "a.npz")
    np.save(path, array) if packed is None else packed(path, images=array)
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_pickles_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    evil = np.empty(2, object)
    evil[:] = [Evil(), Evil()]
    np.save(tmp_path / "e.npy", evil, allow_pickle=True)
    np.savez(tmp_path / "e.npz", images=IMAGES, labels=evil, allow_pickle=True)
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("e.npy", "e.npz", "data.pkl"):
        with pytest.raises(UserError, match="run any program"):
            open_source(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 6, 60, 200, -1])
def test_truncated_arrays_are_refused(tmp_path, keep):
    np.save(tmp_path / "a.npy", IMAGES)
    save(tmp_path / "a.npz", images=IMAGES)
    for name in ("a.npy", "a.npz"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match=rf"{name}.* cannot be read"):
            open_source(path)


def test_a_second_array_in_one_file_is_refused(tmp_path):
    """NumPy reads the first of several arrays that were saved to one open file, and ignores the others."""
    with open(tmp_path / "a.npy", "wb") as file:
        np.save(file, IMAGES)
        np.save(file, IMAGES)
    with pytest.raises(UserError, match="after its array"):
        open_source(tmp_path / "a.npy")


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_changed_pixel_of_an_npz_is_found(tmp_path, order):
    path = save(tmp_path / "a.npz", images=np.array(IMAGES, order=order))
    data = bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.npz cannot be read as an array: Bad CRC-32"):
        open_source(path)


def test_an_npz_whose_array_claims_too_much_is_refused(tmp_path):
    path = save(tmp_path / "a.npz", images=IMAGES)
    data = path.read_bytes()
    assert data.count(b"(4, 6, 5, 3)") == 1
    path.write_bytes(data.replace(b"(4, 6, 5, 3)", b"(9, 6, 5, 3)"))
    with pytest.raises(UserError, match="is truncated"):
        open_source(path)


def test_large_compressed_arrays_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "c.npz", images=IMAGES)
    monkeypatch.setattr(arrays, "MAX_UNPACKED", 100)
    with pytest.raises(UserError, match=r"it unpacks to .*np\.savez"):
        open_source(tmp_path / "c.npz")


def test_keys_of_an_npz_are_chosen_by_settings(tmp_path):
    path = save(tmp_path / "a.npz", images=IMAGES[::-1], mine=IMAGES, kind=np.array(["b", "a", "b", "a"]))
    source = open_source(f"{path}:image=mine,label=kind")
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1, 0], ["a", "b"])
    np.testing.assert_array_equal(np.asarray(source.decode(0)), IMAGES[0])
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(source)).decode(0)), IMAGES[0])
    with pytest.raises(UserError, match=r"no array 'nine': it has images, kind, mine\. .*:image=NAME"):
        open_source(f"{path}:image=nine")
    with pytest.raises(UserError, match=r"no array 'images or .*': it has kind\."):
        open_source(save(tmp_path / "b.npz", kind=IMAGES))


def test_labels_may_be_in_a_separate_file(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    np.save(tmp_path / "labels.npy", np.array([3, 0, 1, 1]))
    assert open_source(tmp_path / "images.npy", labels=str(tmp_path / "labels.npy")).labels.tolist() == [3, 0, 1, 1]
    for bad, message in (
        (np.array([1, 2]), r"is int64 \(2,\): save one integer or text for each of the 4 images"),
        (np.eye(4), r"is float64 \(4, 4\)"),
        (np.array([0, 1, -1, 0]), r"label of images\.npy\[2\] in .* is -1"),
        (np.array([0.0, 1.0, 0.5, 0.0]), r"images\.npy\[2\] in .* is 0\.5"),
    ):
        np.save(tmp_path / "labels.npy", bad)
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "images.npy", labels=str(tmp_path / "labels.npy"))
    with pytest.raises(UserError, match=r"labels is 'a\.csv': leave it out for images\.npy"):
        open_source(tmp_path / "images.npy", labels="a.csv")


def test_a_file_that_is_not_an_npz_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(UserError, match=r"a\.npz cannot be read as a zip file"):
        open_source(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("images.npy", b"no array")
    with pytest.raises(UserError, match=r"'images' of .*b\.npz cannot be read as an array"):
        open_source(tmp_path / "b.npz")


def test_cifar_has_splits_and_class_names(tmp_path):
    folder = as_cifar(tmp_path, pictures())
    test = open_source(f"{folder}:split=test")
    assert (len(test), test.labels.tolist()) == (1, [1])
    assert test.name(0) == "test_batch.bin[0]"
    (Path(folder) / "batches.meta.txt").unlink()
    assert open_source(folder).class_names == [str(i) for i in range(10)]


def test_cifar_100_has_two_labels(tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    for name, records in (("train", [(19, 99), (0, 5)]), ("test", [(1, 2)])):
        (tmp_path / f"{name}.bin").write_bytes(b"".join(cifar_record(image, *numbers) for numbers in records))
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"fine{i}" for i in range(100)))
    source = open_source(tmp_path)
    assert (source.labels.tolist(), source.class_names[99]) == ([99, 5], "fine99")
    np.testing.assert_array_equal(np.asarray(source.decode(1)), image)
    coarse = open_source(f"{tmp_path}:label=coarse")
    assert (coarse.labels.tolist(), len(coarse.class_names)) == ([19, 0], 20)


def test_bad_cifar_folders_are_refused(tmp_path):
    folder = Path(as_cifar(tmp_path, pictures()))
    batch = (folder / "data_batch_3.bin").read_bytes()
    for data, message in (
        (batch[:-1], "has 3,072 bytes"),
        (b"", "has 0 bytes"),
        (b"\x0a" + batch[1:], r"label of data_batch_3\.bin\[0\] in .* is 10, but must be the index of one of"),
    ):
        (folder / "data_batch_3.bin").write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_source(folder)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_3\.bin is missing"):
        open_source(folder)
    for spec, message in (
        (f"{folder}:split=val", "'split' of the source .* is 'val', but must be 'train' or 'test'"),
        (f"{folder}:label=coarse", "is CIFAR-10, which has only one kind of label"),
        (f"{folder}:label=10", "'label' of the source .* is 10"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(spec)
    (folder / "data_batch_3.bin").write_bytes(batch)
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES))
    with pytest.raises(UserError, match="holds 2 names, but there are 10 classes"):
        open_source(folder)


def test_cifar_pickles_are_refused(tmp_path):
    (tmp_path / "batches.meta").write_bytes(b"\x80\x02.")
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=r"Python version, whose pickles .*the binary version \(cifar-10-binary"):
        open_source(tmp_path)


def test_arrays_are_memory_mapped(tmp_path):
    """An .npy, and an .npz from np.savez, are not loaded into memory."""
    spec = as_npz(tmp_path, pictures())
    assert isinstance(open_source(spec)._images, np.memmap)


@pytest.mark.parametrize("whole", [1 << 30, 0])
def test_a_changed_array_has_another_identity(tmp_path, monkeypatch, whole):
    """For an array too large to read at every start, evenly spaced pieces are hashed."""
    monkeypatch.setattr("repa.data.sources.arrays.WHOLE", whole)
    images = np.zeros((40, 8, 8, 3), np.uint8)
    np.save(tmp_path / "a.npy", images)
    before = open_source(tmp_path / "a.npy").identity
    images[23, 4, 4, 1] = 1
    np.save(tmp_path / "a.npy", images)
    assert open_source(tmp_path / "a.npy").identity["sha256"] != before["sha256"]


def test_every_byte_of_a_small_file_counts_for_the_identity(tmp_path, monkeypatch):
    monkeypatch.setattr("repa.data.sources.arrays.PIECE", 1)
    images = np.zeros((40, 8, 8, 3), np.uint8)
    for value in (0, 1):
        images[23, 4, 4, 1] = value
        np.save(tmp_path / f"{value}.npy", images)
    a, b = (open_source(tmp_path / f"{value}.npy").identity["sha256"] for value in (0, 1))
    assert a != b
