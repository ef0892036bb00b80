"""No file that a stranger made runs code: every text of every file of a run, a data folder and an exported network, every verb.

The short form tries each field with the verbs that read it most; `make test-slow` tries each with all.
"""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from repa.alignment import LOSSES
from repa.base import trust
from repa.base.errors import UserError
from repa.cli.main import run as repa
from repa.data import open_data
from repa.runs import load_run
from repa.training import TrainConfig

PAYLOADS = ("canary.sing", "canary.Bird:song=loud", "canary:sing")
SMALL = ["--num-images", "2", "--steps", "2", "--batch-size", "2"]


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported or called; gives the mark's path."""
    mark = tmp_path / "sang"
    lab = tmp_path / "lab"
    lab.mkdir()
    text = f"""
from pathlib import Path
Path({str(mark)!r}).write_text("imported")
def sing(*args, **kwargs):
    Path({str(mark)!r}).write_text("called")
class Bird:
    def __init__(self, *args, **kwargs):
        Path({str(mark)!r}).write_text("built")
"""
    (lab / "canary.py").write_text(text)
    monkeypatch.syspath_prepend(str(lab))
    monkeypatch.setenv("WANDB_MODE", "offline")  # a run may ask for it
    yield mark
    sys.modules.pop("canary", None)


def places(values, path=()):
    """Every text in a document, by the keys that lead to it."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        if isinstance(value, str):
            yield (*path, key)
        else:
            yield from places(value, (*path, key))


def with_text(values, path, text):
    changed = copy.deepcopy(values)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = text
    return changed


@pytest.fixture(scope="module")
def stranger(random_run, data_folder, tmp_path_factory):
    """A run, its data and its exported network, as they would be downloaded."""
    root = tmp_path_factory.mktemp("stranger")
    shutil.copytree(random_run, root / "run")
    shutil.copytree(data_folder, root / "data")
    assert repa(["export", str(root / "run"), str(root / "exported")]) == 0
    return root


RUN_VERBS = {
    "sample": lambda r, o: ["sample", r / "run", *SMALL, "--out", o / "s.npz"],
    "train": lambda r, o: ["train", r / "run", "--data", r / "data", "--out", o / "again", "--num-steps", "1"],
    "continue": lambda r, o: ["train", r / "run", "--data", r / "data", "--out", r / "run", "--num-steps", "21"],
    "init": lambda r, o: ["train", "quickstart", "--data", r / "data", "--out", o / "tuned", "--init", r / "run"],
    "report": lambda r, o: ["report", r / "run", "--out", o / "page.html"],
    "estimate": lambda r, o: ["estimate", r / "run"],
    "export": lambda r, o: ["export", r / "run", o / "out"],
    "show": lambda r, o: ["show", r / "run"],
    "evaluate": lambda r, o: [
        "evaluate", r / "run", "--reference", r / "data", "--features", "tiny-judge", "--num-images", "2", "--steps", "2"
    ],
    "probe": lambda r, o: ["analyse", "probe", r / "run", "--data", r / "data", "--out", o / "probe"],
    "cknna": lambda r, o: ["analyse", "cknna", r / "run", "--data", r / "data", "--encoder", "tiny", "--out", o / "c"],
    "pictures": lambda r, o: ["analyse", "pictures", r / "run", "--data", r / "data", "--out", o / "p"],
    "bench": lambda r, o: ["bench", r / "run", "--rounds", "1"],
    "ema": lambda r, o: ["ema", r / "run", "--width", "0.1"],
}  # fmt: skip
DATA_VERBS = {
    "train": lambda r, o: [
        "train", "quickstart", "--data", r / "data", "--out", o / "new", "--num-steps", "1", "--model.depth", "1",
        "--model.hidden-dim", "8", "--model.num-heads", "2", "--preview.every", "0", "--batch-size", "4",
    ],
    "check": lambda r, o: ["check", r / "data", "--full"],
    "show": lambda r, o: ["show", r / "data"],
    "prepare": lambda r, o: ["prepare", r / "data", r / "data", "--features", "tiny"],
    "evaluate": lambda r, o: ["evaluate", r / "data", "--reference", r / "data", "--features", "tiny-judge"],
    "encoders": lambda r, o: ["analyse", "encoders", r / "data", "--encoders", "tiny", "--out", o / "table"],
}  # fmt: skip
EXPORT_VERBS = {
    "convert": lambda r, o: ["convert", r / "exported", o / "run"],
    "init": lambda r, o: ["train", "quickstart", "--data", r / "data", "--out", o / "tuned", "--init", r / "exported"],
}
FILES = {
    "run/config.yaml": (RUN_VERBS, ("sample", "train", "init", "report", "estimate")),
    "run/data.json": (RUN_VERBS, ("sample", "report", "export")),
    "data/manifest.json": (DATA_VERBS, ("train", "check", "show")),
    "exported/config.json": (EXPORT_VERBS, ("convert", "init")),
}


def attack(stranger, canary, tmp_path, file, verbs):
    """Put each payload into each text of a file and run each verb; gives the number of tries."""
    path = stranger / file
    original = path.read_text(encoding="utf-8")
    load, dump = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    values, tries = load(original), 0
    try:
        for place in places(values):
            for payload in PAYLOADS[: 1 if len(verbs) < 6 else None]:
                for verb in verbs:
                    out = tmp_path / f"out{tries}"
                    out.mkdir()
                    path.write_text(dump(with_text(values, place, payload)), encoding="utf-8")
                    code = repa([str(token) for token in FILES[file][0][verb](stranger, out)])
                    tries += 1
                    assert not canary.exists(), (file, place, payload, verb)
                    assert code in (0, 2), (file, place, payload, verb)
                    shutil.rmtree(out)
    finally:
        path.write_text(original, encoding="utf-8")
    return tries


@pytest.mark.parametrize("file", FILES)
def test_no_field_of_a_file_runs_code(file, stranger, canary, tmp_path, capsys):
    assert attack(stranger, canary, tmp_path, file, FILES[file][1]) > 5


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_no_field_of_a_file_runs_code_whatever_the_verb(file, stranger, canary, tmp_path, capsys):
    tries = attack(stranger, canary, tmp_path, file, tuple(FILES[file][0]))
    with capsys.disabled():
        print(f"{file}: {tries} tries, 0 executed")


def change(stranger, tmp_path, **changes):
    """A copy of the stranger's run with some settings changed."""
    run = tmp_path / "run"
    shutil.copytree(stranger / "run", run)
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
    return run


