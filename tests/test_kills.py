"""After SIGKILL at any moment, also within a write, the same command gives identical files and leaves nothing behind.

Commands are killed at random times, and before and after the n-th renaming of a file or folder, which completes a
write. They run in children of a process that has imported torch, which saves time.

The long form kills each command at least 100 times: python -m pytest -m slow -s tests/test_kills.py
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from repa.base import faults  # noqa: F401 (imported before the first fork)
from repa.cli.main import run as repa
from repa.evaluation import jobs  # noqa: F401
from repa.sampling import samples  # noqa: F401
from repa.training import loop  # noqa: F401

RANDOM = random.Random(0)


class Command(NamedTuple):
    """A command, and the files that it makes in its folder."""

    argv: Callable[[Path], list]
    made: tuple[str, ...]  # patterns of files; times and places in .json are ignored


TINY = ["--num-images", "6", "--steps", "2", "--sampler", "euler", "--batch-size", "2"]


@pytest.fixture(scope="module")
def commands(
    image_folder, data_folder, captioned_data, random_run, tiny_config, tmp_path_factory
) -> dict[str, Command]:
    root = tmp_path_factory.mktemp("given")
    recipe = root / "tiny.yaml"
    recipe.write_text(
        tiny_config.override(num_steps=6, save_every=2, keep_every=2, ema_widths=(0.1,), snapshot_every=2).to_yaml(),
        encoding="utf-8",
    )
    assert repa(["sample", str(random_run), *TINY, "--out", str(root / "s.npz")]) == 0
    train = ["train", recipe, "--data", data_folder]
    checkpoints = ("*/checkpoints/*/*.safetensors", "*/snapshots/*/*", "*/config.yaml")
    return {
        "prepare": Command(
            lambda out: ["prepare", image_folder, out / "data", "--resolution", "16", "--features", "tiny",
                         "--shard-size", "10", "--num-workers", "1"],
            ("data/*.npy", "data/manifest.json"),
        ),
        "prepare --text": Command(
            lambda out: ["prepare", captioned_data / "source", out / "data", "--resolution", "16", "--text",
                         "tiny-text:tokens=4,width=8", "--shard-size", "10", "--num-workers", "0"],
            ("data/*.npy", "data/*.jsonl", "data/manifest.json"),
        ),
        "prepare --only text": Command(
            lambda out: ["prepare", copied(captioned_data / "plain", out / "data"), "--only", "text", "--text",
                         "tiny-text:tokens=4,width=8"],
            ("data/*.npy", "data/*.jsonl", "data/manifest.json"),
        ),
        "train": Command(lambda out: [*train, "--out", out / "run"], checkpoints),
        "train --async-save": Command(lambda out: [*train, "--out", out / "run", "--async-save", "true"], checkpoints),
        "sample": Command(lambda out: ["sample", random_run, *TINY, "--out", out / "s.npz"], ("s.npz", "s.png", "s.json")),
        "evaluate": Command(
            lambda out: ["evaluate", root / "s.npz", "--reference", data_folder, "--features", "tiny-classifier",
                         "--metrics", "fd", "--out", out / "e.json"],
            ("e.json",),
        ),
        "probe": Command(
            lambda out: ["analyse", "probe", random_run, "--data", data_folder, "--times", "0.5", "--epochs", "1",
                         "--out", out / "probe.json", "--cache", out / "cache"],
            ("probe.csv", "probe.json"),
        ),
        "export": Command(lambda out: ["export", random_run, out / "model"], ("model/*",)),
    }  # fmt: skip


def copied(source: Path, out: Path) -> Path:
    """Prepare the folder that a command works on; an existing one is kept."""
    if not out.exists():
        shutil.copytree(source, out)
    return out


def content(out: Path, command: Command) -> dict[str, str]:
    """Checksums of a command's files, without times."""
    found = {}
    for pattern in command.made:
        for path in sorted(out.glob(pattern)):
            data = path.read_bytes()
            if path.suffix == ".json":
                value = json.loads(data)
                value.pop("made", None)
                data = json.dumps(
                    {k: v for k, v in value.items() if k not in ("seconds", "time", "out", "cache")}, sort_keys=True
                ).encode()
            found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    assert found
    return found


def leftovers(out: Path) -> list[str]:
    return [str(path) for path in out.rglob(".*") if path.name.endswith((".tmp", ".lock")) or path.name == "parts"]


