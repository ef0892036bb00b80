"""Parquet files and Hugging Face data sets: columns, splits, damage."""

import io
import json
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from repa.base.errors import UserError
from repa.data import open_source
from repa.data.sources import contract, tables
from repa.data.sources import parquet as parquet_source
from tests.data.kinds import _table, as_parquet, as_saved, pictures, pixels

BYTES = [item.data for item in pictures()]


def write(path, **columns) -> str:
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_plain_columns_are_read(tmp_path):
    path = write(tmp_path / "p.parquet", jpg=BYTES, label=[4, 0, 0, 1, 2], text=list("abcde"))
    source = open_source(path)
    assert (source.labels.tolist(), len(source.class_names)) == ([4, 0, 0, 1, 2], 5)
    assert source.captions(3) == ("d",)
    np.testing.assert_array_equal(np.asarray(source.decode(4)), pixels(pictures())[4])
    texts = write(tmp_path / "q.parquet", a=BYTES, b=BYTES[::-1], kind=["y", "x", "y", "y", "x"])
    with pytest.raises(UserError, match="has 2 columns that could be the image, among a, b, kind: .*:image=a"):
        open_source(texts)
    source = open_source(f"{texts}:image=b,label=kind")
    assert (source.class_names, source.labels.tolist()) == (["x", "y"], [1, 0, 1, 1, 0])
    np.testing.assert_array_equal(np.asarray(source.decode(4)), pixels(pictures())[0])


def test_an_audio_column_is_not_taken_for_the_image(tmp_path):
    """Its cells have the type of images; only the features recorded by `datasets` distinguish them."""
    features = datasets.Features({"sound": datasets.Audio(decode=False), "picture": datasets.Image(decode=False)})
    cells = {name: [{"bytes": data, "path": None} for data in BYTES] for name in features}
    table = pyarrow.table(cells, features.arrow_schema)
    parquet.write_table(table, tmp_path / "p.parquet")
    for source in (open_source(tmp_path / "p.parquet"), open_source(datasets.Dataset(table))):
        np.testing.assert_array_equal(np.asarray(source.decode(4)), pixels(pictures())[4])


def test_only_the_requested_row_groups_are_read(tmp_path, monkeypatch):
    source = open_source(as_parquet(tmp_path, pictures()))
    read = []
    real = parquet.ParquetFile.read_row_group

    def spy(self, group, columns, **options):
        read.append((group, columns))
        return real(self, group, columns=columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", spy)
    for index in (0, 1, 0, 2, 1):
        source.decode(index)
    assert read == [(0, ["image"]), (1, ["image"])]  # rows 0 and 1, then row 2
    source.decode(3)  # from the other file
    source.decode(2)  # dropped meanwhile
    assert read[2:] == [(0, ["image"]), (1, ["image"])]
    assert [source.name(i) for i in range(5)] == [
        *(f"part-0.parquet[{i}]" for i in range(3)), *(f"part-1.parquet[{i}]" for i in range(2))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"label": [1], "x": ["a"]}, "has no columns that could be the image, among label, x"),
        ({"image": [b""], "label": [None]}, r"p\.parquet\[0\] has no label in the column 'label'"),
        ({"image": [b""], "label": [-1]}, r"is -1: labels are 0 to .* set labels to 'none'"),
        ({"image": [b""], "label": [0.5]}, "is 0.5: a label is a whole number"),
        ({"image": pyarrow.array([], pyarrow.binary())}, "has no rows"),
    ],
)
def test_tables_without_images_or_labels_are_refused(tmp_path, table, message):
    path = write(tmp_path / "p.parquet", **table)
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_rows_without_images_are_named(tmp_path):
    cells = [{"bytes": None, "path": "a.png"}, None, {"bytes": BYTES[0], "path": None}]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    source = open_source(write(tmp_path / "p.parquet", image=pyarrow.array(cells, kind)))
    for index, message in ((0, r"p\.parquet\[0\] holds only the path"), (1, r"p\.parquet\[1\] holds no image")):
        with pytest.raises(UserError, match=message):
            source.decode(index)
    assert source.decode(2).size == (12, 12)


