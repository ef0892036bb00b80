"""Foreign checkpoint files: what is read, what is refused, and the error messages."""

import argparse
import contextlib
import json
import pathlib
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from repa.base.errors import UserError
from repa.base.weights import read_weights


class Odd:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_with_numpy_numbers_and_paths_are_read(zipped, tmp_path):
    arguments = argparse.Namespace(
        lr=np.float32(0.5), out=pathlib.Path("a/b"), flag=np.bool_(True), big=np.uint64(2**63)
    )
    content = {"w": torch.ones(2), "steps": np.int64(-10), "args": arguments, "half": np.float16(0.25)}
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path / "c.pt")
    assert (found["steps"], found["half"], found["args"].lr, found["args"].big) == (-10, 0.25, 0.5, 2**63)
    assert (type(found["steps"]), found["args"].flag) == (int, True)
    assert found["args"].out == pathlib.PurePosixPath("a/b")


@pytest.mark.parametrize("zipped", [True, False])
def test_an_unsupported_class_is_named(zipped, tmp_path):
    torch.save({"w": torch.ones(2), "x": Odd()}, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"an object of the class [\w.]*test_weights\.Odd") as error:
        read_weights(tmp_path / "c.pt")
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found_and_its_tensor_named(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"ema": {"first": torch.arange(99.0), "second": torch.full((1000,), 7.0)}}, path)
    content = bytearray(path.read_bytes())
    content[content.find(torch.full((9,), 7.0).numpy().tobytes()) + 500] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"the tensor 'ema\.second' does not match its checksum"):
        read_weights(path)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 2, bias=False)
        self.token = nn.Parameter(torch.randn(4))
        self.rest = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, x):
        return self.rest(self.conv1(x).flatten(1)[:, :4] + self.token)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Inner().half()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("steps", torch.arange(5))

    def forward(self, x):
        return self.visual(x) * self.scale


@pytest.mark.parametrize("traced", [True, False])
def test_tensors_of_torchscript_are_read_without_running_its_code(traced, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = Outer()
    scripted = torch.jit.trace(net, torch.randn(1, 3, 2, 2).half()) if traced else torch.jit.script(net)
    torch.jit.save(scripted, tmp_path / "clip.pt")
    wanted = net.state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    found = read_weights(tmp_path / "clip.pt")
    used = wanted.keys() - ({"steps"} if traced else set())  # tracing drops tensors that forward does not use
    assert used <= found.keys() <= wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in used)


CALLS = b"cposix\nsystem\n(X\x04\x00\x00\x00exittR.", b"cbuiltins\neval\n(X\x03\x00\x00\x001/0tR."
BEYOND = (  # nine numbers from a record of eight bytes
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x09tQK\x00K\x09\x85K\x01\x85\x89NtR."
)


@pytest.mark.parametrize("tree", [*CALLS, BEYOND, b"no pickle", b""])
def test_a_hostile_pickle_runs_nothing(tree, tmp_path):
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        records = {"data.pkl": tree, "constants.pkl": b"", "data/0": b"\0" * 8, "code/__torch__.py": b"1/0"}
        for name, content in records.items():
            archive.writestr(f"evil/{name}", content)
    if tree in CALLS:
        assert read_weights(path) == {}
    else:
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            read_weights(path)


