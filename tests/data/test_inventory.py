"""How sources find labels: what is reported, what is refused, and which option resolves it."""

import io
import json
import shutil
import subprocess
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageCms
from pyarrow import parquet

from repa.base.errors import UserError
from repa.base.images import decode_image
from repa.cli.main import run as repa
from repa.data import open_source
from repa.data.manifest import Manifest


def picture(seed=0, size=8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


def png(seed=0) -> bytes:
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return out.getvalue()


def tree(root, *paths):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(number))
    return root


def classes(source):
    return [source.class_names[label] for label in source.labels]


def test_numeric_class_names_are_sorted_by_value(tmp_path):
    source = open_source(tree(tmp_path, *(f"{n}/a.png" for n in (0, 1, 2, 3, 10, 11))))
    assert source.class_names == ["0", "1", "2", "3", "10", "11"]


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("training", "validation")])
def test_split_folders_are_not_classes(splits, tmp_path):
    tree(tmp_path, *(f"{split}/{name}/1.png" for split in splits for name in ("cat", "dog")))
    with pytest.raises(UserError, match="splits"):
        open_source(tmp_path)
    assert open_source(tmp_path / splits[0]).class_names == ["cat", "dog"]
    assert open_source(tmp_path, labels="folders:2").class_names == ["cat", "dog"]
    assert open_source(tmp_path, labels="folders").class_names == sorted(splits)


def test_a_single_split_folder_around_the_classes_is_announced(tmp_path):
    source = open_source(tree(tmp_path, "train/cat/1.png", "train/dog/1.png"))
    assert source.class_names == ["cat", "dog"]
    assert "train" in source.labels_from


def test_subfolders_of_a_class_need_a_choice(tmp_path):
    tree(tmp_path, "cat/2019/1.png", "cat/2020/2.png")
    with pytest.raises(UserError, match="--labels folders:2"):
        open_source(tmp_path)
    assert open_source(tmp_path, labels="folders").class_names == ["cat"]
    assert open_source(tmp_path, labels="folders:last").class_names == ["2019", "2020"]


def test_system_folders_and_other_files_are_counted(tmp_path):
    tree(tmp_path, "cat/1.png", "dog/1.png", "@eaDir/x.png", "$RECYCLE.BIN/y.png", "lost+found/z.png")
    (tmp_path / "bird").mkdir()
    (tmp_path / "cat/1.raw").write_bytes(b"x")
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert source.left_out == {
        "files .raw": 1, "folder without images: bird": 1, "hidden files and folders of the system": 3
    }  # fmt: skip


@pytest.mark.parametrize("ending", ["jfif", "jpe", "ppm", "tga", "jp2", "avif", "apng"])
def test_every_extension_of_a_decodable_format_is_read(ending, tmp_path):
    tree(tmp_path, "a.png")
    kind = {"jfif": "JPEG", "jpe": "JPEG", "tga": "TGA", "jp2": "JPEG2000", "avif": "AVIF", "ppm": "PPM", "apng": "PNG"}
    try:
        picture().save(tmp_path / f"b.{ending}", kind[ending])
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {ending}")
    source = open_source(tmp_path)
    assert len(source) == 2
    source.decode(1)


def test_backslashes_in_a_zip_are_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        for number, name in enumerate(("cat\\1.png", "dog\\1.png")):
            archive.writestr(name, png(number))
    source = open_source(tmp_path / "w.zip")
    assert source.class_names == ["cat", "dog"]
    source.decode(1)


def test_other_spellings_of_member_paths_are_normalised(tmp_path):
    names = ["./cat/1.png", "cat//2.png", "cat/./3.png", "dog\\1.png"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, png(number))
    source = open_source(tmp_path / "x.zip")
    assert (classes(source), source.left_out) == (["cat"] * 3 + ["dog"], {})
    assert np.array_equal(np.asarray(source.decode(2)), np.asarray(picture(2)))
    tar(tmp_path / "x.tar", **{name: png() for name in names})
    assert classes(open_source(tmp_path / "x.tar", labels="folders")) == ["cat"] * 3 + ["dog"]
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.writestr("cat/2.png", png())
    with pytest.raises(UserError, match=r"'cat/2\.png' twice"):
        open_source(tmp_path / "x.zip")


def test_backslashes_in_a_tar_are_folders(tmp_path):
    tar(tmp_path / "x.tar", **{"cat\\1.png": png(), "dog\\1.png": png()})
    with pytest.raises(UserError, match="folders such as cat, dog"):
        open_source(tmp_path / "x.tar")


