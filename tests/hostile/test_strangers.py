"""Unusual images, archives and tables are read as a person would read them, or refused with a reason."""

import io
import json
import struct
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from repa.base.errors import UserError
from repa.base.images import decode_image
from repa.data import open_source
from repa.data.sources.labels import classes_of


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(value: int = 99) -> bytes:
    return encoded(Image.new("RGB", (8, 8), (value, value, value)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, bits: int, rows: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def transparent_palette() -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    return encoded(image, transparency=1)


def animated(form: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (48, 150, 250)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


def grey_png(bits: int, row: bytes, transparent: int) -> bytes:
    head = struct.pack(">IIBBBBB", 8, 8, bits, 0, 0, 0, 0)
    key = chunk(b"tRNS", struct.pack(">H", transparent))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + key
        + chunk(b"IDAT", zlib.compress(8 * (b"\0" + row)))
        + chunk(b"IEND", b"")
    )


def white_is_zero(bits: int, level: int) -> bytes:
    data = level.to_bytes(bits // 8, "little") * 64
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: 0, 273: 122, 277: 1, 278: 8, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


PICTURES = {
    "16-bit grey, transparent": (grey_png(16, 8 * b"\x80\x01", 0x8001), (255, 255, 255)),
    "16-bit grey beside the transparent level": (grey_png(16, 8 * b"\x80\x01", 0x8002), (128, 128, 128)),
    "4-bit grey, transparent": (grey_png(4, 4 * b"\x55", 5), (255, 255, 255)),
    "2-bit grey, transparent": (grey_png(2, 2 * b"\x55", 1), (255, 255, 255)),
    "16-bit TIFF whose zero is white": (white_is_zero(16, 0xC000), (63, 63, 63)),
    "8-bit TIFF whose zero is white": (white_is_zero(8, 0xC0), (63, 63, 63)),
    "16-bit grey": (encoded(Image.fromarray(np.full((8, 8), 0xC800, np.uint16))), (200, 200, 200)),
    "16-bit colour": (png_of(8, 8, 16, 8 * (b"\0" + 8 * struct.pack(">HHH", 0xEA00, 0x7500, 0x0300))), (234, 117, 3)),
    "CMYK JPEG": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "palette with transparency": (transparent_palette(), (255, 255, 255)),
    "all transparent": (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), (255, 255, 255)),
    "animated GIF": (animated("GIF"), (48, 0, 0)),
    "animated WebP": (animated("WEBP"), (48, 0, 0)),
    "a BMP": (encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "BMP"), (1, 2, 3)),
    "one bit": (encoded(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "one pixel": (encoded(Image.new("RGB", (1, 1), (7, 8, 9))), (7, 8, 9)),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_images_have_the_colours_that_viewers_show(kind):
    data, wanted = PICTURES[kind]
    found = np.asarray(decode_image(data, "x.jpg")).reshape(-1, 3).mean(0)
    assert np.abs(found - wanted).max() <= 2  # lossy JPEG and WebP


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (png_of(60_000, 60_000, 8, b""), "more than 178,956,970 pixels"),
        (b"", "its format is unknown"),
        (b"<html>404</html>", "its format is unknown"),
        (png()[:50], "not a readable image"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "of unknown range"),
    ],
)
def test_the_error_about_a_broken_image_gives_the_reason(data, why):
    with pytest.raises(UserError, match=why) as refused:
        decode_image(data, "a.png")
    assert str(refused.value).startswith("a.png ")


def packed(path, *entries, **options):
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as archive:  # about the duplicate name
        for name, data in entries:
            with archive.open(name, "w", **options) as file:
                file.write(data)
    return path


WHOLE = (("a/1.png", png(1)), ("a/2.png", png(2)), ("b/1.png", png(3)))


def test_archives_of_macos_and_zip64_archives_are_read(tmp_path):
    junk = (("__MACOSX/a/._1.png", b"x"), ("a/.DS_Store", b"x"))
    for path in (
        packed(tmp_path / "mac.zip", *WHOLE, *junk),
        packed(tmp_path / "zip64.zip", *WHOLE, force_zip64=True),
    ):
        source = open_source(str(path))
        assert (source.class_names, source.labels.tolist()) == (["a", "b"], [0, 0, 1])


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(77))
    link = zipfile.ZipInfo("a/link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    source = open_source(str(packed(tmp_path / "x.zip", *WHOLE, (link, str(secret).encode()))))
    index = [source.name(i) for i in range(len(source))].index("a/link.png")
    with pytest.raises(UserError, match="link.png is not a readable image"):
        source.decode(index)


def test_an_encrypted_archive_is_refused(tmp_path):
    data = bytearray(packed(tmp_path / "x.zip", *WHOLE).read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            data[start + flags] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UserError, match="is encrypted: pack the archive again without a password"):
        open_source(str(tmp_path / "x.zip"))


def labelled(folder, file, text):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(3):
        (folder / f"{index}.png").write_bytes(png(index))
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metadata.csv", "\ufefffile_name,label\n0.png,cat\n1.png,dog\n2.png,cat\n"),
        ("metadata.csv", "file_name, label\r\n0.png, cat\r\n1.png, dog \r\n2.png,cat\r\n"),
        ("metadata.csv", "File_Name,Label\n0.png,cat\u200b\n1.png,dog\n2.png,cat\n"),
        ("metadata.csv", '"file_name";"label"\n"0.png";"cat"\n"1.png";"dog"\n"2.png";"cat"\n'),
        ("metadata.csv", 'sep=|\nfile_name|label\n0.png|cat\n1.png|dog\n2.png|cat\n'),
        ("metadata.csv", "file_name,label\r0.png,cat\r1.png,dog\r2.png,cat\r"),
        ("metadata.csv", "file_name\tlabel\r\n0.png\tcat\r\n1.png\tdog\r\n2.png\tcat\r\n".encode("utf-16")),
        ("metadata.jsonl", "\ufeff" + "".join(
            json.dumps({"file_name": f"{n}.png", "label": name}) + "\n" for n, name in enumerate(("cat", "dog", "cat"))
        )),
    ],
)  # fmt: skip
def test_common_ways_to_write_tables_are_read(file, text, tmp_path):
    source = open_source(labelled(tmp_path / "x", file, text))
    assert (source.class_names, source.labels.tolist()) == (["cat", "dog"], [0, 1, 0])
    assert file in source.labels_from