def test_the_refusal_names_module_and_flag_and_the_flag_is_enough(stranger, canary, tmp_path, capsys):
    run = change(stranger, tmp_path, autoencoder="canary.sing")
    assert repa(["sample", str(run), *SMALL, "--out", str(tmp_path / "s.npz")]) == 2
    error = capsys.readouterr().err
    assert "'canary'" in error
    assert "--trust canary" in error
    assert not canary.exists()
    with pytest.raises(AttributeError):  # what sing gives is no autoencoder
        repa(["sample", str(run), *SMALL, "--out", str(tmp_path / "s.npz"), "--trust", "canary"])
    assert canary.read_text() == "called"


def test_in_python_a_file_is_not_trusted_but_the_caller_is(stranger, canary, tmp_path):
    run = change(stranger, tmp_path, diffusion={"path": "canary.sing"})
    with pytest.raises(UserError, match="--trust canary"):
        load_run(run)
    run = change(stranger, tmp_path / "two", autoencoder="canary.sing")
    with pytest.raises(UserError, match="--trust canary"):
        load_run(run)
    assert not canary.exists()
    assert LOSSES.build("canary.sing").__name__ == "sing"


def test_what_the_user_typed_or_named_as_a_recipe_is_trusted(data_folder, tiny_config, tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/privatelab.py").write_text(
        "def far(student, target):\n    return (student - target).square().mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "lab"))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(tiny_config.to_yaml().replace("loss: cosine", "loss: privatelab.far"), encoding="utf-8")
    assert "privatelab.far" in recipe.read_text(encoding="utf-8")
    train = ["--data", str(data_folder), "--num-steps", "1"]
    assert repa(["train", str(recipe), *train, "--out", str(tmp_path / "named")]) == 0
    plain = tmp_path / "plain.yaml"
    plain.write_text(tiny_config.to_yaml(), encoding="utf-8")
    assert (
        repa(["train", str(plain), *train, "--out", str(tmp_path / "typed"), "--alignments.0.loss", "privatelab.far"])
        == 0
    )
    for name in ("named", "typed"):  # a run folder is a file's word, even one's own
        again = ["train", str(tmp_path / name), "--data", str(data_folder), "--out", str(tmp_path / name)]
        assert repa([*again, "--num-steps", "2"]) == 2
        assert repa([*again, "--num-steps", "2", "--trust", "privatelab"]) == 0


def test_what_a_name_stands_for_must_be_of_the_kind(monkeypatch):
    with trust.command([]):
        trust.trust("subprocess", "os", "builtins")
        for spec in ("subprocess.Popen:args=ls,shell=true", "os.system", "builtins.eval", "os.path.sep"):
            with pytest.raises(UserError, match="must be a function"):
                LOSSES.build(spec)
        with pytest.raises(UserError, match="has no setting 'ignore_errors'"):
            trust.trust("shutil")
            LOSSES.build("shutil.rmtree:ignore_errors=true")


def test_validation_builds_nothing(canary):
    with trust.command([]):
        trust.trust("canary")
        TrainConfig.parse({"alignments": [{"target": "tiny", "depth": 1, "schedule": "canary.sing"}]})
    assert not canary.exists()


@pytest.mark.parametrize("name", ["csv", "yaml", "torch", "repa_plugin", "tensorboard"])
def test_modules_in_the_current_folder_are_not_imported(name, tmp_path):
    (tmp_path / f"{name}.py").write_text("from pathlib import Path\nPath('sang').write_text('imported')\n")
    subprocess.run([sys.executable, "-m", "repa", "list", "losses"], cwd=tmp_path, capture_output=True, check=True)
    assert not (tmp_path / "sang").exists()


def test_data_with_names_that_leave_their_folder_are_refused(stranger, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(stranger / "data", data)
    text = (data / "manifest.json").read_text(encoding="utf-8")
    for name in ("../labels-00000.npy", "/etc/passwd", "sub/../../x.npy"):
        (data / "manifest.json").write_text(text.replace("labels-00000.npy", name), encoding="utf-8")
        with pytest.raises(UserError):
            open_data(data)


def test_pickles_are_not_read(tmp_path):
    class Sings:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sang",))

    torch.save({"ema": Sings()}, tmp_path / "bad.pt")
    assert repa(["convert", str(tmp_path / "bad.pt"), str(tmp_path / "run")]) == 2
    assert not (tmp_path / "sang").exists()