def packed(source, path, method=zipfile.ZIP_STORED, **changed):
    """Repack an archive of torch.save, replacing some of its records."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w", method) as out:
        for name in archive.namelist():
            record = name.partition("/")[2]
            out.writestr(name, changed.get(record, archive.read(name)))
    return path


@pytest.fixture
def saved(tmp_path):
    """Weights as saved by a training script: a state dict with metadata, and two tensors sharing storage."""
    shared = torch.arange(1000.0)
    state = {**nn.Linear(3, 3).state_dict(), "shared": shared, "part": shared[10:20]}
    state["eight"] = torch.ones(5).to(torch.float8_e4m3fn)
    torch.save({"net": nn.Linear(2, 2).state_dict(), "ema": state}, tmp_path / "whole.pt")
    return tmp_path / "whole.pt"


def test_a_repacked_archive_is_read(saved, tmp_path):
    found = read_weights(packed(saved, tmp_path / "again.pt"))
    wanted = torch.load(saved)["ema"]
    assert found["ema"].keys() == wanted.keys()
    assert all(torch.equal(found["ema"][key].float(), wanted[key].float()) for key in wanted)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_compressed_archive_is_refused(method, saved, tmp_path):
    # torch would memory-map the compressed bytes as if they were the numbers
    with pytest.raises(UserError, match="is compressed, which torch.save never does"):
        read_weights(packed(saved, tmp_path / "again.pt", method))


def test_a_record_that_is_too_short_is_refused(saved, tmp_path):
    # torch would read on into the next record
    with pytest.raises(UserError, match="the record data/0 has 5 bytes instead of 16"):
        read_weights(packed(saved, tmp_path / "again.pt", **{"data/0": b"short"}))


@pytest.mark.parametrize(
    "tree",
    [
        b"\x80\x02X\x01\x00\x00\x00ar\xff\xff\xff\xff.",  # memoised at the largest index
        b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00.",  # 64 GiB of zeros
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",  # a text of endless length
    ],
)
@pytest.mark.parametrize("script", [True, False])
def test_a_pickle_that_claims_much_memory_is_refused(script, tree, saved, tmp_path):
    with zipfile.ZipFile(packed(saved, tmp_path / "bomb.pt", **{"data.pkl": tree}), "a") as archive:
        if script:
            archive.writestr("whole/constants.pkl", b"")
    tracemalloc.start()
    with contextlib.suppress(UserError):
        read_weights(tmp_path / "bomb.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("second", [{"dtype": "I32"}, {}])
def test_a_duplicate_tensor_in_a_header_is_refused(second, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    assert torch.equal(read_weights(path)["a"], torch.ones(2))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + size])["a"]
    header = json.dumps({"a": {**entry, **second}})[:-1] + "," + json.dumps({"a": entry})[1:]
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + size :])
    with pytest.raises(UserError, match="the key 'a' appears twice"):
        read_weights(path)


@pytest.mark.parametrize("size", [2**25 + 1, 2**63, 2**64 - 1])
def test_an_oversized_header_is_not_read(size, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="its header claims"):
        read_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "wrap", [lambda t: {"a": t}, lambda t: {"x": [{"a": t}]}, lambda t: {"a": [t[i] for i in range(99)]}]
)
def test_tensors_that_expand_a_few_numbers_hugely_are_refused(wrap, tmp_path):
    """A file of two kilobytes could fill any memory when its tensors are used."""
    torch.save(wrap(torch.zeros(1).expand(2**20, 2**14)), tmp_path / "x.pt")
    with pytest.raises(UserError, match="its tensors have more numbers than the file holds"):
        read_weights(tmp_path / "x.pt")
    shared = torch.randn(2**16)
    torch.save({str(i): shared for i in range(100)} | {"b": shared.expand(4, -1)}, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt")["b"].shape == (4, 2**16)


def test_torchs_advice_to_unpickle_a_file_is_not_shown(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"\0" * 2**14)  # torch takes it for a tar archive
    with pytest.raises(UserError, match="not written by torch.save, or is damaged") as error:
        read_weights(tmp_path / "x.pt")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("change", [lambda data: data[:-5], lambda data: data + b"12345"])
def test_a_safetensors_file_of_another_size_is_refused(change, tmp_path):
    save_file({"a": torch.ones(20)}, tmp_path / "x.safetensors")
    data = change((tmp_path / "x.safetensors").read_bytes())
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=f"it has {len(data)} bytes, but its header describes"):
        read_weights(tmp_path / "x.safetensors")
