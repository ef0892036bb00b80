"""torchrun's variables must be complete or absent; a process whose peers never connect ends."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repa.base.errors import UserError
from repa.base.launch import Place, die_with_parent, place
from repa.cli import main

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def launched(monkeypatch):
    def put(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(3, 8, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2, 0, 1)),
        ({"WORLD_SIZE": "1"}, Place()),
        ({"RANK": "0"}, Place()),
    ],
)
def test_the_place_is_read_from_torchruns_variables(values, wanted, launched):
    launched(**values)
    assert place() == wanted


@pytest.mark.parametrize(
    "values",
    [
        {"RANK": "x"}, {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "²"},
        {"RANK": "0", "WORLD_SIZE": "1e3"}, {"RANK": "0", "WORLD_SIZE": "9" * 5000}, {"LOCAL_RANK": "x"},
        {"RANK": "0", "WORLD_SIZE": "0"},
    ],
)  # fmt: skip
def test_inconsistent_variables_are_refused_before_anything_runs(values, launched, capsys):
    launched(**values)
    with pytest.raises(UserError):
        place()
    assert main.run(["show", "quickstart"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert any(name in said.err for name in values)
    assert len(said.err.splitlines()) == 1


def alone(rank: int, tmp_path, **more) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "REPA_JOIN_MINUTES": "0.03", "CUDA_VISIBLE_DEVICES": "", **more,
    }  # fmt: skip
    script = "from repa.base import dist; dist.NOTE_AFTER = 0.3; from repa.cli import main; main.main()"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("{}")
    argv = ["sample", "run", "--out", "s.npz"]
    return subprocess.run(
        [sys.executable, "-c", script, *argv], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_whose_peers_never_connect_ends_with_an_error(rank, tmp_path):
    ended = alone(rank, tmp_path)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    note, *_, refusal = [line for line in ended.stderr.splitlines() if line.startswith("repa: ")]
    assert "waits for the others" in note
    assert "REPA_JOIN_MINUTES" in refusal


def test_a_missing_master_address_is_refused(tmp_path):
    ended = alone(0, tmp_path, MASTER_ADDR="")
    assert ended.returncode == 2
    assert "MASTER_ADDR" in ended.stderr


def test_an_invalid_port_is_not_called_a_wait(tmp_path):
    ended = alone(0, tmp_path, MASTER_PORT="x", REPA_JOIN_MINUTES="10")
    assert ended.returncode == 2
    assert "The processes cannot meet at 127.0.0.1:x" in ended.stderr
    assert "Waited" not in ended.stderr


def _worker(parent, told):
    die_with_parent(parent)
    told.send(os.getpid())
    time.sleep(60)


def _parent(method, told):
    context = multiprocessing.get_context(method)
    for _ in range(2):
        context.Process(target=_worker, args=(os.getpid(), told)).start()
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
# the defaults of Linux before Python 3.14, of other systems, and since then
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_end_with_their_parent(method):
    mine, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("spawn").Process(target=_parent, args=(method, theirs))
    parent.start()
    workers = [mine.recv() if mine.poll(60) else 0 for _ in range(2)]
    time.sleep(0.3)
    assert all(_runs(worker) for worker in workers)
    parent.kill()
    parent.join()
    until = time.monotonic() + 10
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.02)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "2000"),
        pytest.param({"OMP_WAIT_POLICY": "PASSIVE"}, "0", marks=pytest.mark.slow),
        pytest.param({"GOMP_SPINCOUNT": "7"}, "7", marks=pytest.mark.slow),
    ],
)
def test_threads_of_a_command_spin_briefly(given, spins, random_run):
    """OpenMP prints its settings when torch loads it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **given}
    command = [sys.executable, "-m", "repa", "show", str(random_run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = [line.split(" = ")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not told:
        pytest.skip("another OpenMP than GNU's")
    assert told == [f"'{spins}'"]