class Aim:
    """Counts renames of a child in shared memory, and kills it at one of them."""

    def __init__(self, at: int = 0, after: bool = False):
        import mmap

        self.at, self.after, self.shared = at, after, mmap.mmap(-1, 8)

    @property
    def count(self) -> int:
        return struct.unpack("q", self.shared[:])[0]

    def arm(self) -> None:
        for name in ("replace", "rename"):
            setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, real):
        def rename(*args, **options):
            self.shared[:] = struct.pack("q", self.count + 1)
            here = self.count == self.at
            if here and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **options)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return rename


def start(argv: list, aim: Aim | None = None) -> int:
    """Run a command in a child with a separate process session."""
    if child := os.fork():
        return child
    os.setsid()
    torch.set_num_threads(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    if aim:
        aim.arm()
    try:
        code = repa([str(token) for token in argv])
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    os._exit(code)


def ended(child: int) -> int:
    """The exit code of a child, negative for a signal; its workers must end soon after it."""
    _, status = os.waitpid(child, 0)
    until = time.monotonic() + 5
    while members(child):
        assert time.monotonic() < until, f"processes {members(child)} outlived their parent"
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(status)


def members(session: int) -> list[int]:
    """Running processes of a process session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def undisturbed(command: Command, out: Path) -> tuple[dict[str, str], float, int]:
    """The files, the seconds and the number of renames of an uninterrupted command."""
    out.mkdir()
    aim, begin = Aim(), time.monotonic()
    assert ended(start(command.argv(out), aim)) == 0
    return content(out, command), time.monotonic() - begin, aim.count


def kill_and_finish(command: Command, out: Path, wanted: dict[str, str], seconds: float, aim: Aim | None) -> bool:
    """Kill the command once, run it again and compare; True when it was killed before its end."""
    out.mkdir()
    child = start(command.argv(out), aim)
    if aim is None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    code = ended(child)
    assert code in (0, -signal.SIGKILL)
    assert ended(start(command.argv(out))) == 0
    assert content(out, command) == wanted
    assert leftovers(out) == []
    shutil.rmtree(out)
    return code != 0


NAMES = (
    "prepare",
    "prepare --text",
    "prepare --only text",
    "train",
    "train --async-save",
    "sample",
    "evaluate",
    "probe",
    "export",
)


def campaign(command: Command, tmp_path: Path, kills: int) -> tuple[int, int]:
    """Repeat until `wanted` kills hit a running command; returns how many were aimed at a rename, and the tries.

    A command has a limited number of renames; the other kills come at random times.
    """
    wanted, seconds, renames = undisturbed(command, tmp_path / "whole")
    aims = [Aim(at, after) for at in range(1, renames + 1) for after in (False, True)]
    RANDOM.shuffle(aims)
    aims = aims[: max(1, kills // 2)]
    aimed = landed = tries = 0
    while landed < kills:
        assert tries < 4 * kills, f"{landed} of {tries} kills came before the end"
        aim = aims[tries] if tries < len(aims) else None
        hit = kill_and_finish(command, tmp_path / f"out{tries}", wanted, RANDOM.uniform(0.02, 0.95) * seconds, aim)
        tries, landed, aimed = tries + 1, landed + hit, aimed + (hit and aim is not None)
    return aimed, tries


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_command_finishes_with_identical_files(name, commands, tmp_path):
    aimed, _ = campaign(commands[name], tmp_path, kills=3)
    assert aimed


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_kills_of_each_command(name, commands, tmp_path, capsys):
    aimed, tries = campaign(commands[name], tmp_path, kills=100)
    with capsys.disabled():
        print(f"{name}: 100 kills before its end ({tries} tries), {aimed} of them at a rename; same bytes, 0 leftovers")


def pairs(command: Command, tmp_path: Path, number: int) -> tuple[int, int]:
    """Run a command twice at once, repeatedly; returns how often both succeeded and how often one was refused."""
    wanted, _, _ = undisturbed(command, tmp_path / "whole")
    both = refused = 0
    for k in range(number):
        out = tmp_path / f"pair{k}"
        out.mkdir()
        children = [start(command.argv(out)) for _ in range(2)]
        codes = sorted(ended(child) for child in children)
        assert codes in ([0, 0], [0, 2]), codes
        both, refused = both + (codes == [0, 0]), refused + (codes == [0, 2])
        assert ended(start(command.argv(out))) == 0
        assert content(out, command) == wanted
        assert leftovers(out) == []
        shutil.rmtree(out)
    return both, refused


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["train", "sample"])
def test_two_equal_commands_at_once(name, commands, tmp_path):
    pairs(commands[name], tmp_path, 1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", NAMES)
def test_twenty_pairs_of_equal_commands(name, commands, tmp_path, capsys):
    both, refused = pairs(commands[name], tmp_path, 20)
    with capsys.disabled():
        print(f"{name}: 20 pairs at once, {both} both fine, {refused} one refused in a sentence; records whole")
