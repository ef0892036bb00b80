"""Tar shards: their index, what is refused, and remote shards."""

import json
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from repa.base.errors import UserError
from repa.data import open_source
from repa.data.remote import fetch_shard
from repa.data.sources import contract, webdataset
from repa.data.sources.names import expand
from tests.data.kinds import add, as_shards, pictures, pixels, write_shard


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sources"


def tar(path: Path, **members: bytes | str) -> str:
    """A shard with these members; in keywords __ stands for a slash and _ for a dot."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            name = name.replace("__", "/").replace("_", ".")
            add(archive, name, data if isinstance(data, bytes) else data.encode())
    return str(path)


PNG = pictures()[0].data


def test_rows_keep_the_order_of_the_shards(tmp_path):
    """Samples are not sorted by name, and names may repeat in another shard."""
    (tmp_path / "shards").mkdir()
    tar(tmp_path / "shards" / "s2.tar", z_png=PNG, a_png=PNG)
    tar(tmp_path / "shards" / "s1.tar", z_png=PNG)
    source = open_source(str(tmp_path / "shards" / "s{2,1}.tar"))
    assert [source.name(i) for i in range(3)] == ["z in s2.tar", "a in s2.tar", "z in s1.tar"]
    assert open_source(tmp_path / "shards").name(0) == "z in s1.tar"  # shards of a folder are sorted


def test_numbers_are_labels_and_missing_labels_are_named(tmp_path):
    write_shard(tmp_path / "n.tar", pictures(), names=False)
    source = open_source(tmp_path / "n.tar")
    assert (source.labels.tolist(), source.class_names) == ([0, 0, 0, 1, 1], ["0", "1"])
    tar(tmp_path / "m.tar", a_png=PNG, a_cls="3", b_png=PNG)
    with pytest.raises(UserError, match=r"^b in m\.tar has no label in its shard"):
        open_source(tmp_path / "m.tar")
    assert open_source(tmp_path / "m.tar", labels="none").class_names == ["all"]


def test_a_json_next_to_a_cls_is_ignored(tmp_path):
    path = tar(tmp_path / "b.tar", a_png=PNG, a_cls="1", a_json="[[0, 0, 5, 5]]", b_png=PNG, b_cls="0", b_json="{")
    assert open_source(path).labels.tolist() == [1, 0]


def test_numeric_keys_match_a_table_of_labels(tmp_path):
    (tmp_path / "l.jsonl").write_text('{"key": 0, "label": "x"}\n{"key": 1, "label": "y"}\n')
    path = tar(tmp_path / "n.tar", **{"0_png": PNG, "1_png": PNG})
    assert open_source(path, labels=str(tmp_path / "l.jsonl")).class_names == ["x", "y"]


def test_folders_are_classes_only_on_request(tmp_path):
    path = tar(tmp_path / "f.tar", cat__1_png=PNG, dog__1_png=PNG)
    with pytest.raises(UserError, match="--labels folders"):
        open_source(path)
    assert open_source(path, labels="none").class_names == ["all"]
    source = open_source(path, labels="folders")
    assert (source.class_names, source.labels.tolist()) == (["cat", "dog"], [0, 1])
    (tmp_path / "l.csv").write_text("key,label\ncat/1,x\ndog/1,y\n")
    assert open_source(path, labels=str(tmp_path / "l.csv")).class_names == ["x", "y"]


def test_json_keys_are_chosen_by_settings(tmp_path):
    meta = json.dumps({"label": 0, "wnid": "n7", "alt": ["one", "two"], "caption": "no"})
    path = tar(tmp_path / "j.tar", a_jpg=PNG, a_json=meta, b_jpg=PNG, b_json=meta.replace("n7", "n5"))
    source = open_source(f"{path}:label=wnid,caption=alt")
    assert (source.class_names, source.labels.tolist()) == (["n5", "n7"], [1, 0])
    assert source.captions(0) == ("one", "two")
    assert open_source(path).labels.tolist() == [0, 0]
    with pytest.raises(UserError, match=r"'lable'.* cache, caption, image or label.* 'label'"):
        open_source(f"{path}:lable=wnid")


def test_one_of_several_images_is_chosen(tmp_path):
    other = pictures()[4].data
    path = tar(tmp_path / "t.tar", **{"a_png": PNG, "a_seg.png": other})
    with pytest.raises(UserError, match=r"holds several images \(png, seg\.png\): choose one with image=png"):
        open_source(path)
    np.testing.assert_array_equal(np.asarray(open_source(f"{path}:image=seg.png").decode(0)), pixels(pictures())[4])


def test_a_replaced_shard_of_equal_size_and_time_has_a_new_index(tmp_path, cache):
    """`cp -p` and `rsync -t` keep the time of change."""
    path = tmp_path / "a.tar"
    for label in ("cat", "dog"):
        tar(path, a_png=PNG, a_cls=label)
        os.utime(path, ns=(10**18, 10**18))
        assert open_source(path).class_names == [label]


def test_the_index_is_rebuilt_only_for_a_changed_shard(tmp_path, monkeypatch, cache):
    spec = as_shards(tmp_path, pictures())
    scans = []
    real = webdataset._scan
    monkeypatch.setattr(webdataset, "_scan", lambda path, *rest: scans.append(Path(path).name) or real(path, *rest))
    first = open_source(spec)
    assert scans == ["shard-0.tar", "shard-1.tar"]
    again = open_source(spec)
    assert scans == ["shard-0.tar", "shard-1.tar"]
    assert again.identity == first.identity
    assert [again.captions(i) for i in range(5)] == [item.captions for item in pictures()]
    write_shard(tmp_path / "shard-1.tar", pictures(7)[2:], first=2)
    assert len(open_source(spec)) == 7
    assert scans[2:] == ["shard-1.tar"]
    with pytest.raises(UserError, match="changed: it has"):
        first.decode(3)
    for path in (cache / "indices").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="the index of a shard: .* Delete it"):
        open_source(spec)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a_txt": "x"}, "The sample a in .* has no image, only txt"),
        ({}, "holds no images"),
        ({"a_png": PNG, "b_png": PNG, "a_cls": "1"}, "contains the sample 'a' twice"),
        ({"..__a_png": PNG}, "leads out of the archive"),
        ({"__etc__a_png": PNG}, "leads out of the archive"),
        ({"a_png": PNG, "a_json": "{"}, r"a\.json in .* cannot be read as JSON"),
        ({"a_png": PNG, "a_json": "[1]"}, r"a\.json in .* holds list: it must hold a JSON object"),
        ({"a_png": PNG, "a_json": '{"label": [1]}'}, r"The label in a\.json in .* is \[1\]: .*label=KEY"),
        ({"a_png": PNG, "a_json": '{"label": true}'}, r"The label in a\.json in .* is True"),
        ({"a_png": PNG, "a_cls": b"\xff"}, r"a\.cls in .* cannot be read as UTF-8"),
    ],
)
def test_bad_shards_are_refused(tmp_path, members, message):
    path = tar(tmp_path / "x.tar", **{name.replace("..__", "\0"): data for name, data in members.items()})
    if any(name.startswith("..__") for name in members):
        os.unlink(path)
        with tarfile.open(path, "w") as archive:
            add(archive, "../a.png", PNG)
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_links_and_huge_members_are_refused(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "l.tar", "w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"a\.png in .* is a link, .*, not a plain file"):
        open_source(tmp_path / "l.tar")
    limit = contract.MAX_FILE_SIZE
    monkeypatch.setattr(contract, "MAX_FILE_SIZE", 100)
    with pytest.raises(UserError, match=r"a\.png in .* more than the limit of"):
        open_source(tar(tmp_path / "h.tar", a_png=PNG))
    monkeypatch.setattr(contract, "MAX_FILE_SIZE", limit)
    monkeypatch.setattr(webdataset, "MAX_TEXT", 3)
    with pytest.raises(UserError, match=r"a\.txt in .* too much for a text"):
        open_source(tar(tmp_path / "t.tar", a_png=PNG, a_txt="long"))


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1024, 1100, 1600, 2048])
def test_truncated_shards_are_refused(tmp_path, keep):
    path = Path(tar(tmp_path / "c.tar", a_png=PNG, b_png=PNG))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"c\.tar (cannot be read as an uncompressed tar file|holds no images)"):
        open_source(path)


def test_damaged_headers_and_joined_archives_are_refused(tmp_path):
    """Python's tarfile would silently stop there."""
    good = Path(tar(tmp_path / "g.tar", a_png=PNG, b_png=PNG)).read_bytes()
    second = 512 + -(-len(PNG) // 512) * 512
    (tmp_path / "d.tar").write_bytes(good[: second + 10] + b"\xff" + good[second + 11 :])
    (tmp_path / "j.tar").write_bytes(good + good)
    for name in ("d.tar", "j.tar"):
        with pytest.raises(UserError, match="damaged at byte .*, or several concatenated archives"):
            open_source(tmp_path / name)


def test_compressed_shards_and_missing_ones_are_refused(tmp_path):
    tar(tmp_path / "a.tar", a_png=PNG)
    (tmp_path / "z.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    for spec, message in (
        (tmp_path / "a.tar.gz", "There is no source"),
        (tmp_path / "z.tar", "cannot be read as an uncompressed tar file"),
        (tmp_path / "{a,b}.tar", r"There is no file .*b\.tar' \(from"),
        (f"{tmp_path}/a.tar:cache=0", r"'cache' of the source .* is 0"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(spec)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="compressed as a whole.*unpack it first"):
        open_source(tmp_path / "a.tar.gz")


def test_braces_expand_to_files(tmp_path):
    assert expand("pipe:cat x-{008..010}.tar") == [f"pipe:cat x-{n}.tar" for n in ("008", "009", "010")]
    assert expand("s3://b/{a,b}-{9..10}.tar") == [f"s3://b/{x}-{n}.tar" for x in "ab" for n in (9, 10)]
    for spec in ("s3://x/{9..8}.tar", "s3://x/{0..9999999}.tar"):
        with pytest.raises(UserError, match="it must ascend, over at most"):
            expand(spec)
    with pytest.raises(UserError, match=r"There is no file .*\*\.tar'"):
        open_source(tmp_path / "*.tar")


def test_cached_shards_stay_within_the_limit(tmp_path, cache, monkeypatch):
    """With three remote shards and room for one, each is fetched when it is read, and older ones are removed."""
    runs = tmp_path / "runs"
    for i, item in enumerate(pictures(3)):
        write_shard(tmp_path / f"away-{i}.tar", [item], first=i)
    size = (tmp_path / "away-0.tar").stat().st_size
    spec = f"pipe:echo {{0..2}} >> {runs}; cat {tmp_path}/away-{{0..2}}.tar"
    shards = [f"pipe:echo {i} >> {runs}; cat {tmp_path}/away-{i}.tar" for i in range(3)]
    assert set(shards) < set(expand(spec))
    source = fetching_source(shards, cache=size * 1.5 / 2**30)
    assert runs.read_text().split() == ["0", "1", "2"]  # fetched for the index
    copies = list((cache / "shards").glob("*/shard"))
    assert len(copies) == 1
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(source.decode(0)), pixels(pictures())[0])
    assert runs.read_text().split() == ["0", "1", "2", "0"]  # fetched once for three reads
    assert fetching_source(shards, cache=1).identity == source.identity
    assert runs.read_text().split() == ["0", "1", "2", "0"]  # the indexes are cached
    again = pickle.loads(pickle.dumps(source))
    assert again.decode(2).size == (12, 12)


def fetching_source(shards, **settings):
    from repa.data.sources.webdataset import WebDataset

    return WebDataset(shards, **settings)


def test_two_processes_fetch_a_shard_once(tmp_path, cache):
    """When two processes need one shard, the command runs once."""
    write_shard(tmp_path / "away.tar", pictures())
    url = f"pipe:echo x >> {tmp_path}/runs; sleep 0.2; cat {tmp_path}/away.tar"
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os._exit(0 if fetch_shard(url, 1 << 30).is_file() else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert (tmp_path / "runs").read_text() == "x\n"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pipe:echo broken >&2; exit 3", r"failed with code 3 \(broken\)"),
        ("pipe:true", "cannot be read as an uncompressed tar file|holds no images"),
        ("file:///nowhere/x.tar", "file:///nowhere/x.tar does not exist"),
        ("nosuchstore://x/y.tar", "cannot be opened: "),
        ("https://example.invalid/x.zip", r"remote files must be \.tar or \.parquet"),
    ],
)
def test_shards_that_cannot_be_fetched_are_named(spec, message, cache):
    with pytest.raises(UserError, match=message):
        open_source(spec)
    assert not list(cache.rglob("*.tmp"))