SPECIES = "photo,species\n0.png,Möwe\n1.png,dog\n2.png,cat\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train.csv", SPECIES.encode("utf-16")),
        ("train.csv", SPECIES.encode("utf-16-le")),
        ("train.csv", SPECIES.encode("latin-1")),
        ("train.csv", SPECIES.replace("\n", "\r")),
        ("train.csv", "\n# of the survey\n" + SPECIES),
        ("train.csv", SPECIES.partition("\n")[2]),
        ("train.tsv", "sep=;\n" + SPECIES.replace(",", ";")),
        ("list.txt", "0.png 0\n1.png 1\n2.png 0\n".encode("utf-16")),
        ("train.json", json.dumps({f"{n}.png": n for n in range(3)})),
        ("all.json", json.dumps([{"file": f"{n}.png", "category_id": n} for n in range(3)])),
        ("ground_truth.txt", "0\n1\n0\n"),
    ],
)
def test_a_table_of_the_images_in_any_form_needs_a_choice(file, text, tmp_path):
    where = labelled(tmp_path / "x", file, text)
    with pytest.raises(UserError, match=f"no folders of classes, but {file}, which looks like labels"):
        open_source(where)
    assert open_source(where, labels="none").class_names == ["all"]


@pytest.mark.parametrize(
    ("file", "text"), [("info.json", '{"camera": "x"}'), ("a.json", '[{"image": "0.png", "caption": "a cat"}]')]
)
def test_a_json_of_other_content_needs_no_choice(file, text, tmp_path):
    source = open_source(labelled(tmp_path / "x", file, text))
    assert (source.class_names, source.left_out) == (["all"], {"files .json": 1})


def test_unread_columns_of_metadata_are_counted(tmp_path):
    source = open_source(labelled(tmp_path / "x", "metadata.csv", "file_name,width\n0.png,8\n1.png,8\n2.png,8\n"))
    assert source.left_out == {"column 'width' of metadata.csv": 1}


