"""Full, read-only, limited and failing disks give a one-line error and exit code 2 with every command that writes.

A short form runs in `make test`; this runs everything and prints counts:

    pytest -m slow -s tests/hostile/test_disks.py
"""

import builtins
import contextlib
import errno
import io
import os
import resource
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.commands import outcome

SMALL = ["--num-images", "3", "--steps", "1"]
# verb -> its arguments in the folder that is full, read-only or failing, which contains "run", "data" and "exported"
VERBS: dict[str, Callable[[Path], list[str]]] = {
    "prepare": lambda d: ["prepare", str(d / "images"), str(d / "o"), "--resolution", "16", "--features", "tiny", "--num-workers", "0"],
    "prepare more": lambda d: ["prepare", str(d / "plain"), "--only", "features:tiny", "--num-workers", "0"],
    "train": lambda d: ["train", str(d / "r.yaml"), "--data", str(d / "data"), "--out", str(d / "o")],
    "train on": lambda d: ["train", str(d / "r.yaml"), "--data", str(d / "data"), "--out", str(d / "run"), "--num-steps", "6"],
    "train async": lambda d: ["train", str(d / "r.yaml"), "--data", str(d / "data"), "--out", str(d / "o"), "--async-save", "true"],
    "ema": lambda d: ["ema", str(d / "run"), "--width", "0.07"],
    "sample": lambda d: ["sample", str(d / "run"), "--out", str(d / "o" / "s.npz"), *SMALL],
    "evaluate": lambda d: [
        "evaluate", str(d / "run"), "--reference", str(d / "data"), "--features", "tiny", "--metrics", "fd",
        "--out", str(d / "o.json"), *SMALL,
    ],
    "reference": lambda d: ["evaluate", "reference", str(d / "data"), "--features", "tiny", "--out", str(d / "ref.npz")],
    "analyse": lambda d: ["analyse", "cknna", str(d / "run"), "--data", str(d / "data"), "--encoder", "tiny", "--times", "0.5"],
    "report": lambda d: ["report", str(d / "run"), "--out", str(d / "o.html")],
    "export": lambda d: ["export", str(d / "run"), str(d / "o")],
    "convert": lambda d: ["convert", str(d / "exported"), str(d / "o")],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_config, image_folder, data_folder, tmp_path_factory) -> Path:
    """Everything that the commands read."""
    root = tmp_path_factory.mktemp("disk") / "whole"
    root.mkdir()
    shutil.copytree(image_folder, root / "images")
    shutil.copytree(data_folder, root / "data")
    preview = {"every": 2, "num_images": 2, "num_steps": 1}
    recipe = tiny_config.override(num_steps=4, save_every=2, ema_widths=(0.1,), snapshot_every=2, preview=preview)
    (root / "r.yaml").write_text(recipe.to_yaml())
    for argv in (
        ["train", str(root / "r.yaml"), "--data", str(root / "data"), "--out", str(root / "run")],
        ["export", str(root / "run"), str(root / "exported")],
        ["prepare", str(root / "images"), str(root / "plain"), "--resolution", "16", "--num-workers", "0"],
    ):
        code, said = outcome(argv)
        assert code == 0, said
    return root


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., bool]]:
    """Mount a small file system until the test ends; False where mounting is not permitted."""
    mounted = []

    def put(folder: Path, *options: str) -> bool:
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        mounted.extend([folder] * (done.returncode == 0))
        return done.returncode == 0

    yield put
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture(autouse=True)
def _cache_here(tmp_path, monkeypatch):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))


