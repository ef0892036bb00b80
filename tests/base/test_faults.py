"""Errors of the system and of file formats become one-line errors; programming errors do not."""

import errno
import os
import socket
import zipfile

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from repa.base import files
from repa.base.errors import UserError, escaped
from repa.base.faults import PACKAGE, reading, require_plain, sentence_of

NUMBERS = sorted(errno.errorcode)


@pytest.mark.parametrize("number", NUMBERS)
def test_system_errors_that_name_a_file_become_one_line_errors(number):
    sentence = sentence_of(OSError(number, os.strerror(number), "/data/x.npy"))
    assert sentence.startswith("/data/x.npy: ")
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        OSError("28000 requested and 12 written"),  # ndarray.tofile
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        MemoryError("Unable to allocate 4 EiB"),
    ],
)
def test_system_errors_without_a_file_name_become_one_line_errors(error):
    assert sentence_of(error).endswith(".")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("missing"), TypeError("'int' object is not iterable"), ValueError("bad"), RecursionError("deep"),
        OSError(errno.EBADF, "Bad file descriptor"), OSError("unexplained"), RuntimeError("shape mismatch"),
        FileNotFoundError(errno.ENOENT, "No such file", str(PACKAGE / "report" / "page.html")),
        # the file name is known only to the reader
        SafetensorError("Error while deserializing header: HeaderTooLarge"),
    ],
)  # fmt: skip
def test_programming_errors_keep_their_traceback(error):
    assert sentence_of(error) is None


@pytest.mark.parametrize("number", [n for n in NUMBERS if n not in (errno.EINVAL, errno.ENOTSUP)])
def test_a_failed_write_names_the_file(number, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError) as caught:
        files.write_text(path, "new")
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_file_systems_without_permissions_or_fsync_work(tmp_path, monkeypatch):
    def refuse(number):
        def fail(*arguments):
            raise OSError(number, os.strerror(number), str(tmp_path))

        return fail

    monkeypatch.setattr(os, "chmod", refuse(errno.EPERM))
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    files.write_text(tmp_path / "a", "x")
    with files.atomic_folder(tmp_path / "f") as folder:
        (folder / "b").write_text("y")
    assert (tmp_path / "a").read_text() + (tmp_path / "f" / "b").read_text() == "xy"


def test_read_errors_name_the_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\x93NUMPY\x01\x00")
    readers = (load_file, zipfile.ZipFile, lambda p: np.load(p, allow_pickle=False))
    for reader in readers:
        with (
            pytest.raises(UserError, match="x cannot be read as a thing"),
            reading(path, "a thing", "Go."),
        ):
            reader(path)
    for deep in ("[" * 100_000, '{"a":' * 100_000):
        path.write_text(deep)
        with pytest.raises(UserError, match="nested too deeply"):
            files.read_json(path)
    path.write_text("9" * 5000)
    with pytest.raises(UserError, match="JSON"):
        files.read_json(path)


def test_pipes_devices_and_sockets_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        for name in ("pipe", "zero", "s"):
            with pytest.raises(UserError, match=f"{name} is refused"):
                require_plain(tmp_path / name)
            with pytest.raises(UserError, match=f"{name} is refused"):
                files.read_json(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError):
        files.read_json(tmp_path / "loop")


def test_terminal_control_characters_are_escaped():
    assert escaped("a\x1b[31mb\rc\x07\u202ed\x9b\udcff") == "a\\x1b[31mb\\rc\\x07\\u202ed\\x9b\\udcff"
    assert escaped("Käse 猫 🐈\n\tnext") == "Käse 猫 🐈\n\tnext"
