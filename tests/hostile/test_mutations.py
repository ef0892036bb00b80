"""A thousand changed configurations, manifests, checkpoints and shards give no traceback, and checksums find changes.

A short form runs in `make test`; this runs everything and prints counts:

    pytest -m slow -s tests/hostile/test_mutations.py
"""

import contextlib
import io
import json
import shutil
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from repa.base.errors import UserError, escaped
from repa.cli import main
from repa.data import FeatureCache
from repa.runs import layout
from tests.hostile.commands import outcome
from tests.hostile.mutations import mutate_file
from tests.oracles.data import noise_image

SHORT, LONG = 12, 250  # changed files of each kind


ENCODER, KEYS, ENTRIES = "an encoder", ["a", "b"], torch.arange(24.0).view(2, 3, 4)
SMALL, TEXT = ["--resolution", "8", "--num-workers", "0"], "tiny-text:tokens=4,width=8"


def annotated(folder: Path) -> None:
    """Three images with COCO annotations."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val").mkdir()
    for number in range(3):
        noise_image(number).save(folder / f"val/{number}.png")
    values = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(3)],
        "annotations": [{"id": n, "image_id": n // 2, "caption": f"picture {n}"} for n in range(5)],
    }
    (folder / "annotations/captions_val.json").write_text(json.dumps(values))


def read_cache(folder: Path) -> tuple[object, str]:
    """Like `outcome`, for a program that reads a feature cache; 1 for entries that differ from the stored ones."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about damaged files, whose entries would be computed again
            return int(not torch.equal(FeatureCache.open(folder, ENCODER)[KEYS], ENTRIES)), ""
    except UserError as error:
        return 2, f"repa: {escaped(str(error))}"
    except Exception:
        return "traceback", traceback.format_exc()


@pytest.fixture(scope="module")
def whole(tiny_config, data_folder, tmp_path_factory) -> Path:
    """A folder with data, a resumable run, its recipe, and everything that commands write into a run."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(data_folder, root / "data")
    (root / "recipe.yaml").write_text(
        tiny_config.override(num_steps=4, save_every=2, ema_widths=(0.1,), snapshot_every=2).to_yaml()
    )
    annotated(root / "coco")
    FeatureCache.open(root / "cache", ENCODER).add(KEYS, ENTRIES)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        captions = [
            "prepare",
            str(root / "coco/annotations/captions_val.json"),
            str(root / "words"),
            *SMALL,
            "--text",
            TEXT,
        ]
        assert main.run(captions) == 0, said.getvalue()
        assert (
            main.run(["train", str(root / "recipe.yaml"), "--data", str(root / "data"), "--out", str(root / "run")])
            == 0
        ), said.getvalue()
        assert main.run(["ema", str(root / "run"), "--width", "0.08"]) == 0, said.getvalue()
    return root


def commands(kind: str, root: Path, number: int) -> list[str]:
    """The command that reads the changed file."""
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


# kind -> patterns of the files to change
FILES = {
    "configuration": ("run/config.yaml", "run/data.json", "recipe.yaml", "run/metrics.jsonl", "run/config.yaml", "run/config.yaml"),
    "manifest": ("data/manifest.json",),
    "checkpoint": ("run/checkpoints/*/*", "run/snapshots/*/*", "run/averages/*/*"),
    "shard": ("data/*.npy", "data/*.jsonl"),
    "text": ("words/text*.npy", "words/*.jsonl", "words/manifest.json"),
    "annotations": ("coco/annotations/*.json",),
    "features": ("cache/*",),
}  # fmt: skip


def changed(whole: Path, root: Path, kind: str, number: int) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    files = [path for pattern in FILES[kind] for path in sorted(root.glob(pattern)) if path.is_file()]
    path = files[number % len(files)]
    mutate_file(path, number)
    return path


def tried(whole: Path, root: Path, kind: str, number: int) -> tuple[object, str, bool]:
    """(outcome, output, whether a checksum should have found the change)."""
    path = changed(whole, root, kind, number)
    run, data = str(root / "run"), str(root / "data")
    same = path.read_bytes() == (whole / path.relative_to(root)).read_bytes()
    small = ["--num-images", "1", "--steps", "1", "--out", str(root / "s.npz")]
    if kind == "features":
        return *read_cache(root / "cache"), False
    if kind == "annotations":
        text = ["--text", TEXT] if number % 2 else []
        return *outcome(["prepare", str(path), str(root / "out"), *SMALL, *text]), False
    if kind == "text":
        words = str(root / "words")
        add = ["prepare", words, "--only", "text"]
        return *outcome(["check", words, "--full"] if number % 2 else add), not same and bool(
            number % 2
        ) and path.suffix != ".json"
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
            # `repa check` prints its findings after this line
            if "all checksums match" not in said and len(lines) != 1:
                wrong.append(f"{kind} {number}: {len(lines)} sentences\n{said[-2000:]}")
        if "\x1b" in said or "\u202e" in said:
            wrong.append(f"{kind} {number}: control characters were printed\n{said[-2000:]!r}")
    return counts, wrong


@pytest.mark.parametrize("kind", FILES)
def test_changed_files_give_one_line_errors(kind, whole, tmp_path):
    counts, wrong = attack(whole, tmp_path / "x", kind, range(SHORT))
    assert not wrong, "\n".join(wrong[:3])
    assert counts[2] >= 2, counts  # most changes are found


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_a_thousand_changed_files_give_one_line_errors(kind, whole, tmp_path):
    counts, wrong = attack(whole, tmp_path / "x", kind, range(LONG))
    print(f"\n{kind}: {LONG} changed files: " + json.dumps({str(k): v for k, v in counts.items()}))
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong[:5])


@pytest.mark.parametrize(
    ("file", "entry", "argv"),
    [
        ("data/manifest.json", '"dim": 192', ["show", "ROOT/data"]),
        ("data/manifest.json", '"dim": 192', ["train", "ROOT/recipe.yaml", "--data", "ROOT/data", "--out", "ROOT/new"]),
        ("run/data.json", '"num_images": 40', ["report", "ROOT/run", "--out", "ROOT/r.html"]),
        ("run/metrics.jsonl", '"step": 3', ["report", "ROOT/run", "--out", "ROOT/r.html"]),
        ("run/metrics.jsonl", '"step": 3', ["train", "ROOT/run", "--data", "ROOT/data", "--out", "ROOT/run", "--num-steps", "5"]),
    ],
)  # fmt: skip
def test_a_changed_digit_is_found(file, entry, argv, whole, tmp_path):
    root = shutil.copytree(whole, tmp_path / "x")
    text = (root / file).read_text()
    assert entry in text
    (root / file).write_text(text.replace(entry, entry[:-1] + str((int(entry[-1]) + 1) % 10), 1))
    code, said = outcome([word.replace("ROOT", str(root)) for word in argv])
    assert code == 2, said
    assert str(root / file) in said
