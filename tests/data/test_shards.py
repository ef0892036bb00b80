import hashlib
import json
import tracemalloc

import numpy as np
import pytest

from repa.base.errors import UserError
from repa.base.files import read_json
from repa.data import Manifest, PrepareConfig, ShardReader, open_data, open_source, prepare
from repa.data.config import array_name
from repa.data.manifest import MANIFEST
from repa.data.writing import ShardWriter
from tests.data.conftest import all_rows

CONFIG = PrepareConfig(resolution=8, shard_size=3, batch_size=2, num_workers=1)


@pytest.fixture
def out(folder, tmp_path):
    prepare(folder, tmp_path / "out", CONFIG)
    return tmp_path / "out"


def edit(out, change):
    values = read_json(out / MANIFEST)
    change(values)
    (out / MANIFEST).write_text(json.dumps(values))


def test_arrays_are_plain_npy_files(tmp_path):
    rows = np.arange(7 * 6, dtype=np.float16).reshape(7, 2, 3)
    with ShardWriter(tmp_path, 12) as writer:
        for start in range(0, 7, 3):
            writer.append({"moments": rows[start : start + 3], "labels": np.arange(start, min(start + 3, 7))})
            assert not list(tmp_path.glob("*.npy"))  # files appear only at the end
    record = writer.records()["moments"]
    assert (record.file, record.dtype, record.shape) == ("moments-00012.npy", "float16", (7, 2, 3))
    np.testing.assert_array_equal(np.load(tmp_path / "moments-00012.npy"), rows)
    np.testing.assert_array_equal(np.load(tmp_path / "labels-00012.npy"), np.arange(7))
    assert record.size == (tmp_path / record.file).stat().st_size


@pytest.mark.parametrize("expected", [0, 6, 7, 8])
def test_checksums_are_correct_when_an_image_is_left_out(tmp_path, expected):
    """Leaving out an image changes the header, which has already been hashed."""
    with ShardWriter(tmp_path, 0, expected=expected) as writer:
        for start in range(0, 7, 3):
            writer.append({"labels": np.arange(start, min(start + 3, 7))})
    path = tmp_path / "labels-00000.npy"
    assert writer.records()["labels"].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(np.load(path)) == 7


def test_array_headers_fit_lengths_of_any_size(tmp_path):
    with ShardWriter(tmp_path, 0) as writer:
        for _ in range(120):
            writer.append({"labels": np.zeros(10, np.int64)})
    assert np.load(tmp_path / "labels-00000.npy").shape == (1200,)


def test_a_failed_shard_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, 0) as writer:
        writer.append({"labels": np.zeros(2, np.int64)})
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_file_names_are_plain():
    assert (
        array_name("features.my.module.Encoder:seed=1,size=a/b", 3)
        == "features.my.module.Encoder_seed_1_size_a_b-00003.npy"
    )


def test_gather_takes_any_rows_in_any_order(out):
    data = open_data(out)
    everything = all_rows(data, "images")
    assert everything.shape == (11, 3, 8, 8)
    for indices in ([], [10], [10, 0, 3, 3, 2, 9, 0], range(2, 8), np.random.default_rng(0).integers(0, 11, 200)):
        rows = data.gather("images", np.array(indices, np.int64))
        assert rows.flags.c_contiguous
        assert rows.flags.writeable
        assert len(rows) == len(indices)
        for row, index in zip(rows, indices, strict=True):
            np.testing.assert_array_equal(row, everything[index])
    np.testing.assert_array_equal(np.concatenate(list(data.reader.batches("images", 4))), everything)


def test_gather_opens_only_what_it_needs_and_few_at_a_time(out, monkeypatch):
    monkeypatch.setattr("repa.data.reader.MAX_OPEN", 2)
    reader = ShardReader(out, Manifest.open(out).shards)
    rows = reader.gather("labels", np.arange(11)[::-1])
    assert rows.tolist() == [1] * 4 + [0] * 7
    info = reader._open.cache_info()
    assert (info.misses, info.currsize) == (4, 2)
    reader.gather("labels", np.array([1]))
    assert reader._open.cache_info().currsize == 2