def tar(path, **members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_one_tar_per_class_needs_a_choice(tmp_path):
    for number, name in enumerate(("n01440764", "n01443537")):
        tar(tmp_path / f"{name}.tar", **{f"{name}_1.png": png(number), f"{name}_2.png": png(number + 5)})
    with pytest.raises(UserError, match="--labels tars"):
        open_source(tmp_path)
    source = open_source(tmp_path, labels="tars")
    assert (source.class_names, source.labels.tolist()) == (["n01440764", "n01443537"], [0, 0, 1, 1])
    assert open_source(tmp_path, labels="none").class_names == ["all"]


def test_numbered_shards_need_no_choice(tmp_path):
    for number in range(2):
        tar(tmp_path / f"train-{number:04}.tar", **{f"{number}.png": png(number)})
    assert open_source(tmp_path).class_names == ["all"]


def test_tars_in_an_inner_folder_are_named(tmp_path):
    (tmp_path / "s/train").mkdir(parents=True)
    for number, name in enumerate(("cat", "dog")):
        tar(tmp_path / "s/train" / f"{name}.TAR", **{f"{number}.png": png(number)})
    with pytest.raises(UserError, match=r"holds no images, but 2 files \.tar: give '(.*)'\.") as error:
        open_source(tmp_path / "s")
    with pytest.raises(UserError, match="--labels tars if each tar is a class"):
        open_source(str(error.value).split("'")[1])


@pytest.mark.parametrize("names", [("class_0", "class_1"), ("0", "1"), ("n01440764", "n01440765")])
def test_consecutive_numbers_may_be_classes(names, tmp_path):
    (tmp_path / "tars").mkdir()
    for number, name in enumerate(names):
        tar(tmp_path / "tars" / f"{name}.tar", **{f"{number}.png": png(number)})
    with pytest.raises(UserError, match="--labels tars if each tar is a class"):
        open_source(tmp_path / "tars")
    with pytest.raises(UserError, match="leave --labels out"):  # not: --labels none, which would lose the classes
        open_source(tmp_path / "tars", labels="folders")
    assert open_source(tmp_path / "tars", labels="tars").class_names == list(names)


def test_dots_in_sample_names_are_part_of_the_name(tmp_path):
    members = {}
    for number, label in enumerate(("cat", "dog")):
        members |= {f"{number}.v2.png": png(number), f"{number}.v2.cls": label.encode()}
    tar(tmp_path / "a.tar", **members)
    assert classes(open_source(tmp_path / "a.tar")) == ["cat", "dog"]


@pytest.mark.parametrize("key", ["class", "target"])
def test_a_json_key_that_looks_like_a_label_needs_a_choice(key, tmp_path):
    tar(tmp_path / "a.tar", **{"0.png": png(), "0.json": json.dumps({key: 1}).encode()})
    with pytest.raises(UserError, match=f"label={key}"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("column", ["labels", "fine_label", "class", "cls", "target"])
def test_columns_named_like_labels_are_recognised(column, tmp_path):
    parquet.write_table(pa.table({"image": [png(0), png(1)], column: [1, 0]}), tmp_path / "p.parquet")
    source = open_source(tmp_path / "p.parquet")
    assert source.labels.tolist() == [1, 0]
    assert column in source.labels_from


def test_unknown_columns_are_named_with_how_to_choose_one(tmp_path):
    file = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"image": [png(0), png(1)], "text": ["a", "b"], "species": ["owl", "cat"]}), file)
    source = open_source(file)
    assert (len(source.class_names), f"not read: species; {file}:label=species selects one" in source.labels_from) == (
        1,
        True,
    )
    assert open_source(f"{file}:label=species").class_names == ["cat", "owl"]


