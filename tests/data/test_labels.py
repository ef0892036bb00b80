"""Labels from folders, dataset.json, tables, or none."""

import json
from pathlib import Path

import numpy as np
import pytest

from repa.base.errors import UserError, printable
from repa.data import open_source
from repa.data.sources.contract import Strings
from tests.data.conftest import pack
from tests.oracles.data import noise_image

NAMES = ["00000/img0.png", "00000/img1.png", "00001/img2.png"]


@pytest.fixture
def edm(tmp_path) -> Path:
    """Images in folders that are not classes."""
    root = tmp_path / "data"
    for i, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(i).save(root / name)
    return root


def listing(root: Path, labels) -> None:
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))


def table(tmp_path: Path, text: str, name: str = "labels.csv") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


@pytest.mark.parametrize("packed", [False, True])
def test_a_dataset_json_at_the_root_gives_the_labels(edm, tmp_path, packed):
    folders = open_source(edm)
    listing(edm, [[NAMES[2], 0], [NAMES[0], 4], [NAMES[1], 2]])  # in another order than the images
    source = open_source(pack(edm, tmp_path / "d.zip") if packed else edm)
    assert source.labels.tolist() == [4, 2, 0]
    assert source.class_names == ["0", "1", "2", "3", "4"]
    assert source.identity["labels_sha256"]
    assert "labels_sha256" not in folders.identity
    assert open_source(edm, labels="folders").class_names == ["00000", "00001"]


def test_null_labels_become_one_class(edm):
    listing(edm, None)
    source = open_source(edm)
    assert source.labels.tolist() == [0, 0, 0]
    assert source.class_names == ["all"]


def test_a_dataset_json_may_be_elsewhere(edm, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"labels": [[name, 1] for name in NAMES]}))
    assert open_source(edm, labels=str(tmp_path / "other.json")).labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[NAMES[0], 0], [NAMES[1], 0]], rf"{NAMES[2]} has no label in dataset\.json"),
        (
            [[name, 0] for name in [*NAMES, "x.png"]],
            r"labels to 1 images that are not in the source; the first is x\.png",
        ),
        ([[NAMES[0], 0], [NAMES[0], 1], [NAMES[1], 0], [NAMES[2], 0]], "names '00000/img0.png' twice"),
        ([[name, -1] for name in NAMES], "is -1: labels are 0 to"),
        ([[name, 10**7] for name in NAMES], "is 10000000: labels are 0 to"),
        ([[name, None] for name in NAMES], "has no label in"),
        ([[name, [0.0, 1.0]] for name in NAMES], r"is \[0\.0, 1\.0\]: a label is a whole number"),
        ([[name, 1.5] for name in NAMES], r"is 1\.5: a label is a whole number"),
        ([[name, True] for name in NAMES], "is True: a label is a whole number"),
        ({"a": 1}, "'labels' in dataset.json of .* is dict"),
        ([NAMES], "every entry of 'labels' is"),
        ([[3, 4]], "every entry of 'labels' is"),
    ],
)
def test_bad_listings_are_refused(edm, labels, message):
    listing(edm, labels)
    with pytest.raises(UserError, match=message):
        open_source(edm)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", "\udcff"])