def test_gather_does_not_read_whole_shards(tmp_path):
    """Reading 3 rows of an array of 32 MiB takes the memory of 3 rows."""
    (tmp_path / "pictures").mkdir()
    from tests.oracles.data import noise_image

    noise_image(0).save(tmp_path / "pictures" / "a.png")
    prepare(tmp_path / "pictures", tmp_path / "out", CONFIG)
    num, side = 4096, 52
    big = np.lib.format.open_memmap(tmp_path / "out" / "images-00000.npy", "w+", np.uint8, (num, 3, side, side))
    big[7] = 5
    del big
    np.save(tmp_path / "out" / "labels-00000.npy", np.zeros(num, np.int64))

    def change(values):
        values["config"]["resolution"], shard = side, values["shards"][0]
        shard["num"] = values["num_images"] = num
        values["class_counts"] = [num]
        for name, shape in (("images", [num, 3, side, side]), ("labels", [num])):
            size = (tmp_path / "out" / shard["files"][name]["file"]).stat().st_size
            shard["files"][name].update(shape=shape, size=size)

    edit(tmp_path / "out", change)
    data = open_data(tmp_path / "out")
    tracemalloc.start()
    rows = data.gather("images", np.array([4000, 7, 8]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows[:, 0, 0, 0].tolist() == [0, 5, 0]
    assert peak < 1 << 20


def test_missing_fields_and_rows_are_named(out):
    data = open_data(out)
    with pytest.raises(UserError, match=r"no field 'moments': choose from images, labels"):
        data.gather("moments", np.array([0]))
    for indices in ([11], [-1]):
        with pytest.raises(IndexError, match="has images 0 to 10"):
            data.gather("images", np.array(indices))


def test_changed_bytes_are_found_by_check(out):
    path = out / "images-00002.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    opened = open_data(out)  # the size is still correct
    with pytest.raises(
        UserError, match=r"1 of \d+ files in .* do not match their checksums \(images-00002\.npy\): delete them and run"
    ):
        opened.check()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_changed_sizes_are_found_on_opening(out, change):
    path = out / "labels-00001.npy"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"labels-00001\.npy is missing or does not have its recorded size"):
        open_data(out)


def test_an_array_of_another_type_or_with_objects_is_refused(out):
    path = out / "labels-00000.npy"
    for array, message in [
        (np.zeros(6, np.int32), r"holds .*'<i4', .*\(6,\), }, not .*'<i8', .*\(3,\)"),
        (np.array([None, None, None]), r"holds .*'\|O', .*\(3,\), }, not .*'<i8', .*\(3,\)"),
    ]:
        np.save(path, array)
        edit(out, lambda v: v["shards"][0]["files"]["labels"].update(size=path.stat().st_size))
        with pytest.raises(UserError, match=message):
            open_data(out).gather("labels", np.array([0]))


@pytest.mark.parametrize("name", ["../secret.npy", "/etc/secret.npy", "a\\b.npy", "..", "", "C:secret.npy", "passwd"])
def test_file_names_that_leave_the_folder_are_refused(out, name):
    edit(out, lambda v: v["shards"][1]["files"]["images"].update(file=name))
    with pytest.raises(UserError, match=r"manifest\.json: shards\.1\.files\.images\.file: .*is not the plain name"):
        open_data(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=99), "has version 99, but this version of repa reads 1"),
        (lambda v: v.pop("version"), "has version None"),
        (lambda v: v.update(surprise=1), "unknown setting 'surprise'"),
        (lambda v: v.update(num_images=12), "num_images is 12, but its shards hold 11"),
        (lambda v: v.update(num_images="many"), "'num_images' is 'many'"),
        (lambda v: v.pop("shards"), "shards"),
        (lambda v: v["shards"][2]["files"].pop("labels"), "shard 2 has other fields"),
        (lambda v: v["shards"][2]["files"]["labels"].update(shape=[4]), "shard 2 has files without its 3"),
        (lambda v: v["shards"][0]["files"]["labels"].update(dtype="object"), "is 'object', but must be 'uint8'"),
        (lambda v: [s["files"].pop("labels") for s in v["shards"]], "its shards hold images, which contradicts"),
        (lambda v: v["config"].update(resolution=16), "its images are 3x8x8, but its resolution is 16"),
        (
            lambda v: v["shards"][1]["files"].update(images=v["shards"][0]["files"]["images"]),
            r"the file images-00000\.npy is named twice",
        ),
    ],
)
def test_damaged_manifests_give_one_line_errors(out, change, message):
    edit(out, change)
    with pytest.raises(UserError, match=message) as caught:
        open_data(out)
    assert "\n" not in str(caught.value)


def test_broken_json_and_missing_data_are_refused(out, tmp_path):
    (out / MANIFEST).write_text('{"version": 1,')
    with pytest.raises(UserError, match=r"manifest\.json cannot be read as JSON"):
        open_data(out)
    (out / MANIFEST).write_text("[]")
    with pytest.raises(UserError, match="must hold an object, but holds list"):
        open_data(out)
    with pytest.raises(UserError, match="holds no prepared data .* `repa prepare SOURCE"):
        open_data(tmp_path / "missing")


def test_images_are_not_prepared_data_and_prepared_data_are_no_images(out, image_folder):
    with pytest.raises(UserError, match=f"if it holds images, run `repa prepare {image_folder} DATA` and give DATA"):
        open_data(image_folder)
    with pytest.raises(UserError, match=f"but prepared data: `repa train RECIPE --data {out}` trains on it"):
        open_source(out)


def test_the_summary_describes_the_manifest(out):
    lines = open_data(out).manifest.describe()
    assert "11 of 2 classes at 8 pixels" in lines[1]
    assert "images uint8 3x8x8" in lines[4]