def test_two_possible_label_columns_are_refused(tmp_path):
    parquet.write_table(pa.table({"image": [png()], "fine_label": [1], "coarse_label": [0]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="label=fine_label"):
        open_source(tmp_path / "p.parquet")


def test_parquet_files_of_several_splits_are_refused(tmp_path):
    for name in ("train", "test"):
        parquet.write_table(pa.table({"image": [png()], "label": [0]}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="splits"):
        open_source(tmp_path)


@pytest.mark.parametrize("file", ["metadata.csv", "metadata.jsonl"])
def test_imagefolder_metadata_is_read(file, tmp_path):
    tree(tmp_path, "a.png", "b.png")
    rows = [{"file_name": "a.png", "label": "dog"}, {"file_name": "b.png", "label": "cat"}]
    csv = "file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
    (tmp_path / file).write_text(csv if file.endswith("csv") else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = open_source(tmp_path)
    assert classes(source) == ["dog", "cat"]
    assert file in source.labels_from


def table(tmp_path, text):
    tree(tmp_path, *(f"{name}.png" for name in "abc"))
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    return open_source(tmp_path, labels=str(tmp_path / "labels.csv"))


def test_numbers_written_as_floats_are_numbers(tmp_path):
    assert table(tmp_path, "name,label\na.png,10.0\nb.png,2.0\nc.png,0.0\n").labels.tolist() == [10, 2, 0]


def test_spaces_and_unicode_forms_do_not_split_classes(tmp_path):
    source = table(tmp_path, "name,label\na.png, cat\nb.png,cat\nc.png,caf\u0065\u0301\n")
    assert source.class_names == ["caf\u00e9", "cat"]


def test_the_celeba_table_is_read(tmp_path):
    tree(tmp_path, *(f"{name}.png" for name in "abc"))
    (tmp_path / "attr.csv").write_text("image_id,Smiling,Young\na.png,-1,1\nb.png,1,1\nc.png,-1,-1\n", encoding="utf-8")
    source = open_source(tmp_path, labels=f"{tmp_path / 'attr.csv'}:Smiling")
    assert (source.class_names, source.labels.tolist()) == (["-1", "1"], [0, 1, 0])


def test_fractional_numbers_are_not_labels(tmp_path):
    with pytest.raises(UserError, match="a label is a whole number"):
        parquet.write_table(pa.table({"image": [png()], "label": [0.5]}), tmp_path / "p.parquet")
        open_source(tmp_path / "p.parquet")


def test_replaced_images_change_the_identity(tmp_path):
    tree(tmp_path, "a/1.bmp", "b/2.bmp")
    before = open_source(tmp_path).identity
    data = (tmp_path / "a/1.bmp").read_bytes()
    (tmp_path / "a/1.bmp").write_bytes(bytes(255 - byte for byte in data))
    assert open_source(tmp_path).identity != before


def test_colour_profiles_are_converted(tmp_path):
    """A profile with sRGB's primaries changes nothing; another one changes the colours."""
    flat = Image.new("RGB", (4, 4), (200, 30, 30))

    def saved(profile):
        out = io.BytesIO()
        flat.save(out, "PNG", icc_profile=ImageCms.ImageCmsProfile(profile).tobytes())
        return np.asarray(decode_image(out.getvalue(), "x"))

    assert np.abs(saved(ImageCms.createProfile("sRGB")).astype(int) - np.asarray(flat)).max() <= 1
    out = io.BytesIO()
    flat.save(out, "PNG", icc_profile=b"no profile")
    assert np.array_equal(np.asarray(decode_image(out.getvalue(), "x")), np.asarray(flat))


def test_the_inventory_is_printed_and_stored(tmp_path, capsys):
    tree(tmp_path / "in", "cat/1.png", "cat/2.png", "dog/1.png")
    (tmp_path / "in/cat/notes.md").write_text("x", encoding="utf-8")
    assert repa(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--resolution", "8"]) == 0
    text = capsys.readouterr().out
    for words in ("the first folder of each path", "cat 2", "dog 1", "files .md", "repa train"):
        assert words in text
    manifest = Manifest.open(tmp_path / "out")
    assert manifest.inventory.left_out == {"files .md": 1}
    assert manifest.class_counts == (2, 1)


def test_utf_8_is_read_in_an_ascii_locale(tmp_path, monkeypatch):
    import os
    import subprocess
    import sys

    tree(tmp_path / "in", "caf\u00e9/1.png", "dog/1.png")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in (["prepare", "in", "out", "--resolution", "8"], ["show", "out"]):
        done = subprocess.run(
            [sys.executable, "-m", "repa", *command], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_png_with_a_long_text_chunk_is_read(tmp_path):
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "node " * 600_000, zip=True)
    out = io.BytesIO()
    picture().save(out, "PNG", pnginfo=info)
    assert decode_image(out.getvalue(), "x").size == (8, 8)


@pytest.mark.parametrize(
    "splits", [("train2017", "val2017"), ("training_set", "test_set"), ("seg_train", "seg_test", "seg_pred")]
)
def test_longer_split_names_are_recognised(splits, tmp_path):
    with pytest.raises(UserError, match="splits"):
        open_source(tree(tmp_path, *(f"{split}/{split}/{name}/1.png" for split in splits for name in ("cat", "dog"))))
    assert open_source(tmp_path, labels="folders:last").class_names == ["cat", "dog"]
    assert open_source(tmp_path, labels="folders:path").class_names == sorted(
        f"{split}/{split}/{name}" for split in splits for name in ("cat", "dog")
    )


def test_class_names_that_contain_a_split_name_are_classes(tmp_path):
    assert open_source(tree(tmp_path, "test_tube/1.png", "bus/1.png")).class_names == ["bus", "test_tube"]


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_shards_of_several_splits_are_refused(ending, tmp_path):
    for split in ("my_train", "my_val"):
        tar(tmp_path / f"{split}.tar", **{"a.png": png(), "a.cls": b"0"})
        table = pa.table({"image": [png()], "label": [0]})
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match="several splits"):
        open_source(f"{tmp_path}/*.{ending}")
    assert len(open_source(f"{tmp_path}/my_val.{ending}")) == 1


def test_folders_inside_classes_are_reported(tmp_path):
    source = open_source(tree(tmp_path, "cat/2019/1.png", "dog/2020/2.png", "dog/3.png"))
    assert source.class_names == ["cat", "dog"]
    assert "2019, 2020" in source.labels_from


def test_system_folders_are_counted_at_any_depth(tmp_path):
    tree(
        tmp_path,
        "cat/1.png",
        "cat/@eaDir/1.png",
        "cat/._1.png",
        "dog/1.png",
        ".ipynb_checkpoints/1.png",
        "dog/__MACOSX/1.png",
    )
    assert open_source(tmp_path).left_out == {"hidden files and folders of the system": 4}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("cat/1.png", "dog/1.png", "__MACOSX/cat/._1.png", "bird/"):
            archive.writestr(name, b"" if name.endswith("/") else png())
    source = open_source(tmp_path / "x.zip")
    assert source.class_names == ["cat", "dog"]
    assert source.left_out == {"folder without images: bird": 1, "hidden files and folders of the system": 1}


def test_signed_numbers_are_sorted_by_value(tmp_path):
    assert open_source(tree(tmp_path, "-10/1.png", "2/1.png", "-1/1.png")).class_names == ["-10", "-1", "2"]


@pytest.mark.parametrize(
    ("file", "text", "choice"),
    [
        ("labels.csv", "filename,label\n0.png,a\n1.png,b\n", "labels.csv:label"),
        ("things.tsv", "file\tclass\n0.png\ta\n1.png\tb\n", "things.tsv:class"),
        (
            "rows.jsonl",
            '{"file_name": "0.png", "target": 1}\n{"file_name": "1.png", "target": 0}\n',
            "rows.jsonl:target",
        ),
        ("list_attr_celeba.txt", "2\nBald Smiling\n0.png -1 1\n1.png  1 1\n", "list_attr_celeba.txt:Bald"),
        ("identity_CelebA.txt", "0.png 7\n1.png 5\n", "identity_CelebA.txt:label"),
    ],
)
def test_tables_next_to_loose_images_need_a_choice(file, text, choice, tmp_path):
    tree(tmp_path, "0.png", "1.png")
    (tmp_path / "0.txt").write_text("hello world")  # a caption
    (tmp_path / "README.txt").write_text("two words\n")
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=choice) as error:
        open_source(tmp_path)
    assert str(error.value).endswith("or --labels none for one class.")  # no folder holds an image
    assert (
        len(
            set(open_source(tmp_path, labels=f"{tmp_path / file.partition(':')[0]}:{choice.rpartition(':')[2]}").labels)
        )
        == 2
    )
    assert open_source(tmp_path, labels="none").class_names == ["all"]
    (tmp_path / file).unlink()
    assert open_source(tmp_path).class_names == ["all"]


@pytest.mark.parametrize("text", ["path;label\n0.png;a\n1.png;b\n", "path,label\n./0.png,a\n.\\1.png,b\n"])
def test_tables_in_other_dialects_are_read(text, tmp_path):
    tree(tmp_path / "images", "0.png", "1.png")
    (tmp_path / "labels.csv").write_text(text)
    assert classes(open_source(tmp_path / "images", labels=f"{tmp_path / 'labels.csv'}:label")) == ["a", "b"]


@pytest.mark.parametrize(
    ("file", "text", "choice"),
    [
        ("train.csv", "image,species\n0.png,a\n1.png,b\n", "train.csv:species"),
        ("trainLabels.csv", "Id,level\n0.png,a\n1.png,b\n", "trainLabels.csv:level"),
        ("metadata.csv", "file_name,label_id\n0.png,3\n1.png,4\n", "metadata.csv:label_id"),
        ("metadata.json", '[{"file_name": "0.png", "label": 1}]', "metadata.json"),
    ],
)
def test_a_table_of_the_images_needs_a_choice_under_any_column_name(file, text, choice, tmp_path):
    tree(tmp_path, "0.png", "1.png")
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"looks like labels: give --labels [^ ]*{choice},"):
        open_source(tmp_path)
    assert open_source(tmp_path, labels="none").class_names == ["all"]


def test_a_table_of_captions_needs_no_choice(tmp_path):
    tree(tmp_path, "0.png", "1.png")
    (tmp_path / "captions.csv").write_text("image,caption\n0.png,a dog\n1.png,a cat\n")
    assert open_source(tmp_path).class_names == ["all"]


@pytest.mark.parametrize("column", ["label_id", "className", "image_category", "target.id"])
def test_columns_that_may_be_labels_need_a_choice(column, tmp_path):
    parquet.write_table(pa.table({"image": [png(), png(1)], column: [1, 0]}), tmp_path / "p.parquet")
    tar(tmp_path / "s.tar", **{"0.png": png(), "0.json": json.dumps({column: 1}).encode()})
    for source in (tmp_path / "p.parquet", tmp_path / "s.tar"):
        with pytest.raises(UserError, match=rf"{column}: give .*:label={column}, or --labels none"):
            open_source(source)
        assert open_source(source, labels="none").class_names == ["all"]
    assert classes(open_source(f"{tmp_path / 'p.parquet'}:label={column}")) == ["1", "0"]


def test_endings_beyond_the_listed_ones_are_counted(tmp_path):
    tree(tmp_path / "s", "cat/1.png", *(f"cat/x.u{number}" for number in range(30)))
    left_out = open_source(tmp_path / "s").left_out
    assert sum(left_out.values()) == 30
    assert left_out["files with other endings"] == 10


def test_unread_files_of_samples_are_counted_or_need_a_choice(tmp_path):
    tar(tmp_path / "a.tar", **{"0.png": png(), "0.label": b"1", "0.depth": b"x", "1.png": png(), "1.label": b"0"})
    source = open_source(tmp_path / "a.tar")
    assert classes(source) == ["1", "0"]
    assert source.left_out == {"files .depth of samples": 1}
    tar(tmp_path / "b.tar", **{"0.png": png(), "0.class": b"cat"})
    with pytest.raises(UserError, match="label=class"):
        open_source(tmp_path / "b.tar")
    assert classes(open_source(f"{tmp_path / 'b.tar'}:label=class")) == ["cat"]


@pytest.mark.parametrize(
    ("first", "second", "choice"),
    [
        ({"0.json": b'{"caption": "x"}'}, {"1.json": b'{"class": 4}'}, "class"),  # only the second sample shows it
        ({"0.json": b'{"label": null, "class": 3}'}, {"1.json": b'{"label": null, "class": 4}'}, "class"),
        ({"0.cls.txt": b"3"}, {"1.cls.txt": b"4"}, r"cls\.txt"),
    ],
)
def test_a_label_like_key_in_any_sample_needs_a_choice(first, second, choice, tmp_path):
    tar(tmp_path / "a.tar", **{"0.png": png()}, **first, **{"1.png": png()}, **second)
    for _ in range(2):  # the second time the index is in the cache
        with pytest.raises(UserError, match=f"label={choice},"):
            open_source(tmp_path / "a.tar")


def test_hidden_files_in_a_tar_are_counted(tmp_path):
    tar(tmp_path / "a.tar", **{"0.png": png(), "._0.png": b"x", "@eaDir/0.png": png(), "#snapshot/0.png": png()})
    for _ in range(2):
        assert open_source(tmp_path / "a.tar").left_out == {"hidden files and folders of the system": 3}


def test_skipped_arrays_are_named(tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.array([1.0, 0.0]), x_test=images)
    source = open_source(tmp_path / "a.npz")
    assert (classes(source), source.left_out) == (["1", "0"], {"array 'x_test'": 1})
    np.savez(tmp_path / "b.npz", images=images, species=np.array([1, 0]))
    assert open_source(tmp_path / "b.npz").left_out == {"array 'species'": 1}


@pytest.mark.parametrize("shape", [(32, 32, 3), (3, 32, 32)])
def test_one_colour_image_is_not_read_as_many_grey_ones(shape, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="single colour image"):
        open_source(tmp_path / "a.npy")


def test_a_binary_column_named_caption_does_not_hide_the_image(tmp_path):
    parquet.write_table(pa.table({"image": [png()], "caption": [b"hello"], "label": [0]}), tmp_path / "a.parquet")
    assert len(open_source(tmp_path / "a.parquet")) == 1


def test_captions_need_no_choice_and_are_counted(tmp_path, capsys):
    tree(tmp_path / "x", *(f"cat/{n}.png" for n in range(4)))
    (tmp_path / "x/cat/0.TXT").write_text("hello")
    (tmp_path / "x/cat/1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "x/cat/2.txt").write_text("")
    assert (
        repa(["prepare", str(tmp_path / "x"), str(tmp_path / "d"), "--resolution", "8", "--autoencoder", "pixels"]) == 0
    )
    assert "captions    of 1 of 4 images" in capsys.readouterr().out
    assert Manifest.open(tmp_path / "d").inventory.captioned == 1


@pytest.mark.parametrize(
    "text", ['{"file_name": "0.png", "text": "hello"}\n{"file_name": "1.png", "text": ["a", "b"]}\n', "[1]\n", "\udcff"]
)
def test_captions_in_metadata_are_read(text, tmp_path):
    tree(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    source = open_source(tmp_path, labels="none")
    captions = [source.captions(index) for index in range(2)]
    assert captions == ([("hello",), ("a", "b")] if "hello" in text else [(), ()])


@pytest.mark.parametrize("file", ["labels.csv", "images/labels.csv"])
def test_a_table_next_to_the_only_image_folder_is_read(file, tmp_path):
    """The option named in the error works: paths may start at the image folder."""
    tree(tmp_path, "images/0.png", "images/1.png")
    (tmp_path / file).write_text("file_name,label\n0.png,a\n1.png,b\n")
    with pytest.raises(UserError, match=f"--labels {tmp_path / file}:label"):
        open_source(tmp_path)
    assert classes(open_source(tmp_path, labels=f"{tmp_path / file}:label")) == ["a", "b"]
    assert open_source(tmp_path, labels="folders").class_names == ["images"]


def test_a_table_next_to_numbered_folders_needs_a_choice(tmp_path):
    tree(tmp_path, "00/0.png", "01/1.png")
    (tmp_path / "words.csv").write_text("class,meaning\n00,cat\n01,dog\n")
    assert open_source(tmp_path).class_names == ["00", "01"]
    (tmp_path / "labels.csv").write_text("file_name,label\n00/0.png,a\n01/1.png,a\n")
    with pytest.raises(UserError, match="both folders of classes and labels.csv"):
        open_source(tmp_path)
    assert open_source(tmp_path, labels="folders").class_names == ["00", "01"]


@pytest.mark.parametrize(("ending", "text"), [("cls", "1"), ("json", '{"label": 1}')])
def test_files_of_an_unpacked_webdataset_need_a_choice(ending, text, tmp_path):
    for number in "01":
        tree(tmp_path / "x", f"{number}.png")
        (tmp_path / "x" / f"{number}.{ending}").write_text(text.replace("1", number))
    with pytest.raises(UserError, match="pack it with"):
        open_source(tmp_path / "x")
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "x.tar", "-C", tmp_path / "x", "."], check=True)
    assert classes(open_source(tmp_path / "x.tar")) == ["0", "1"]
    if ending == "json":  # a zip must be unpacked before tar can pack it
        archive = shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path / "x")
        with pytest.raises(UserError, match="unpack it to FOLDER, then pack it with .* -C FOLDER"):
            open_source(archive)


def test_a_tar_with_one_outer_folder_has_its_classes(tmp_path):
    tar(tmp_path / "a.tar", **{"imgs/cat/0.png": png(), "imgs/dog/1.png": png()})
    with pytest.raises(UserError, match="imgs/cat, imgs/dog"):
        open_source(tmp_path / "a.tar")
    assert open_source(tmp_path / "a.tar", labels="folders:2").class_names == ["cat", "dog"]


def test_metadata_with_semicolons_and_several_rows_per_image_is_read(tmp_path):
    tree(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.csv").write_text("File_Name;label;text\n0.png;a;one\n1.png;b;two\n./0.png;a;three\n")
    source = open_source(tmp_path)
    assert (classes(source), source.captions(0)) == (["a", "b"], ("one", "three"))
    (tmp_path / "metadata.csv").write_text("file_name;label\n0.png;a\n1.png;b\n0.png;b\n")
    with pytest.raises(UserError, match=r"'0\.png' twice"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metadata.csv", "file_name,label,label\n0.png,a,b\n"),
        ("metadata.jsonl", '{"file_name": "0.png", "label": 1, "label": 2}'),
        ("dataset.json", '{"labels": null, "labels": [["0.png", 1]]}'),
    ],
)
def test_duplicate_label_columns_and_keys_are_refused(file, text, tmp_path):
    tree(tmp_path, "0.png")
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match="twice"):
        open_source(tmp_path)


