"""Errors in one of several processes: the message is printed once, and all end with exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import repa
from repa.base import dist
from repa.base.errors import UserError

# The real command line, where `open_checked` fails in one process, or `claim_folder` in the main one.
SCRIPT = """
import os, sys
import repa.data, repa.training.loop
from repa.base.errors import UserError
from repa.cli import main

who, mistake = int(sys.argv.pop(1)), sys.argv.pop(1)
if int(os.environ["RANK"]) == who:
    def refuse(*arguments):
        raise UserError("This is the mistake.")
    setattr(repa.data if mistake == "open_checked" else repa.training.loop, mistake, refuse)
main.main()
"""


def start(tmp_path: Path, *argv) -> list[tuple[int, str]]:
    """Start two processes, without torchrun, which would end one with the other: (exit code, stderr) of each."""
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(repa.__file__).parents[1]),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *map(str, argv)], text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.mark.parametrize(
    ("who", "mistake"), [(1, "open_checked"), pytest.param(0, "claim_folder", marks=pytest.mark.slow)]
)
def test_a_user_error_in_one_process_ends_all_and_is_printed_once(who, mistake, data_folder, tiny_config, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny_config.to_yaml())
    ends = start(tmp_path, who, mistake, "train", "tiny.yaml", "--data", data_folder, "--out", "r")
    assert [code for code, _ in ends] == [2, 2]
    said = "".join(error for _, error in ends)
    assert said.count("repa: This is the mistake.") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_single_process_raises_errors_unchanged():
    assert dist.on_main(lambda: 5) == 5
    error = UserError("mine")
    with pytest.raises(UserError) as caught, dist.together():
        raise error
    assert caught.value is error
    with pytest.raises(KeyError), dist.together():
        raise KeyError  # programming errors pass through