def test_a_changed_remote_shard_is_noticed(tmp_path, cache):
    write_shard(tmp_path / "away.tar", pictures())
    source = open_source(f"file://{tmp_path}/away.tar")
    write_shard(tmp_path / "away.tar", pictures(9))
    for path in (cache / "shards").glob("*/shard"):
        path.unlink()
    with pytest.raises(UserError, match="changed: it has"):
        source.decode(0)


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_shard(tmp_path / "away.tar", pictures())
    monkeypatch.setattr(LocalFileSystem, "get_file", full)
    with pytest.raises(UserError, match="disk is full"):
        open_source(f"file://{tmp_path}/away.tar")


def test_archives_of_gnu_tar_are_read(tmp_path):
    """Archives with long names, written by GNU tar."""
    name = "x" * 150
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / f"{name}.png").write_bytes(PNG)
    (tmp_path / "d" / f"{name}.cls").write_text("0\n")
    subprocess.run(["tar", "-cf", tmp_path / "s.tar", "-C", tmp_path / "d", "."], check=True)
    source = open_source(tmp_path / "s.tar")
    assert source.keys[0].endswith(name)
    assert source.decode(0).size == (12, 12)


def test_shards_next_to_image_folders_are_refused(tmp_path, folder):
    """Otherwise one of the two would be silently ignored."""
    tar(folder / "old.tar", a_png=PNG)
    with pytest.raises(
        UserError, match=r"holds both shards \(old\.tar\) and (ants|bees): give the shards as .*/\*\.tar"
    ):
        open_source(folder)
    assert len(open_source(f"{folder}/*.tar")) == 1