def test_caption_files_with_other_line_endings_are_read(tmp_path):
    tree(tmp_path, "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert open_source(tmp_path).captions(0) == ("a\u2028b\x85c",)


def test_files_in_a_folder_without_images_are_reported(tmp_path):
    (tmp_path / "default/train").mkdir(parents=True)
    (tmp_path / "default/train/0000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"but 1 files \.parquet"):
        open_source(tmp_path)


@pytest.mark.parametrize("splits", [("trainA", "testA"), ("TrainSet", "TestSet")])
def test_split_names_in_camel_case_are_recognised(splits, tmp_path):
    tree(tmp_path, *(f"{split}/{number}.png" for split in splits for number in range(2)))
    with pytest.raises(UserError, match="look like splits"):
        open_source(tmp_path)


def test_splits_inside_class_folders_need_a_choice(tmp_path):
    for inner in ("", "2019/"):
        tree(tmp_path, *(f"{name}/{inner}{split}/1.png" for name in ("cat", "dog") for split in ("train", "val")))
        with pytest.raises(UserError, match=r"look like splits \(train, val\)"):
            open_source(tmp_path)
        assert classes(open_source(tmp_path, labels="folders")) == ["cat", "cat", "dog", "dog"]
        shutil.rmtree(tmp_path)


@pytest.mark.parametrize("file", ["metadata.csv", "train/metadata.csv", "dataset.json"])
def test_labels_of_several_splits_need_a_choice(file, tmp_path):
    tree(tmp_path, "train/a.png", "test/b.png")
    if file == "dataset.json":
        (tmp_path / file).write_text('{"labels": [["train/a.png", 0], ["test/b.png", 1]]}')
    elif file == "metadata.csv":
        (tmp_path / file).write_text("file_name,label\ntrain/a.png,0\ntest/b.png,1\n")
    else:
        (tmp_path / file).write_text("file_name,label\na.png,0\n")
        (tmp_path / "test/metadata.csv").write_text("file_name,label\nb.png,1\n")
    with pytest.raises(UserError, match=r"splits \(test, train\)"):
        open_source(tmp_path)
    (tmp_path / "table.csv").write_text("file_name,label\ntrain/a.png,0\ntest/b.png,1\n")
    source = open_source(tmp_path, labels=f"{tmp_path / 'table.csv'}:label")
    assert classes(source) == ["1", "0"]
    assert "the splits test, train are one set" in source.labels_from


def test_splits_inside_a_tar_are_reported(tmp_path):
    tar(tmp_path / "a.tar", **{"train/0.png": png(), "train/0.cls": b"0", "val/1.png": png(), "val/1.cls": b"1"})
    assert "the splits train, val are one set" in open_source(tmp_path / "a.tar").labels_from


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_shards_in_split_folders_are_refused(ending, tmp_path):
    for split in ("train", "test"):
        path = tmp_path / "val of someone" / split / f"0.{ending}"
        path.parent.mkdir(parents=True)
        if ending == "tar":
            tar(path, **{"0.png": png(), "0.cls": b"0"})
        else:
            parquet.write_table(pa.table({"image": [png()], "label": [0]}), path)
    with pytest.raises(UserError, match=r"several splits \(test, train"):
        open_source(tmp_path / "val of someone" / "*" / f"0.{ending}")
    assert len(open_source(tmp_path / "val of someone" / "train" / f"*.{ending}")) == 1


@pytest.mark.parametrize("pattern", ["{0,0}.tar", "{0,*}.tar"])
def test_no_shard_is_counted_twice(pattern, tmp_path):
    tar(tmp_path / "0.tar", **{"0.png": png()})
    with pytest.raises(UserError, match=r"0\.tar twice"):
        open_source(tmp_path / pattern)


def test_metadata_in_every_folder_is_read(tmp_path):
    tree(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a/metadata.csv").write_text("file_name,text\n1.png,one\n")
    (tmp_path / "b/metadata.jsonl").write_text('{"file_name": "./1.png", "text": "two"}\n')
    source = open_source(tmp_path)
    assert [source.captions(index) for index in range(2)] == [("one",), ("two",)]
    assert (classes(source), source.left_out) == (["a", "b"], {})
    (tmp_path / "a/metadata.csv").write_text("file_name,text,label\n1.png,one,x\n")
    (tmp_path / "b/metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"b/1\.png has no label"):
        open_source(tmp_path)
    (tmp_path / "b/metadata.csv").write_text("file_name,label\n1.png,y\n")
    assert classes(open_source(tmp_path)) == ["x", "y"]


def test_a_listing_inside_the_only_folder_is_read(tmp_path):
    tree(tmp_path, "x/a.png", "x/b.png")
    (tmp_path / "x/dataset.json").write_text('{"labels": [["a.png", 0], ["b.png", 1]]}')
    with pytest.raises(UserError, match=r"x/dataset\.json, which looks like labels"):
        open_source(tmp_path)
    assert classes(open_source(tmp_path, labels=str(tmp_path / "x/dataset.json"))) == ["0", "1"]


def test_classes_with_similar_names_are_reported(tmp_path):
    assert (
        "similar names: Cat, cat"
        in open_source(tree(tmp_path / "a", "Cat/1.png", "cat/1.png", "dog/1.png")).labels_from
    )
    assert "similar names: 01, 1" in open_source(tree(tmp_path / "b", "1/1.png", "01/1.png", "2/1.png")).labels_from
    assert "similar" not in open_source(tree(tmp_path / "c", "-1/1.png", "1/1.png", "c/1.png", "c++/1.png")).labels_from


def test_a_missing_label_among_numbers_is_refused(tmp_path):
    tree(tmp_path / "s", "a.png", "b.png", "c.png")
    (tmp_path / "t.csv").write_text("file,label\na.png,3\nb.png,N/A\nc.png,4\n")
    with pytest.raises(UserError, match=r"b\.png has no label"):
        open_source(tmp_path / "s", labels=f"{tmp_path / 't.csv'}:label")
    (tmp_path / "t.csv").write_text("file,label\na.png,cat\nb.png,none\nc.png,4\n")
    assert classes(open_source(tmp_path / "s", labels=f"{tmp_path / 't.csv'}:label")) == ["cat", "none", "4"]


def test_unread_columns_are_counted(tmp_path):
    table = {
        "image": [png()] * 2,
        "label": [0, 1],
        "split": ["train", "test"],
        "text": ["a", "b"],
        "caption": ["c", "d"],
    }
    parquet.write_table(pa.table(table), tmp_path / "t.parquet")
    assert open_source(tmp_path / "t.parquet").left_out == {"column 'split'": 1, "column 'text'": 1}


@pytest.mark.parametrize("kind", ["dictionary", "string_view"])
def test_captions_of_other_text_types_are_read(kind, tmp_path):
    texts = pa.array(["a cat", "a dog"])
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(pa.string_view())
    parquet.write_table(pa.table({"image": [png()] * 2, "caption": texts}), tmp_path / "t.parquet")
    assert open_source(tmp_path / "t.parquet").captions(1) == ("a dog",)


def test_one_parquet_file_per_class_needs_a_choice(tmp_path):
    for name in ("cat", "dog"):
        parquet.write_table(pa.table({"image": [png()]}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="--labels none"):
        open_source(tmp_path)
    assert open_source(tmp_path, labels="none").class_names == ["all"]
    for name in ("a-00000-of-00002", "a-00001-of-00002"):
        (tmp_path / "parts").mkdir(exist_ok=True)
        parquet.write_table(pa.table({"image": [png()]}), tmp_path / "parts" / f"{name}.parquet")
    assert open_source(tmp_path / "parts").class_names == ["all"]


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_missing_parts_of_a_folder_are_reported(ending, tmp_path):
    for number in range(2):
        path = tmp_path / f"train-0000{number}-of-00003.{ending}"
        if ending == "tar":
            tar(path, **{f"{number}.png": png(), f"{number}.cls": b"0"})
        else:
            parquet.write_table(pa.table({"image": [png()], "label": [0]}), path)
    with pytest.raises(UserError, match=rf"only 2 of the 3 parts .*train-\*\.{ending}: download the others, or give"):
        open_source(tmp_path)
    assert len(open_source(f"{tmp_path}/train-*.{ending}")) == 2


@pytest.mark.parametrize("key", ["cls", "category", "Y"])
def test_arrays_named_like_labels_are_recognised(key, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 3), np.uint8), **{key: np.arange(2)})
    with pytest.raises(UserError, match=f"label={key}"):
        open_source(tmp_path / "a.npz")


@pytest.mark.parametrize("texts", [("0", "1"), ("0 0.5 0.5 0.1 0.2", "3 0.1 0.1 0.2 0.2\n1 0.2 0.2 0.1 0.1")])
def test_numeric_columns_are_not_captions(texts, tmp_path):
    root = tree(tmp_path / "s", "a.png", "b.png")
    for name, text in zip("ab", texts, strict=True):
        (root / f"{name}.txt").write_text(text)
    tar(tmp_path / "s.tar", **{path.name: path.read_bytes() for path in sorted(root.iterdir())})
    for source in (root, tmp_path / "s.tar"):
        with pytest.raises(UserError, match=r"numbers such as '0.*look like labels"):
            open_source(source)
        assert open_source(source, labels="none").class_names == ["all"]
    parquet.write_table(pa.table({"image": [png(), png(1)], "text": texts}), tmp_path / "s.parquet")
    with pytest.raises(UserError, match=r"numbers such as '0.*give .*s\.parquet:label=text, or give --labels none"):
        open_source(tmp_path / "s.parquet")
    (root / "b.txt").write_text("2 dogs")
    assert open_source(root).captions(1) == ("2 dogs",)