def test_damaged_listings_are_refused(edm, text):
    (edm / "dataset.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"dataset\.json of .* (cannot be read as JSON|holds no labels)"):
        open_source(edm)


def test_a_column_of_names_gives_sorted_classes(edm, tmp_path):
    text = "wnid,file_name\nn02,00001/img2.png\nn10,00000/img0.png\nn02,00000/img1.png\n"
    source = open_source(edm, labels=f"{table(tmp_path, text)}:wnid")
    assert source.class_names == ["n02", "n10"]
    assert source.labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize(("name", "mark"), [("labels.csv", ","), ("labels.tsv", "\t")])
def test_a_column_of_numbers_gives_the_labels(edm, tmp_path, name, mark):
    rows = [("path", "label"), (NAMES[0], "10"), (NAMES[1], "9"), (NAMES[2], "0")]
    source = open_source(edm, labels=table(tmp_path, "\ufeff" + "\n".join(mark.join(row) for row in rows), name))
    assert source.labels.tolist() == [10, 9, 0]
    assert len(source.class_names) == 11


def test_a_parquet_column_gives_the_labels(edm, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"key": NAMES, "kind": ["b", "a", "b"]}), tmp_path / "labels.parquet")
    source = open_source(edm, labels=f"{tmp_path / 'labels.parquet'}:kind")
    assert (source.class_names, source.labels.tolist()) == (["a", "b"], [1, 0, 1])
    with pytest.raises(UserError, match=r"no column 'kin': it has 'key', 'kind'. Did you mean 'kind'"):
        open_source(edm, labels=f"{tmp_path / 'labels.parquet'}:kin")
    (tmp_path / "labels.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read as a parquet file"):
        open_source(edm, labels=str(tmp_path / "labels.parquet"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n00000/img0.png,a\n", "00000/img1.png has no label in"),
        ("file,label\n00000/img0.png,a\n00000/img1.png,\n00001/img2.png,b\n", "00000/img1.png has no label in"),
        ("file,label\n00000/img0.png,a\n00000/img1.png\n00001/img2.png,b\n", "00000/img1.png has no label in"),
        ("file,label\n00000/img0.png,01\n00000/img1.png,1\n00001/img2.png,2\n", "'01' and '1' are the same one"),
        ("file,label\n00000/img0.png,1\n00000/img1.png,two\n00001/img2.png,1.0\n", "'1' and '1.0' are the same one"),
        ("file,label\n00000/img0.png,a\n00000/img1.png,NaN\n00001/img2.png,b\n", "00000/img1.png has no label in"),
        ("file,label\n,a\n", "Row 2 of .* names no image"),
        ("file,lable\nx,a\n", "no column 'label': it has 'file', 'lable'. Did you mean 'lable'"),
        ("id,label\nx,a\n", "no column of image names: call it 'file_name'"),
        ("", "no column 'label': it has none"),
        ("file,label\nimg0.png,a\n", r"00000/img0\.png has no label in .* Did you mean 'img0\.png'.* from the root"),
    ],
)
def test_bad_tables_are_refused(edm, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        open_source(edm, labels=table(tmp_path, text))


def test_a_binary_file_is_not_a_table(edm, tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"file,label\n\xff\xfe,a\n")
    with pytest.raises(UserError, match=r"labels\.csv cannot be read as a table"):
        open_source(edm, labels=str(tmp_path / "labels.csv"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("label", "'label'.* 'none', 'folders'"),
        ("no.csv:x", "no such file"),
        ("no.json", "no such"),
        ("folders:3", "at folder depth 1"),
    ],
)
def test_an_invalid_choice_of_labels_is_refused(edm, labels, message):
    with pytest.raises(UserError, match=message):
        open_source(edm, labels=labels)


def test_labels_none_allows_loose_images_next_to_folders(edm):
    noise_image(0).save(edm / "loose.png")
    assert open_source(edm, labels="none").labels.tolist() == [0] * 4


def test_unicode_forms_of_a_name_match(tmp_path):
    (tmp_path / "d").mkdir()
    noise_image(0).save(tmp_path / "d" / "Grünspecht 🐦.png")
    source = open_source(tmp_path / "d", labels=table(tmp_path, "file,label\nGrünspecht 🐦.png,Vögel\n"))
    assert source.class_names == ["Vögel"]


def test_compact_strings_behave_like_a_list():
    texts = ["", "a", "Käfer", "🐞", "", "caf\udce9", "\ud800", "z" * 300]
    compact = Strings(texts)
    assert list(compact) == texts
    assert [compact[-i] for i in range(1, 9)] == texts[::-1]
    assert compact[2:5] == texts[2:5]
    with pytest.raises(IndexError):
        compact[8]
    assert printable("caf\udce9 🐞") == "caf\\udce9 🐞"
    assert len(Strings([])) == 0


def test_names_take_little_memory():
    import sys

    compact = Strings(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(100_000))
    assert sys.getsizeof(compact._letters) + compact._ends.nbytes < 40 * 100_000
    assert compact[99_999] == "n00000999/n00000999_99999.JPEG"
    assert isinstance(compact._ends, np.ndarray)


@pytest.mark.parametrize("name", ["labels.csv", "labels.txt"])
def test_a_table_in_the_source_is_found_from_anywhere_and_is_not_left_out(edm, monkeypatch, tmp_path, name):
    mark = " " if name.endswith(".txt") else ","
    rows = [("file", "kind"), *zip(NAMES, "aba", strict=True)]
    table(edm, "".join(f"{mark.join(row)}\n" for row in rows), name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for labels in (f"{name}:kind", f"{edm / name}:kind"):
        source = open_source(edm, labels=labels)
        assert source.class_names == ["a", "b"]
        assert not source.left_out
    with pytest.raises(UserError, match=r"no such file here or in .*: correct the path"):
        open_source(edm, labels="label.csv:kind")


def test_a_table_beside_an_archive_is_found(edm, tmp_path, monkeypatch):
    table(tmp_path, "file,kind\n" + "".join(f"{name},a\n" for name in NAMES))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_source(pack(edm, tmp_path / "d.zip"), labels="labels.csv:kind").class_names == ["a"]


@pytest.mark.parametrize(
    ("texts", "names"), [(["1,0", "0,0", "2,0"], ["0", "1", "2"]), (["1,000", "1", "2"], ["1", "1,000", "2"])]
)
def test_a_decimal_comma_is_no_comma_of_thousands(texts, names, edm, tmp_path):
    rows = "".join(f"{path};{text}\n" for path, text in zip(NAMES, texts, strict=True))
    assert open_source(edm, labels=table(tmp_path, "file_name;label\n" + rows)).class_names == names


def _in_one_folder(folder, names):
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        noise_image(i).save(folder / name)
    return folder


CLASSES = [f"{name}{i:0{width}d}.png" for name, width in (("cat_", 3), ("Old dog (", 1)) for i in range(6)]
CLASSES = [name.replace(".png", ").png") if "(" in name else name for name in CLASSES]


def test_file_names_of_classes_ask_for_a_choice(tmp_path):
    folder = _in_one_folder(tmp_path / "animals", CLASSES)
    with pytest.raises(UserError, match=r"look like classes with numbers \(.*cat.*\): give --labels names"):
        open_source(folder)
    source = open_source(folder, labels="names")
    assert source.class_names == ["Old dog", "cat"]
    assert [source.class_names[label] for label in source.labels] == ["Old dog"] * 6 + ["cat"] * 6
    assert open_source(folder, labels="none").class_names == ["all"]
    inside = _in_one_folder(tmp_path / "set" / "images", CLASSES).parent  # a folder that is no class
    with pytest.raises(UserError, match="give --labels names"):
        open_source(inside)


@pytest.mark.parametrize(
    "names",
    [
        [f"{word}_{i:04d}.jpg" for word in ("IMG", "DSC") for i in range(6)],
        [f"IMG-2023010{day}-WA{i:04d}.jpg" for day in range(3) for i in range(6)],
        [f"ILSVRC2012_val_{i:08d}.png" for i in range(12)],
        [f"{i:06d}.png" for i in range(12)],
        [f"{i:05d}_crop_{k}.png" for i in range(2) for k in range(6)],
        [f"cat_{i}.png" for i in range(10)] + ["dog_1.png", "bird_1.png"],  # by chance
    ],
)
def test_file_names_of_cameras_and_programs_are_one_class(names, tmp_path):
    source = open_source(_in_one_folder(tmp_path / "photos", names))
    assert source.class_names == ["all"]
    assert source.labels_from == "no folders or file names of classes: one class"


def test_names_with_captions_are_no_labels(tmp_path):
    folder = _in_one_folder(tmp_path / "animals", CLASSES)
    for name in CLASSES:
        (folder / name).with_suffix(".txt").write_text("an animal")
    assert open_source(folder).class_names == ["all"]


def test_names_without_a_number_are_no_labels(tmp_path):
    folder = _in_one_folder(tmp_path / "animals", [*CLASSES, "readme.png"])
    with pytest.raises(UserError, match="readme.png of .* has no name before a number"):
        open_source(folder, labels="names")