def fresh(whole: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    return folder


def check(counts: Counter, wrong: list[str], what: str, code: object, said: str) -> None:
    counts[code] += 1
    if code not in (0, 2):
        wrong.append(f"{what}: {code}\n{said[-3000:]}")
    elif code == 2 and len([line for line in said.splitlines() if line.startswith("repa: ")]) != 1:
        wrong.append(f"{what}: not one sentence\n{said[-2000:]}")


def full_disks(whole: Path, folder: Path, lefts: list[int], verbs: list[str]) -> tuple[Counter, list[str]]:
    """Run every verb on a disk with `room` bytes left."""
    counts, wrong = Counter(), []
    for verb in verbs:
        for left in lefts:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.copytree(whole, folder, dirs_exist_ok=True)
            with contextlib.suppress(OSError), open(folder / "filler", "wb") as filler:
                filler.write(b"\0" * max(shutil.disk_usage(folder).free - left, 0))
            check(counts, wrong, f"{verb}, {left} bytes left", *outcome(VERBS[verb](folder)))
    return counts, wrong


def limited_files(whole: Path, folder: Path, limits: list[int], verbs: list[str]) -> tuple[Counter, list[str]]:
    """Run every verb with a file size limit, so that all writers, also in C and Rust, get EFBIG."""
    counts, wrong = Counter(), []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for verb in verbs:
        for limit in limits:
            fresh(whole, folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                code, said = outcome(VERBS[verb](folder))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            check(counts, wrong, f"{verb}, files of at most {limit} bytes", code, said)
    return counts, wrong


class Failing:
    """Counts writing calls below a folder and makes one of them fail."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.calls, self.fail_at, self.number = str(folder), 0, -1, errno.EIO
        for module, name in (
            (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "fsync"), (os, "open"), (os, "unlink"), (os, "rmdir"), (os, "ftruncate"),
            (tempfile, "mkstemp"), (tempfile, "mkdtemp"), (builtins, "open"), (io, "open"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, self.wrapped(getattr(module, name), name))

    def wrapped(self, call: Callable, name: str) -> Callable:
        def failing(*arguments, **more):
            target = (
                more.get("dir") if name.startswith("mk") and name != "mkdir" else arguments[0] if arguments else None
            )
            if isinstance(target, int):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"/proc/self/fd/{target}")
            reads = name == "open" and not self.writes(arguments, more)
            if not reads and isinstance(target, (str, os.PathLike)) and str(target).startswith(self.folder):
                self.calls += 1
                if self.calls == self.fail_at:
                    raise OSError(self.number, os.strerror(self.number), str(target))
            return call(*arguments, **more)

        return failing

    @staticmethod
    def writes(arguments: tuple, more: dict) -> bool:
        mode = arguments[1] if len(arguments) > 1 else more.get("mode", "r")
        return bool(mode & (os.O_WRONLY | os.O_RDWR)) if isinstance(mode, int) else any(sign in mode for sign in "wax+")


NUMBERS = (
    errno.EIO,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EPERM,
    errno.EACCES,
    errno.ESTALE,
    errno.ENAMETOOLONG,
    errno.EINVAL,
)


def failing_calls(whole: Path, folder: Path, verbs: list[str], each: int) -> tuple[Counter, list[str]]:
    """Run every verb with its first, second, ... writing call failing; `each` tests only every so many calls."""
    counts, wrong = Counter(), []
    for verb in verbs:
        number = 0
        while True:
            fresh(whole, folder)
            with pytest.MonkeyPatch.context() as patch:
                failing = Failing(folder, patch)
                failing.fail_at, failing.number = number * each + 1, NUMBERS[number % len(NUMBERS)]
                code, said = outcome(VERBS[verb](folder))
            if failing.calls < failing.fail_at:
                break
            check(
                counts,
                wrong,
                f"{verb}, call {failing.fail_at} fails with {errno.errorcode[failing.number]}",
                code,
                said,
            )
            number += 1
    return counts, wrong


def report(what: str, counts: Counter, wrong: list[str]) -> None:
    print(f"\n{what}: " + ", ".join(f"{count} x {code}" for code, count in counts.items()))
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong[:5])


FEW = ["train", "sample", "prepare"]


def test_full_disks_give_one_line_errors(whole, mount, tmp_path):
    if not mount(tmp_path / "d", "-o", "size=24m"):
        pytest.skip("mounting is not allowed")
    report("full disks", *full_disks(whole, tmp_path / "d", [0, 20_000], FEW))


def test_a_file_size_limit_gives_one_line_errors(whole, tmp_path):
    report("files of limited size", *limited_files(whole, tmp_path / "d", [0, 5_000], FEW))


def test_failing_system_calls_give_one_line_errors(whole, tmp_path):
    report("failing calls", *failing_calls(whole, tmp_path / "d", ["export", "sample"], each=5))


def test_read_only_folders_give_one_line_errors(whole, mount, tmp_path):
    if not mount(tmp_path / "d", "-o", "size=24m"):
        pytest.skip("mounting is not allowed")
    shutil.copytree(whole, tmp_path / "d", dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "d")], check=True)
    counts, wrong = Counter(), []
    for verb, argv in VERBS.items():
        check(counts, wrong, f"{verb}, read-only", *outcome(argv(tmp_path / "d")))
    report("read-only disks", counts, wrong)


@pytest.mark.parametrize("place", ["/proc/x", "/proc/1/x", "WHOLE/r.yaml/x"])
def test_unwritable_paths_are_refused_before_any_work(place, whole):
    place = place.replace("WHOLE", str(whole))
    for verb, argv in VERBS.items():
        before = argv(whole)
        words = [word.replace(str(whole / "o"), place) for word in before]
        if words != before:
            code, said = outcome(words)
            assert code == 2, (verb, said)
            lines = said.splitlines()
            assert len(lines) == 1, (verb, said)  # reported before any work
            assert lines[0].startswith(f"repa: {place}"), (verb, said)
            assert "cannot be written: " in lines[0], (verb, said)


@pytest.mark.slow
def test_full_disks_for_every_verb(whole, mount, tmp_path):
    if not mount(tmp_path / "d", "-o", "size=24m"):
        pytest.skip("mounting is not allowed")
    lefts = [0, 4_096, 12_288, 40_960, 100_000, 200_000, 400_000, 800_000]
    report("full disks", *full_disks(whole, tmp_path / "d", lefts, list(VERBS)))


@pytest.mark.slow
def test_a_file_size_limit_for_every_verb(whole, tmp_path):
    limits = [0, 1, 100, 1_000, 3_000, 10_000, 30_000, 70_000, 150_000]
    report("files of limited size", *limited_files(whole, tmp_path / "d", limits, list(VERBS)))


@pytest.mark.slow
def test_failing_system_calls_for_every_verb(whole, tmp_path):
    report("failing calls", *failing_calls(whole, tmp_path / "d", list(VERBS), each=1))
