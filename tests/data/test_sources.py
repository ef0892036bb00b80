import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repa.base import trust
from repa.base.errors import UserError
from repa.data import PrepareConfig, open_data, open_source, prepare
from repa.data.sources import contract
from tests.data.conftest import pack, spoil
from tests.oracles.data import noise_image


def test_class_folders_are_sorted(folder):
    source = open_source(folder)
    assert len(source) == 11
    assert source.class_names == ["ants", "bees"]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0] * 7 + [1] * 4
    assert [source.name(i) for i in (0, 7)] == ["ants/000.png", "bees/000.png"]
    expected = noise_image(100).resize((10, 8), 3).crop((1, 0, 9, 8))
    np.testing.assert_array_equal(np.asarray(source.image(7, 8)).shape, (8, 8, 3))
    assert source.image(7, 8).size == expected.size


def test_the_order_is_by_path_not_by_number_or_case(tmp_path):
    for name in ("b10.PNG", "b9.png", "B1.png", "a/../a.jpeg"):
        noise_image(0).save(tmp_path / Path(name).name)
    assert list(open_source(tmp_path).paths) == ["B1.png", "a.jpeg", "b10.PNG", "b9.png"]


def test_a_flat_folder_is_one_class(tmp_path):
    noise_image(0).save(tmp_path / "x.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    source = open_source(str(tmp_path))
    assert source.class_names == ["all"]
    assert source.labels.tolist() == [0]


def test_nested_folders_belong_to_the_top_class(tmp_path):
    for name in ("a/x/1.png", "a/2.png", "b/y/z/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(0).save(tmp_path / name)
    source = open_source(tmp_path)
    assert (source.class_names, source.labels.tolist()) == (["a", "b"], [0, 0, 1])


def test_a_link_to_a_parent_folder_is_not_followed_forever(tmp_path):
    (tmp_path / "a").mkdir()
    noise_image(0).save(tmp_path / "a" / "1.png")
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    assert list(open_source(tmp_path).paths) == ["a/1.png"]


def test_circular_links_are_broken_links(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        noise_image(0).save(tmp_path / name / "1.png")
    os.symlink("d", tmp_path / "c")
    os.symlink("c", tmp_path / "d")
    os.symlink("x.png", tmp_path / "a" / "x.png")
    source = open_source(tmp_path)
    assert list(source.paths) == ["a/1.png", "a/x.png", "b/1.png"]
    with pytest.raises(UserError, match=r"^a/x\.png cannot be read"):
        source.decode(1)


def test_links_that_multiply_folders_are_refused(tmp_path):
    for level in range(20):
        (tmp_path / f"{level}").mkdir()
        for name in ("a", "b"):
            os.symlink(tmp_path / f"{level + 1}", tmp_path / f"{level}" / name)
    (tmp_path / "20").mkdir()
    noise_image(0).save(tmp_path / "20" / "1.png")
    with pytest.raises(UserError, match="more than 100 paths"):
        open_source(tmp_path / "0")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_too_deeply_nested_folders_are_refused(kind, tmp_path):
    path = "/".join(["data"] * 102) + "/1.png"  # folders called data are not classes, so all levels would be searched
    (tmp_path / "s" / path).parent.mkdir(parents=True)
    noise_image(0).save(tmp_path / "s" / path)
    if kind == "zip":
        pack(tmp_path / "s", tmp_path / "s.zip")
    if kind == "tar":
        with tarfile.open(tmp_path / "s.tar", "w") as archive:
            archive.add(tmp_path / "s" / path, path)
    with pytest.raises(UserError, match="more than 100 folders"):
        open_source(tmp_path / {"folder": "s", "zip": "s.zip", "tar": "s.tar"}[kind])


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_a_zip_is_the_same_source_as_its_folder(folder, tmp_path, prefix):
    loose, packed = open_source(folder), open_source(pack(folder, tmp_path / "p.zip", prefix))
    assert list(packed.paths) == [prefix + path for path in loose.paths]
    assert packed.class_names == loose.class_names
    np.testing.assert_array_equal(packed.labels, loose.labels)
    for i in (0, 10):
        np.testing.assert_array_equal(np.asarray(packed.image(i, 8)), np.asarray(loose.image(i, 8)))


def test_a_zip_with_one_class_folder_keeps_its_name(folder, tmp_path):
    source = open_source(pack(folder / "ants", tmp_path / "p.zip", "ants/"))
    assert source.class_names == ["ants"]
    assert open_source(pack(folder / "ants", tmp_path / "q.zip")).class_names == ["all"]


def test_a_zip_can_be_read_after_a_fork_and_after_pickling(folder, tmp_path):
    source = open_source(pack(folder, tmp_path / "p.zip"))
    path, last = source.paths[3], source.paths[5]
    assert pickle.loads(pickle.dumps(source)).read(path, "") == source.read(path, "") == (folder / path).read_bytes()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking with threads, which this child does not use
        child = os.fork()
    if child == 0:
        os.write(writing, source.read(last, "")[:64])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 64) == source.read(last, "")[:64]


def test_more_than_ten_thousand_classes_are_supported(tmp_path):
    buffer = io.BytesIO()
    noise_image(0).save(buffer, "BMP")
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for i in range(10_001):
            archive.writestr(f"class{i:05d}/x.bmp", buffer.getvalue())
    source = open_source(tmp_path / "many.zip")
    assert len(source.class_names) == 10_001
    np.testing.assert_array_equal(source.labels, np.arange(10_001))


def test_the_identity_depends_on_the_files_not_on_their_location(folder, tmp_path):
    before = open_source(folder).identity
    folder.rename(tmp_path / "elsewhere")
    moved = open_source(tmp_path / "elsewhere").identity
    assert moved["sha256"] == before["sha256"]
    noise_image(5, 21, 16).save(tmp_path / "elsewhere" / "ants" / "000.png")
    assert open_source(tmp_path / "elsewhere").identity["sha256"] != before["sha256"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "There is no source .*nowhere"),
        (lambda root: root, "holds no images"),
        (lambda root: (root / "a.zip").write_bytes(b"not a zip") and root / "a.zip", "cannot be read as a zip file"),
        (lambda root: (root / "a.JPG").write_bytes(b"one") and root / "a.JPG", "is a single image: give its folder"),
        (lambda root: "photographs:number=3", "'number'.* num.*seed.* 'num'"),
        (lambda root: "photographs:num=0", "'num' of the source .* is 0"),
        (lambda root: "photographs:seed=x", "'seed' of the source .* is 'x'"),
    ],
)
def test_an_invalid_source_is_refused(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        open_source(make(tmp_path))


def test_loose_images_next_to_class_folders_are_refused(folder):
    noise_image(0).save(folder / "loose.png")
    with pytest.raises(UserError, match=r"images in no folder, such as loose\.png"):
        open_source(folder)


def test_unreadable_images_are_named(folder):
    spoil(folder / "bees" / "002.png")
    source = open_source(folder)
    with pytest.raises(UserError, match=r"^bees/002\.png is not a readable image"):
        source.image(9, 8)
    (folder / "bees" / "001.png").unlink()
    with pytest.raises(UserError, match=r"^bees/001\.png cannot be read: No such file"):
        source.image(8, 8)


def test_an_image_with_an_extreme_aspect_ratio_is_named(tmp_path):
    noise_image(0, 1, 60000).save(tmp_path / "needle.png")
    with pytest.raises(UserError, match=r"^needle\.png: 1 x 60000"):
        open_source(tmp_path).image(0, 256)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.png",
        "a/../../evil.png",
        "/etc/evil.png",
        "C:/evil.png",
        "C:\\evil.png",
        "..\\evil.png",
        "a\\..\\..\\evil.png",
        "../notes.txt",
    ],
)
def test_zips_with_paths_that_lead_out_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("a/good.png", b"")
        archive.writestr(name, b"")
    with pytest.raises(UserError, match="leads out of the archive"):
        open_source(tmp_path / "evil.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["evil.zip"]


def test_zip_bombs_are_refused_by_their_declared_size(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/bomb.png", b"0")
    data = bytearray((tmp_path / "bomb.zip").read_bytes())
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<I", contract.MAX_FILE_SIZE + 1)
    (tmp_path / "bomb.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"a/bomb\.png .* has 256\.0 MiB"):
        open_source(tmp_path / "bomb.zip")


def test_zip_bombs_that_understate_their_size_are_stopped(tmp_path):
    """The archive declares 100 bytes but contains 8 MiB; at most 100 are unpacked."""
    with zipfile.ZipFile(tmp_path / "liar.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/liar.png", bytes(8 << 20))
    data = bytearray((tmp_path / "liar.zip").read_bytes())
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<I", 100)
    (tmp_path / "liar.zip").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a/liar\.png in .* cannot be read as a member of a zip file: Bad CRC"):
        open_source(tmp_path / "liar.zip").decode(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_damaged_members_are_named(folder, tmp_path):
    path = pack(folder, tmp_path / "p.zip")
    source = open_source(path)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("ants/002.png").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 60] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"^ants/002\.png in .* cannot be read as a member of a zip file: Bad CRC"):
        source.image(2, 8)


def test_zips_with_unsupported_compression_are_refused(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(folder / "ants" / "000.png", "a.png")
    with pytest.raises(UserError, match=r"a\.png .* is not compressed with Deflate"):
        open_source(tmp_path / "x.zip")


def test_file_names_that_are_not_utf8_are_escaped(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    except OSError:
        pytest.skip("this file system wants UTF-8")
    noise_image(0).save(tmp_path / os.fsdecode(b"caf\xe9") / "1.png")
    source = open_source(tmp_path)
    assert source.class_names == ["caf\\udce9"]  # escaped, because a manifest is UTF-8
    assert source.image(0, 8).size == (8, 8)


def test_zips_with_duplicate_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("a/1.png", b"")
        archive.writestr("a/1.png", b"")
    with pytest.raises(UserError, match=r"contains 'a/1\.png' twice"):
        open_source(tmp_path / "t.zip")


def test_truncated_zips_are_refused(folder, tmp_path):
    path = pack(folder, tmp_path / "p.zip")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"p\.zip cannot be read as a zip file"):
        open_source(path)
    path.write_bytes(data)
    source = open_source(path)
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(
        UserError, match=r"^ants/000\.png in .* cannot be read as a member of a zip file: the file ends .* too early"
    ):
        source.decode(0)


def test_broken_links_and_huge_files_are_named(folder, monkeypatch):
    os.symlink(folder / "gone.png", folder / "bees" / "link.png")
    source = open_source(folder)
    with pytest.raises(UserError, match=r"^bees/link\.png cannot be read: No such file"):
        source.decode(11)
    monkeypatch.setattr(contract, "MAX_FILE_SIZE", 100)
    with pytest.raises(UserError, match=r"^ants/000\.png has .*, more than the limit of 100 B per image"):
        source.decode(0)


def test_a_caption_that_is_not_text_is_left_out(folder):
    (folder / "ants" / "000.txt").write_bytes(b"\xff\xfe")
    (folder / "ants" / "note.txt").write_text("of no image")
    source = open_source(folder)
    assert source.has_captions
    assert source.captions(1) == ()
    assert source.captions(0) == ()  # an undecodable caption does not affect the image
    assert source.left_out["texts without an image"] == 1


class Shapes(contract.Source):
    """A user's source: images drawn by a program."""

    def __init__(self, num, level):
        self.labels, self.class_names, self.labels_from = np.arange(num) % 2, ["dark", "bright"], "the levels"
        self.identity, self.level = {"name": "shapes", "num_images": num, "level": level}, level

    def name(self, index):
        return f"shape {index}"

    def decode(self, index):
        return Image.new("RGB", (8, 8), (self.level, index, 0))


def shapes(labels, *, num=4, level=200):
    return Shapes(num, level)


def no_source(labels):
    return [1, 2]


def test_a_private_source_is_given_by_dotted_name_or_as_an_object(tmp_path):
    source = open_source(f"{__name__}.shapes:num=6")
    assert (len(source), source.image(5, 8).getpixel((0, 0))) == (6, (200, 5, 0))
    assert open_source(source) is source
    with pytest.raises(UserError, match="has its own"):
        open_source(source, labels="folders")
    prepare(source, tmp_path / "data", PrepareConfig(resolution=8, num_workers=0))
    data = open_data(tmp_path / "data")
    assert (data.num_images, data.gather("images", [5])[0, :, 0, 0].tolist()) == (6, [200, 5, 0])
    for spec, sentence in (
        (".shapes:nmu=6", "has no setting 'nmu'.* Did you mean 'num'"),
        (".no_source", "must return an instance of Source, but returned list"),
        (".shape", "There is no source .* the dotted name of your own function.* has no attribute 'shape'"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_source(__name__ + spec)


def test_a_private_source_is_trusted_only_when_typed_as_the_source(tmp_path, monkeypatch):
    with trust.command(["prepare", f"{__name__}.shapes", "DATA"]):
        assert len(open_source(f"{__name__}.shapes")) == 4
    (tmp_path / f"{__name__}.shapes").mkdir()  # a foreign folder may have any name
    monkeypatch.chdir(tmp_path)
    with trust.command(["check", f"{__name__}.shapes"]), pytest.raises(UserError, match="--trust tests"):
        trust.require_trusted("source", f"{__name__}.shapes")


def test_a_mistyped_file_imports_no_module(tmp_path, monkeypatch):
    (tmp_path / "images.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        trust.command(["prepare", "images.zip", "DATA"]),
        pytest.raises(UserError, match=r"There is no source 'images\.zip'"),
    ):
        open_source("images.zip")
