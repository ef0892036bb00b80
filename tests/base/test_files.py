import errno
import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repa.base import files
from repa.base.arrays import load_npy, save_npy
from repa.base.errors import UserError


@pytest.mark.parametrize("value", ["", "cache", "./x"])
def test_a_cache_folder_is_not_in_the_current_folder(value, monkeypatch, tmp_path):
    monkeypatch.delenv("REPA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "repa"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "f") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "f").exists()
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with files.atomic_folder(tmp_path / "f") as temporary:
        (temporary / "x").write_text("1")
    assert (tmp_path / "f" / "x").read_text() == "1"


def test_a_new_folder_has_the_permissions_of_the_umask(tmp_path):
    with files.atomic_folder(tmp_path / "f") as temporary:
        save_file({"x": torch.zeros(1)}, temporary / "x.safetensors")  # creates it readable only by its owner
        (temporary / "y").write_text("1")
    assert stat.S_IMODE((tmp_path / "f" / "x.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "f" / "y").stat().st_mode
    )


def test_a_full_disk_gives_a_one_line_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(UserError, match="disk is full"), files.atomic_path(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"


def test_space_is_checked_before_work(tmp_path):
    with pytest.raises(UserError, match=r"needs .*TiB, but .* has .* free"):
        files.require_space(tmp_path / "not" / "yet", 1 << 62, "Writing samples")


def test_an_error_about_damaged_json_names_the_file(tmp_path):
    (tmp_path / "m.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"m\.json cannot be read as JSON"):
        files.read_json(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a": 1, "b": {"step": 1, "step": 2}}', "'step'"),
        ('{"a": [{"x": 1, "x": 1}]}', "'x'"),
        ('{"a": NaN}', "NaN"),
        ("[Infinity]", "Infinity"),
        ("-Infinity", "-Infinity"),
    ],
)
def test_json_with_duplicate_keys_or_nan_is_refused(tmp_path, text, named):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError, match=rf"m\.json .*{named}"):
        files.read_json(tmp_path / "m.json")


def test_json_that_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(UserError, match="NaN"):
        files.write_json(tmp_path / "m.json", {"a": float("inf")})
    assert not (tmp_path / "m.json").exists()


def test_sizes_are_printed_in_readable_units():
    assert files.size(1536) == "1.5 KiB"
    assert files.size(12) == "12 B"


def test_an_array_that_does_not_fit_on_the_disk_leaves_no_file(tmp_path):
    """`np.save` silently leaves a truncated file."""
    import resource

    array = np.arange(500, dtype=np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
    try:
        with pytest.raises(UserError, match=r"a\.npy was not written"):
            save_npy(tmp_path / "a.npy", array)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []
    for value in (array, np.zeros((0, 3), np.float16), np.ones((2, 3), np.float32).T):
        save_npy(tmp_path / "b.npy", value)
        assert np.array_equal(load_npy(tmp_path / "b.npy", "an array"), value)


def test_a_folders_files_are_synced_before_it_is_renamed(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with files.atomic_folder(tmp_path / "made") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_bytes(b"x")
    made = tmp_path / "made"
    wanted = {path.stat().st_ino for path in (made, made / "sub", made / "sub" / "file")}
    assert wanted <= set(synced[:-1])  # the last one is the parent folder
    assert synced[-1] == tmp_path.stat().st_ino


def test_rows_are_written_as_csv(tmp_path):
    rows = [{"a": "x", "b": 1.0}, {"a": "long", "b": None, "c": 3}]
    files.write_csv(tmp_path / "all.csv", rows)
    assert (tmp_path / "all.csv").read_text() == "a,b,c\nx,1.0,\nlong,,3\n"
    files.write_csv(tmp_path / "named.csv", rows, ["c", "a", "b"])
    assert (tmp_path / "named.csv").read_text() == "c,a,b\n,x,1.0\n3,long,\n"


def test_paths_that_are_not_utf_8_round_trip(tmp_path):
    for name in ("\udcff", "a\ud83d"):
        files.write_json(tmp_path / "a.json", {"name": name})
        assert files.read_json(tmp_path / "a.json") == {"name": name}


def test_a_folder_behind_a_symlink_is_filled(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with files.atomic_folder(tmp_path / "link") as temporary:
        (temporary / "x").write_text("x")
    assert (tmp_path / "there/x").read_text() == "x"
    assert (tmp_path / "link").is_symlink()


def test_json_beyond_the_size_limit_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_JSON", 10)
    (tmp_path / "a.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(UserError, match="it has 12 B"):
        files.read_json(tmp_path / "a.json")


def test_every_changed_byte_of_a_sealed_file_is_found(tmp_path):
    values = {"b": [1, 2.5e-7, None, "é\udcff"], "a": {"x": True, "2": (3, 4)}, "long": "word " * 9}
    files.write_sealed(tmp_path / "x.json", values)
    whole = (tmp_path / "x.json").read_bytes()
    wanted = files.read_json(tmp_path / "x.json")
    assert wanted == {**values, "a": {"x": True, "2": [3, 4]}}
    seen = 0
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            (tmp_path / "x.json").write_bytes(changed)
            try:
                found = files.read_json(tmp_path / "x.json")
            except UserError:
                seen += 1
            else:  # white space, or the key of the seal itself
                assert {name: found.get(name) for name in wanted} == wanted
    assert seen > 7 * len(whole)


def test_the_error_about_a_broken_seal_says_how_to_change_the_file(tmp_path):
    files.write_sealed(tmp_path / "x.json", {"fid": 3.1})
    text = (tmp_path / "x.json").read_text()
    (tmp_path / "x.json").write_text(text.replace("3.1", "2.1"))
    with pytest.raises(UserError, match=f"does not match its checksum.*remove its line '{files.SEAL}'"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"fid": 2.1}')
    assert files.read_json(tmp_path / "x.json") == {"fid": 2.1}


def test_a_path_in_a_folder_that_cannot_be_listed_has_no_suggestion(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    assert files.near(tmp_path / "photo") == " Did you mean 'photos'?"

    def refused(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refused)
    assert files.near(tmp_path / "photo") == ""


def test_a_folder_that_another_process_removes_does_not_end_the_search_for_links(tmp_path, monkeypatch):
    for name in ("a", "b", "elsewhere"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run/elsewhere/link").symlink_to(tmp_path)
    scan = os.scandir

    def vanishing(folder):
        if folder.name in ("a", "b"):
            folder.rmdir()
        return scan(folder)

    monkeypatch.setattr(os, "scandir", vanishing)
    with pytest.raises(UserError, match="run/elsewhere/link is a symbolic link to another folder"):
        files.refuse_links(tmp_path / "run")


def test_a_link_to_a_folder_beside_it_is_no_link_to_another_folder(tmp_path):
    """Weights & Biases makes one, latest-run, in each run."""
    (tmp_path / "run/wandb/offline-run-1").mkdir(parents=True)
    (tmp_path / "run/wandb/latest-run").symlink_to("offline-run-1")
    (tmp_path / "link").symlink_to("run")
    files.refuse_links(tmp_path / "link")
    (tmp_path / "run/wandb/other").symlink_to(tmp_path)
    with pytest.raises(UserError, match="link/wandb/other is a symbolic link to another folder"):
        files.refuse_links(tmp_path / "link")