def test_labels_of_boxes_and_masks_need_a_choice(tmp_path):
    labelled(tmp_path / "x" / "images", "readme.md", "")
    labelled(tmp_path / "y" / "images", "readme.md", "")
    labelled(tmp_path / "y" / "masks", "readme.md", "")
    (tmp_path / "x" / "labels").mkdir()
    for index in range(3):
        (tmp_path / "x" / "labels" / f"{index}.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(UserError, match="texts of numbers such as labels/0.txt are named like its images"):
        open_source(str(tmp_path / "x"))
    with pytest.raises(UserError, match=r"images and their masks \(images, masks\).*give .*y/images as the source"):
        open_source(str(tmp_path / "y"))
    assert open_source(str(tmp_path / "y"), labels="folders").class_names == ["images", "masks"]


def test_annotations_named_like_images_need_a_choice(tmp_path):
    where = labelled(tmp_path / "x", "0.xml", "<annotation/>")
    with pytest.raises(UserError, match=r"annotations such as 0.xml are named like its images.*--labels none"):
        open_source(where)
    assert open_source(where, labels="none").class_names == ["all"]


def test_captions_in_another_folder_or_without_text_do_not_stop(tmp_path):
    where = labelled(tmp_path / "x" / "images", "0.txt", "a cat".encode("utf-16"))
    (tmp_path / "x" / "texts").mkdir()
    (tmp_path / "x" / "texts" / "1.txt").write_text("a dog")
    (tmp_path / "x" / "images" / "2.txt").write_bytes(bytes(100))
    assert [open_source(where).captions(index) for index in range(3)] == [("a cat",), (), ()]
    assert open_source(str(tmp_path / "x")).class_names == ["images"]


def test_a_first_line_without_end_is_refused_at_once(tmp_path):
    where = labelled(tmp_path / "x", "metadata.csv", ",".join(map(str, range(300_000))))
    with pytest.raises(UserError, match="a first line of more than 65,536 letters"):
        open_source(where)


def test_names_of_a_zip_in_utf_8_without_its_flag_are_read(tmp_path):
    path = packed(tmp_path / "x.zip", ("M__we/1.png", png()), ("hund/2.png", png()), ("metadata.csv", b""))
    path.write_bytes(path.read_bytes().replace(b"M__we", "Möwe".encode()))
    assert open_source(str(path)).class_names == ["Möwe", "hund"]
    path.write_bytes(path.read_bytes().replace("Möwe".encode(), b"M\x94\x94we"))  # of code page 437
    source = open_source(str(path))
    assert source.class_names == ["Mööwe", "hund"]
    assert "read as code page 437" in source.labels_from  # Shift-JIS, GBK or cp1252 would give wrong names
    assert "code page" not in open_source(str(path), labels="none").labels_from


@pytest.mark.parametrize("data", ["3".encode("utf-16"), (3).to_bytes(8, "little")])
def test_a_label_in_utf_16_is_read_and_a_binary_one_refused(data, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in (("1.png", png()), ("1.cls", data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if len(data) < 8:
        assert open_source(str(tmp_path / "x.tar")).labels.tolist() == [3]
    else:
        with pytest.raises(UserError, match="1.cls in .* holds bytes that are not text"):
            open_source(str(tmp_path / "x.tar"))


def test_a_label_inside_an_object_of_a_sample_needs_a_choice(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in (("1.png", png()), ("1.json", b'{"annotation": {"class": 3}}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=r"x.tar:label=annotation\.class"):
        open_source(str(tmp_path / "x.tar"))
    assert open_source(f"{tmp_path / 'x.tar'}:label=annotation.class").labels.tolist() == [3]


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("metadata.csv", "file_name,label\n0.png,1\n1.png\n2.png,1\n", "1.png has no label"),
        ("metadata.csv", "file_name,label\n0.png,1\n1.png,2\n", "2.png has no label"),
        ("metadata.csv", "file_name,label\n0.png,1\n1.png,2\n2.png,1\n../../x,1\n", "1 images that are not in the source"),
        ("metadata.csv", "file_name,label\n0.png,1,x\n1.png,2\n2.png,1\n", "Row 2 of metadata.csv has more cells than the 2 columns"),
        ("metadata.csv", "file,label\n0.png,1\n1.png,2\n2.png,1\n", "no column of image names: add one called 'file_name'"),
        ("metadata.jsonl", '{"file_name": "0.png"}\n{"file_name": "1.png", "label": 1}\n{"file_name": "2.png", "label": 0}',
         "0.png has no label"),
        ("metadata.csv", "file_name,label,label\n0.png,1,2\n1.png,2,1\n2.png,1,1\n", "has the column 'label' twice"),
        ("metadata.csv", "file_name,label\n0.png,ä\n1.png,2\n2.png,1\n".encode("latin-1"), "Save it as comma-separated UTF-8"),
        ("metadata.csv", f"file_name,label\n0.png,{'x' * 200_000}\n1.png,2\n2.png,1\n", "field limit"),
        ("metadata.jsonl", '{"file_name": "0.png", "label": 1}\n{"file_name": "1.png"}\n{"file_name": "2.png", "label": 0}',
         "1.png has no label"),
        ("metadata.jsonl", '{"file_name": "0.png", "label": 1}\n{"file_na', "cannot be read as JSON"),
        ("metadata.jsonl", "".join(f'{{"file_name": "{n}.png", "label": {v}}}\n' for n, v in enumerate((1, '"cat"', 0))),
         "numbers such as 1 with names such as 'cat'"),
    ],
)  # fmt: skip
def test_inconsistent_tables_are_refused(file, text, why, tmp_path):
    with pytest.raises(UserError, match=why):
        open_source(labelled(tmp_path / "x", file, text))


def test_two_metadata_tables_must_agree(tmp_path):
    lines = [json.dumps({"file_name": f"{n}.png", "label": name}) for n, name in enumerate(("cat", "dog", "cat"))]
    where = labelled(tmp_path / "x", "metadata.jsonl", "\n".join(lines))
    labelled(tmp_path / "x", "metadata.csv", "file_name,label\n0.png,cat\n1.png,dog\n2.png,cat\n")
    assert open_source(where).labels.tolist() == [0, 1, 0]
    labelled(tmp_path / "x", "metadata.csv", "file_name,label\n0.png,cat\n1.png,cat\n2.png,dog\n")
    with pytest.raises(UserError, match="give different labels"):
        open_source(where)


@pytest.mark.parametrize(
    ("paths", "classes", "why"),
    [
        (("data/cat/1.png", "data/dog/1.png"), ["cat", "dog"], ""),
        (("data/train/cat/1.png", "data/train/dog/1.png"), ["cat", "dog"], ""),
        (("data/images/train/cat/1.png", "data/images/train/dog/1.png"), ["cat", "dog"], ""),
        (
            ("data/train/cat/1.png", "data/val/cat/1.png"),
            [],
            "look like splits .train, val.*--labels folders:3.*--labels folders:2",
        ),
        (("data/train/1.png", "data/val/1.png"), [], "look like splits"),
        (
            ("data/birds/cat/1.png", "data/birds/dog/1.png"),
            [],
            "folders:3 if cat, dog are the classes, --labels folders:2 if birds is a class",
        ),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_outer_folders_around_classes_and_splits_are_handled(is_zip, paths, classes, why, tmp_path):
    where = tmp_path / ("x.zip" if is_zip else "x")
    if is_zip:
        packed(where, *((path, png()) for path in paths))
    else:
        for path in paths:
            (where / path).parent.mkdir(parents=True, exist_ok=True)
            (where / path).write_bytes(png())
    if why:
        with pytest.raises(UserError, match=why):
            open_source(str(where))
    else:
        assert open_source(str(where)).class_names == classes


@pytest.mark.parametrize(
    ("cls", "told", "labels"),
    [
        ("1", 1, [1]),
        ("01", 1, [1]),
        ("1", 2, None),
        ("1", "tench", [1]),
        ("tench", 1, [0]),
        ("1", None, [1]),
        ("9" * 5000, 1, [0]),
    ],
)
def test_two_labels_of_a_sample_must_agree(cls, told, labels, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("1.png", png()), ("1.cls", cls.encode()), ("1.json", json.dumps({"label": told}).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if labels is None:
        with pytest.raises(UserError, match="label"):
            open_source(str(tmp_path / "x.tar"))
    else:
        assert open_source(str(tmp_path / "x.tar")).labels.tolist() == labels


def test_invalid_npy_headers_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8, 3), np.uint8))
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data.replace(b"(4, 8, 8, 3)", b"__import__(("))
    with pytest.raises(UserError, match="cannot be read as an array"):
        open_source(str(tmp_path / "x.npy"))


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        ([0.0, 2.0, 1.0], ["0", "1", "2"], [0, 2, 1]),
        ([1, 2, 3], ["0", "1", "2", "3"], [1, 2, 3]),
        ([-1, 1, 1], ["-1", "1"], [0, 1, 1]),
        (["10", "9", "9"], [str(n) for n in range(11)], [10, 9, 9]),
        (["2,0", "0,0", "1,00"], ["0", "1", "2"], [2, 0, 1]),
        (["727", "A320", "727"], ["727", "A320"], [0, 1, 0]),
    ],
)
def test_labels_keep_their_numbers_and_class_names(values, names, labels):
    found = classes_of(values, str, "x")
    assert (found.names, found.labels.tolist()) == (names, labels)


@pytest.mark.parametrize(
    "values",
    [
        [0, None, 1],
        [0.5, 1],
        [float("nan"), 1],
        [True, False],
        [-1, 0, 1],
        [0, 2**40],
        [[0], [1]],
        [1, "cat"],
        ["0", "inf", "1"],
    ],
)
def test_invalid_labels_are_refused(values):
    with pytest.raises(UserError):
        classes_of(values, str, "x")


def test_damaged_labels_of_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4) + 0x5A5A)
    data = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(data.replace(b"\x5b\x5a", b"\x5c\x5a"))
    with pytest.raises(UserError, match="'labels' of .*Bad CRC"):
        open_source(str(tmp_path / "x.npz"))


def test_duplicate_label_columns_of_a_parquet_file_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    arrays = [pa.array([png()]), pa.array([0]), pa.array([1])]
    parquet.write_table(pa.Table.from_arrays(arrays, ["image", "label", "label"]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has the column 'label' twice"):
        open_source(str(tmp_path / "x.parquet"))
