"""A thousand changed configurations, manifests, checkpoints and shards: no traceback, and nothing taken that has a checksum.

The short form runs in `make test`; all of it, with its counts printed:

    pytest -m slow -s tests/hostile/test_mutations.py
"""

import contextlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from repa.cli import main
from repa.runs import layout
from tests.hostile.commands import outcome
from tests.hostile.mutations import mutate_file

SHORT, LONG = 12, 250  # changed files of each kind


@pytest.fixture(scope="module")
def whole(tiny_config, data_folder, tmp_path_factory) -> Path:
    """A folder with data, a run that can be continued, its recipe, and all that a command writes into a run."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(data_folder, root / "data")
    (root / "recipe.yaml").write_text(
        tiny_config.override(num_steps=4, save_every=2, ema_widths=(0.1,), snapshot_every=2).to_yaml()
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert (
            main.run(["train", str(root / "recipe.yaml"), "--data", str(root / "data"), "--out", str(root / "run")])
            == 0
        ), said.getvalue()
        assert main.run(["ema", str(root / "run"), "--width", "0.08"]) == 0, said.getvalue()
    return root


def commands(kind: str, root: Path, number: int) -> list[str]:
    """A command that reads the changed file."""
    run, data, out = str(root / "run"), str(root / "data"), root / "out"
    small = ["--num-images", "1", "--steps", "1"]
    choices = {
        "configuration": [
            ["sample", run, "--out", f"{out}.npz", *small],
            ["train", run, "--data", data, "--out", run, "--num-steps", "4"],
            ["report", run, "--out", f"{out}.html"],
            ["show", run],
            ["train", str(root / "recipe.yaml"), "--data", data, "--out", str(out), "--num-steps", "1", "--save-every", "1"],
            ["export", run, str(out)],
            ["estimate", str(root / "recipe.yaml")],
            ["analyse", "cknna", run, "--data", data, "--encoder", "tiny", "--times", "0.5", "--neighbours", "3"],
        ],
        "manifest": [
            ["check", data],
            ["check", data, "--full"],
            ["show", data],
            ["train", str(root / "recipe.yaml"), "--data", data, "--out", str(out), "--num-steps", "1", "--save-every", "1"],
            ["prepare", data, "--only", "features:tiny"],
            ["prepare", data, "--remove", "features:tiny"],
            ["analyse", "probe", run, "--data", data, "--times", "0.5", "--epochs", "1", "--depths", "1"],
        ],
    }  # fmt: skip
    return choices[kind][number % len(choices[kind])]


# kind -> files that are changed, as patterns below the folder
FILES = {
    "configuration": ("run/config.yaml", "run/data.json", "recipe.yaml", "run/metrics.jsonl", "run/config.yaml", "run/config.yaml"),
    "manifest": ("data/manifest.json",),
    "checkpoint": ("run/checkpoints/*/*", "run/snapshots/*/*", "run/averages/*/*"),
    "shard": ("data/*.npy", "data/*.jsonl"),
}  # fmt: skip


def changed(whole: Path, root: Path, kind: str, number: int) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    files = [path for pattern in FILES[kind] for path in sorted(root.glob(pattern)) if path.is_file()]
    path = files[number % len(files)]
    mutate_file(path, number)
    return path


def tried(whole: Path, root: Path, kind: str, number: int) -> tuple[object, str, bool]:
    """(outcome, what was said, whether a checksum should have refused it)."""
    path = changed(whole, root, kind, number)
    run, data = str(root / "run"), str(root / "data")
    same = path.read_bytes() == (whole / path.relative_to(root)).read_bytes()
    small = ["--num-images", "1", "--steps", "1", "--out", str(root / "s.npz")]
    if kind == "shard":
        train = ["train", str(root / "recipe.yaml"), "--data", data, "--out", str(root / "out"), "--num-steps", "1"]
        return *outcome(["check", data, "--full"] if number % 2 else train), not same
    if kind == "checkpoint":
        folder = path.parents[1].name
        if folder == layout.SNAPSHOTS:
            return *outcome(["ema", run, "--width", "0.07"]), not same
        if folder == layout.AVERAGES:
            return *outcome(["sample", run, "--weights", path.name.rpartition(".")[0], *small]), not same
        step = int(path.parent.name)
        if path.name == layout.STATE_FILE:
            meant = json.loads((whole / path.relative_to(root)).read_bytes())
            with contextlib.suppress(ValueError, RecursionError):
                same = json.loads(path.read_bytes()) == meant
            return *outcome(["sample", run, "--checkpoint", str(step), *small]), not same
        if number % 2:
            for other in layout.checkpoint_steps(Path(run)):
                if other != step:
                    shutil.rmtree(layout.checkpoint_folder(Path(run), other))
            return *outcome(["train", run, "--data", data, "--out", run, "--num-steps", "5"]), not same
        weights = path.name.removesuffix(layout.WEIGHTS)
        if weights in ("projectors", "optimizer"):
            weights = "ema"
            return *outcome(["report", run, "--out", str(root / "r.html")]), False
        return *outcome(["sample", run, "--weights", weights, "--checkpoint", str(step), *small]), not same
    return *outcome(commands(kind, root, number)), False


def attack(whole: Path, root: Path, kind: str, numbers: range) -> tuple[Counter, list[str]]:
    counts: Counter = Counter()
    wrong = []
    for number in numbers:
        code, said, refusable = tried(whole, root, kind, number)
        silent = refusable and code == 0
        counts["accepted although a checksum differs" if silent else code] += 1
        if silent or code not in (0, 2):
            wrong.append(f"{kind} {number}: {'taken' if silent else code}\n{said[-3000:]}")
        elif code == 2:
            lines = [line for line in said.splitlines() if line.startswith("repa: ")]
            if "every file has the bytes" not in said and len(lines) != 1:  # which begins the findings of `repa check`
                wrong.append(f"{kind} {number}: {len(lines)} sentences\n{said[-2000:]}")
        if "\x1b" in said or "\u202e" in said:
            wrong.append(f"{kind} {number}: control characters were printed\n{said[-2000:]!r}")
    return counts, wrong


@pytest.mark.parametrize("kind", FILES)
def test_changed_files_are_one_sentence(kind, whole, tmp_path):
    counts, wrong = attack(whole, tmp_path / "x", kind, range(SHORT))
    assert not wrong, "\n".join(wrong[:3])
    assert counts[2] >= 2, counts  # most changes are noticed


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_a_thousand_changed_files(kind, whole, tmp_path):
    counts, wrong = attack(whole, tmp_path / "x", kind, range(LONG))
    print(f"\n{kind}: {LONG} changed files: " + json.dumps({str(k): v for k, v in counts.items()}))
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong[:5])