def test_labels_beyond_the_names_are_refused(tmp_path):
    said = {"info": {"features": {"y": {"_type": "ClassLabel", "names": ["a", "b"]}}}}
    table = pyarrow.table({"image": BYTES, "y": [0, 1, -1, 0, 0]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(said)}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet\[2\] in the column 'y' of .* is -1, but must be the index"):
        open_source(tmp_path / "p.parquet")
    table = pyarrow.table({"image": BYTES, "y": [0, 1, 0, None, 0]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(said)}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet\[3\] has no label in the column 'y'"):
        open_source(tmp_path / "p.parquet")


def test_several_splits_unknown_columns_and_damage_are_refused(tmp_path):
    write(tmp_path / "train-0.parquet", image=BYTES)
    write(tmp_path / "test-0.parquet", image=BYTES)
    with pytest.raises(UserError, match=r"several splits \(test, train: test-0, train-0\): .*test-0\.parquet"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "train-*.parquet")) == 5
    write(tmp_path / "train-1.parquet", image=BYTES, label=[0] * 5)
    with pytest.raises(UserError, match=r"The columns of .*train-1\.parquet \(image, label\) differ from"):
        open_source(tmp_path / "train-*.parquet")
    data = (tmp_path / "test-0.parquet").read_bytes()
    for spoilt in (b"", b"no table", data[:-3], data[: len(data) // 2]):
        (tmp_path / "test-0.parquet").write_bytes(spoilt)
        with pytest.raises(UserError, match=r"test-0\.parquet cannot be read as a parquet file"):
            open_source(tmp_path / "test-0.parquet")


def test_damage_inside_a_file_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"image": BYTES}), path)
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36  # overwrites the header of the first page
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"p\.parquet cannot be read as a parquet file: "):
        open_source(path).decode(0)


def test_huge_cells_are_named(tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "p.parquet", image=BYTES))
    monkeypatch.setattr(contract, "MAX_FILE_SIZE", 100)
    with pytest.raises(UserError, match=r"p\.parquet\[4\] has .*, more than the limit of 100 B per image"):
        source.decode(4)


def test_captions_that_are_not_text_are_left_out_and_counted(tmp_path):
    source = open_source(write(tmp_path / "p.parquet", image=BYTES, caption=[1, 2, 3, 4, 5]))
    assert not source.has_captions
    assert source.left_out == {"column 'caption', which holds no texts": 1}


def test_huge_row_groups_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_source, "MAX_GROUP", 100)
    with pytest.raises(UserError, match="has a row group of .* write the file again with fewer rows"):
        open_source(write(tmp_path / "p.parquet", image=BYTES))


def test_config_split_and_revision_are_passed_to_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        return _table(pictures())

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("hf:owner/name:config=small,split=test,revision=abc,caption=caption")
    assert asked == [("owner/name", "small", "test", "abc")]
    assert source.class_names == ["ant", "bee"]
    assert source.name(3) == "hf:owner/name[3]"
    assert source.identity["name"] == "hf:owner/name"
    assert pickle.loads(pickle.dumps(source)).decode(3).size == (12, 12)
    assert open_source("hf:owner/name").labels.tolist() == [0, 0, 0, 1, 1]
    assert asked[1] == ("owner/name", None, "train", None)


def test_streaming_is_refused_and_an_alternative_is_named():
    with pytest.raises(UserError, match=r"has no length .*hf://datasets/o/n@refs/convert/parquet/default/train/"):
        open_source("hf:o/n:streaming=true")


def test_hub_errors_become_one_line_errors(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("Couldn't reach 'o/n' on the Hub\nmore lines")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match=r"^hf:o/n cannot be loaded: Couldn't reach 'o/n' on the Hub\.$"):
        open_source("hf:o/n")
    with pytest.raises(UserError, match=r"'spilt'.* 'split'"):
        open_source("hf:o/n:spilt=x")
    for name in ("", ".", "../o", "/o/n", "o/n/m", "o /n"):
        with pytest.raises(UserError, match="hf:OWNER/NAME"):
            open_source(f"hf:{name}")


def test_a_saved_split_is_chosen(tmp_path):
    import datasets

    table = _table(pictures())
    datasets.DatasetDict(train=table, test=table.select(range(2))).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"has the splits train, test: give .*:split=NAME"):
        open_source(tmp_path / "both")
    assert len(open_source(f"{tmp_path / 'both'}:split=test")) == 2
    one = as_saved(tmp_path, pictures())
    with pytest.raises(UserError, match="holds one split: leave out split=train"):
        open_source(f"{one}:split=train")
    for path in (tmp_path / "saved").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="saved cannot be loaded"):
        open_source(one)


@pytest.mark.parametrize("kind", ["cut short", "no arrow", "offsets outside", "offsets backwards"])
def test_damaged_arrow_files_are_refused_before_reading(tmp_path, kind):
    """Arrow does not check offsets, and one that points outside the file would crash the process."""
    table, path = pyarrow.table({"image": [b"x" * 60, b"x" * 60]}), tmp_path / "a.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    if kind.startswith("offsets"):
        wrong = [0, 1 << 30, 1 << 30] if kind == "offsets outside" else [0, 60, 2]
        right, data = np.array([0, 60, 120], np.int32).tobytes(), path.read_bytes()
        assert data.count(right) == 1
        path.write_bytes(data.replace(right, np.array(wrong, np.int32).tobytes()))
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "no arrow":
        path.write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=r"a\.arrow cannot be loaded"):
        open_source(path)


def test_image_files_next_to_the_table_are_read(tmp_path):
    """A data set made by `imagefolder` contains paths."""
    import datasets

    (tmp_path / "a.png").write_bytes(BYTES[0])
    paths = [str(tmp_path / "a.png"), str(tmp_path / "gone.png")]
    table = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    source = tables.DatasetSource(table, "here")
    np.testing.assert_array_equal(np.asarray(source.decode(0)), pixels(pictures())[0])
    with pytest.raises(UserError, match=r"^here\[1\] cannot be read"):
        source.decode(1)


def test_images_outside_the_tables_folder_are_refused(tmp_path, monkeypatch):
    """Otherwise a foreign table could copy any image of this machine into the data."""
    (tmp_path / "private.png").write_bytes(BYTES[0])
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "a.png").write_bytes(BYTES[1])
    (saved / "link.png").symlink_to(tmp_path / "private.png")
    paths = [str(saved / "a.png"), str(tmp_path / "private.png"), str(saved / "link.png"), f"{saved}/../private.png"]
    table = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    assert open_source(table).decode(1).size == (12, 12)  # the caller's own table

    table.select([0]).save_to_disk(saved)
    arrow = next(saved.glob("*.arrow"))
    with pyarrow.OSFile(str(arrow), "wb") as file, pyarrow.ipc.new_stream(file, table.data.schema) as writer:
        writer.write_table(table.data.table)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: table)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", saved)
    for spec in (saved, arrow, "hf:o/n"):
        source = open_source(spec)
        np.testing.assert_array_equal(np.asarray(source.decode(0)), pixels(pictures())[1])
        for index in (1, 2, 3):
            with pytest.raises(
                UserError, match=rf"\[{index}\] names the file .* outside of .*: save the data set with"
            ):
                source.decode(index)


def test_arrow_files_outside_a_saved_data_sets_folder_are_refused(tmp_path):
    saved = Path(as_saved(tmp_path, pictures()))
    inside = next(saved.glob("*.arrow"))
    outside = tmp_path / "other.arrow"
    outside.write_bytes(inside.read_bytes())
    state = (saved / "state.json").read_text()
    (saved / "state.json").write_text(state.replace(inside.name, "../other.arrow"))
    with pytest.raises(UserError, match=r"saved names the file .*other\.arrow', outside of .*saved"):
        open_source(saved)


def test_a_pipe_in_place_of_an_arrow_file_is_refused(tmp_path):
    """Opening it would wait for a writer without end."""
    saved = Path(as_saved(tmp_path, pictures()))
    inside = next(saved.glob("*.arrow"))
    inside.unlink()
    os.mkfifo(inside)
    for source in (saved, saved / "*.arrow"):
        with pytest.raises(UserError, match="arrow is refused: it is a named pipe"):
            open_source(str(source))


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_the_format_of_a_table_does_not_matter(kind):
    formatted = open_source(_table(pictures()).with_format(kind))
    assert formatted.labels.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(np.asarray(formatted.decode(4)), pixels(pictures())[4])


def test_a_table_with_a_transform_is_refused():
    with pytest.raises(UserError, match="the data set has a transform, .*: apply it with map"):
        open_source(_table(pictures()).with_transform(lambda rows: rows))


@pytest.mark.parametrize("labels", ["folders", "labels.csv"])
def test_label_files_and_folders_are_refused_for_tables(tmp_path, labels):
    path = write(tmp_path / "p.parquet", image=BYTES)
    with pytest.raises(UserError, match=rf"labels is '{labels}', but the labels of .* are a column"):
        open_source(path, labels=labels)


def test_an_in_memory_data_set_is_a_source(tmp_path):
    images = [Image.new("RGB", (8, 8), (60 * n, 0, 0)) for n in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1, 0]}, features=features)
    source = open_source(table)
    assert source.labels.tolist() == [0, 1, 1, 0]
    assert source.class_names == ["a", "b"]
    assert source.image(2, 8).getpixel((0, 0)) == (120, 0, 0)
    assert "4 images of 2 classes" in repr(source)
    assert Image.open(io.BytesIO(source._repr_png_())).size == (256, 64)
    with pytest.raises(UserError, match="splits train"):
        open_source(datasets.DatasetDict(train=table))
    with pytest.raises(UserError, match="got list"):
        open_source([1])


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_any_damage_to_the_description_of_a_parquet_file_is_an_error_or_harmless(every, tmp_path):
    """pyarrow ends the process if it is asked for a column whose description has damaged statistics."""
    path = Path(write(tmp_path / "p.parquet", image=BYTES, label=[0, 1, 2, 3, 4]))
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused = 0
    for place in range(start, len(data) - 8, every):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            source = open_source(str(path))
            assert len([source.decode(index) for index in range(len(source))]) == 5
        except UserError:
            refused += 1
    assert refused > 100 / every


def test_fewer_rows_than_declared_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "p.parquet", image=BYTES, label=[0, 1, 2, 3, 4])
    monkeypatch.setattr(parquet_source.ParquetSource, "_measure", lambda *_: (6, 100))
    with pytest.raises(UserError, match="it has 5 rows instead of 6"):
        open_source(path)
