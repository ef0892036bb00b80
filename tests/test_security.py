"""No foreign file runs code: tested for every field of the files of a run, a data folder and an exported network.

The short form tries each field with its main readers; `make test-slow` tries all readers and more texts.
"""

import copy
import functools
import importlib
import json
import operator
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import repa as repa_package
from repa.alignment import LOSSES
from repa.base import trust
from repa.base.errors import UserError
from repa.base.files import SEAL, read_json
from repa.base.registry import Registry
from repa.cli.main import run as repa
from repa.cli.train import start
from repa.data import FeatureCache, check_models, open_data
from repa.data.sources import opening
from repa.evaluation import config as evaluation_config
from repa.models import hooked, load_exported
from repa.recipes import load_recipe
from repa.report.analyses import read_analyses
from repa.report.runs import evaluation_row, read_runs
from repa.runs import load_run
from repa.training import TrainConfig
from tests.oracles.data import noise_image
from tests.report.fakes import fake_run


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """Create a module that writes a mark when it is imported or called; returns the mark's path."""
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
    monkeypatch.setenv("WANDB_MODE", "offline")  # a run may enable it
    yield mark
    sys.modules.pop("canary", None)


SMALL = ("--num-images", "2", "--steps", "2", "--batch-size", "2")
RENAMED = "a key that is renamed"


def payloads(mark):
    """Texts that would write the mark if they were run as code or as a command."""
    return (
        "canary.sing",
        f"subprocess.Popen:args=touch {mark},shell=true",
        f"pipe:touch {mark}",
        "canary.Bird:song=loud",
        "canary.sing=canary.sing",
    )


def places(values, path=()):
    """The keys of all leaf values, whatever their type, and of all encoder names."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        if isinstance(value, (dict, list)) and value:
            yield from places(value, (*path, key))
        else:
            yield (*path, key)
        if path == ("features",):
            yield (*path, key, RENAMED)


def value_at(values, path):
    return functools.reduce(operator.getitem, path, values) if path[-1] != RENAMED else RENAMED


def with_text(values, path, text):
    """A copy in which the value at this place, or its key, is replaced by the text."""
    changed = copy.deepcopy(values)
    *above, last = path[:-1] if path[-1] == RENAMED else path
    inner = changed
    for key in above:
        inner = inner[key]
    if path[-1] == RENAMED:
        inner[text] = inner.pop(last)
    else:
        inner[last] = text
    return (
        json.loads(json.dumps(changed).replace("features.tiny", f"features.{text}")) if path[-1] == RENAMED else changed
    )


def command(*words):
    """Run a command line; words that begin with ROOT/ or OUT/ are paths."""

    def call(root, out):
        return repa([word.replace("ROOT", str(root)).replace("OUT", str(out)) for word in words])

    return call


def copied(folder, *words):
    """Run a command that writes into a folder on a copy of it, OUT/COPY."""

    def call(root, out):
        shutil.copytree(root / folder, out / "copy")
        return command(*words)(root, out)

    return call


def python(function):
    """Call a reader from Python, outside any command: 0, or 2 when it refuses."""

    def call(root, out):
        try:
            function(root, out)
        except UserError:
            return 2
        return 0

    return call


def read_results(run):
    """Read a run's results like `repa report`, without drawing."""
    read_analyses(read_runs([run]))
    for file in (run / "evaluations").glob("*.json"):
        evaluation_row(file)


MEASURED = ("--reference", "ROOT/data", "--features", "tiny-classifier", "--metrics", "fd")
SHORT = ("--data", "ROOT/data", "--num-steps", "1", "--preview.every", "0")
SHOWN = ("--data", "ROOT/data", "--num-images", "16", "--times", "0.5")
RUN = {
    "sample": command("sample", "ROOT/run", *SMALL, "--out", "OUT/s.npz"),
    "train": command("train", "ROOT/run", *SHORT, "--out", "OUT/again"),
    "load_run": python(lambda root, out: load_run(root / "run")),
    "estimate": command("estimate", "ROOT/run", "--resolution", "16"),
    "init": command("train", "ROOT/recipe.yaml", *SHORT, "--out", "OUT/new", "--init", "ROOT/run"),
    "report": command("report", "ROOT/run", "--out", "OUT/page.html"),
    "continue": copied("run", "train", "OUT/copy", "--data", "ROOT/data", "--out", "OUT/copy", "--num-steps", "11"),
    "export": command("export", "ROOT/run", "OUT/exported"),
    "diffusers": command("export", "ROOT/run", "OUT/exported", "--format", "diffusers"),
    "show": command("show", "ROOT/run"),
    "evaluate": command("evaluate", "ROOT/run", *MEASURED, *SMALL, "--out", "OUT/r.json"),
    "probe": command("analyse", "probe", "ROOT/run", *SHOWN, "--epochs", "1", "--out", "OUT/p.json"),
    "cknna": command("analyse", "cknna", "ROOT/run", *SHOWN, "--neighbours", "3", "--out", "OUT/c.json"),
    "pictures": command("analyse", "pictures", "ROOT/run", "--data", "ROOT/data", "--num-images", "1", "--out", "OUT/p.png"),
    "progress": command("analyse", "progress", "ROOT/run", "--num-images", "1", "--steps", "1", "--out", "OUT/p.png"),
    "bench": command("bench", "ROOT/run", "--data", "ROOT/data", "--rounds", "1"),
    "ema": copied("run", "ema", "OUT/copy", "--width", "0.1"),
    "start": python(lambda root, out: start(load_recipe(str(root / "run")), str(root / "data"), out / "new", command="")),
}  # fmt: skip
DATA = {
    "train": command("train", "ROOT/recipe.yaml", *SHORT, "--out", "OUT/new"),
    "check": command("check", "ROOT/data", "--full"),
    "check_models": python(lambda root, out: check_models(root / "data", num=2)),
    "show": command("show", "ROOT/data"),
    "prepare": copied("data", "prepare", "OUT/copy", "--only", "features:tiny-classifier"),
    "remove": copied("data", "prepare", "OUT/copy", "--remove", "features:tiny"),
    "evaluate": command("evaluate", "ROOT/data", *MEASURED),
    "reference": command("evaluate", "reference", "ROOT/data", "--features", "tiny-classifier", "--out", "OUT/r.npz"),
    "encoders": command("analyse", "encoders", "--data", "ROOT/data", "--encoders", "tiny", "tiny-classifier",
                        "--num-images", "16", "--out", "OUT/t.json"),
    "neighbours": command("analyse", "neighbours", "ROOT/samples/s.npz", "--data", "ROOT/data", "--out", "OUT/n.json"),
    "sample": command("sample", "ROOT/run", *SMALL, "--out", "OUT/s.npz"),
}  # fmt: skip
EXPORTED = {
    "convert": command("convert", "ROOT/exported", "OUT/run"),
    "init": command("train", "ROOT/recipe.yaml", *SHORT, "--out", "OUT/new", "--init", "ROOT/exported"),
    "load": python(lambda root, out: load_exported(root / "exported")),
}  # fmt: skip
SAMPLES = {
    "sample": copied("samples", "sample", "ROOT/run", *SMALL, "--out", "OUT/copy/s.npz"),
    "evaluate": command("evaluate", "ROOT/samples/s.npz", *MEASURED),
}
CONVERTED = {
    "sample": command("sample", "ROOT/converted", *SMALL, "--out", "OUT/s.npz"),
    "export": command("export", "ROOT/converted", "OUT/exported"),
    "report": command("report", "ROOT/converted", "--out", "OUT/page.html"),
    "train": copied("converted", "train", "OUT/copy", "--data", "ROOT/data", "--out", "OUT/copy"),
}
HALF = {
    "prepare": copied("half", "prepare", "ROOT/images0", "OUT/copy", "--resolution", "16", "--features", "tiny", "--shard-size", "16")
}  # fmt: skip
RESULTS = {
    "read": python(lambda root, out: read_results(root / "run")),
    **{name: RUN[name] for name in ("report", "show")},
}
ANNOTATIONS = {
    "prepare": command("prepare", "ROOT/coco/captions_val.json", "OUT/data", "--resolution", "8", "--num-workers", "0"),
}  # fmt: skip
WORDS = {
    "check": command("check", "ROOT/words", "--full"),
    "prepare": copied("words", "prepare", "OUT/copy", "--only", "text"),
    "show": command("show", "ROOT/words"),
}
CACHE = {"open": python(lambda root, out: FeatureCache.open(root / "cache", "an encoder")["a"])}
FILES = {  # file pattern -> its readers, and how many of them the short form uses
    "run/config.yaml": (RUN, 1),
    "run/data.json": (RUN, 1),
    "run/checkpoints/*10/state.json": (RUN, 1),
    "run/evaluations/*.json": (RESULTS, 1),
    "run/analysis/cknna*.json": (RESULTS, 1),
    "run/analysis/cache/*/identity.json": ({name: RUN[name] for name in ("cknna", "probe")}, 0),
    "samples/s.json": (SAMPLES, 2),
    "converted/converted.json": (CONVERTED, 2),
    "data/manifest.json": (DATA, 1),
    "half/parts/settings.json": (HALF, 1),
    "coco/captions_val.json": (ANNOTATIONS, 1),
    "words/manifest.json": (WORDS, 0),
    "cache/cache.json": (CACHE, 1),
    "exported/config.json": (EXPORTED, 1),
}
ENDS_OTHERWISE = {("converted/converted.json", "train")}  # refused even when unchanged


def annotated(folder):
    """Two images with COCO annotations."""
    (folder / "val").mkdir(parents=True)
    for number in range(2):
        noise_image(number).save(folder / f"val/{number}.png")
    values = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(2)],
        "annotations": [{"id": n, "image_id": n, "caption": f"picture {n}"} for n in range(2)],
    }
    (folder / "captions_val.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def stranger(tiny_config, image_folder, data_folder, tmp_path_factory):
    """A run with everything that commands write into it, data, samples, incomplete data, and an exported network."""
    root = tmp_path_factory.mktemp("stranger")
    shutil.copytree(data_folder, root / "data")
    recipe = root / "recipe.yaml"
    few = {"every": 5, "num_images": 2, "num_steps": 2}
    recipe.write_text(
        tiny_config.override(preview=few, ema_widths=(0.05, 0.1), snapshot_every=5).to_yaml(), encoding="utf-8"
    )
    for call in (
        command("train", "ROOT/recipe.yaml", "--data", "ROOT/data", "--out", "ROOT/run"),
        command("export", "ROOT/run", "ROOT/exported"),
        command("convert", "ROOT/exported", "ROOT/converted"),
        command("sample", "ROOT/run", *SMALL, "--out", "ROOT/samples/s.npz"),
        command("evaluate", "ROOT/run", *MEASURED, *SMALL),
        command("analyse", "cknna", "ROOT/run", *SHOWN, "--neighbours", "3"),
    ):
        assert call(root, root) == 0
    annotated(root / "coco")
    words = (
        "prepare",
        "ROOT/coco/captions_val.json",
        "ROOT/words",
        "--resolution",
        "8",
        "--text",
        "tiny-text:tokens=4,width=8",
    )
    assert command(*words)(root, root) == 0
    FeatureCache.open(root / "cache", "an encoder").add(["a"], torch.ones(1, 2, 3))
    (root / "half/parts").mkdir(parents=True)
    manifest = read_json(root / "data/manifest.json")
    settings = {name: manifest[name] for name in ("source", "class_names", "config")}
    (root / "half/parts/settings.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.copytree(image_folder, root / image_folder.name)
    return root


class Attack:
    """Puts each text into each place of a file and calls each reader; nothing may be executed."""

    def __init__(self, stranger, canary, tmp_path, pattern):
        self.stranger, self.canary, self.tmp_path, self.pattern = stranger, canary, tmp_path, pattern
        [self.path] = stranger.glob(pattern)
        self.tries, self.refused, self.broken = 0, 0, []

    def run(self, readers, texts):
        original = self.path.read_text(encoding="utf-8")
        is_yaml = self.path.suffix == ".yaml"
        values = yaml.safe_load(original) if is_yaml else json.loads(original)
        values.pop(SEAL, None)  # an attacker would rewrite the seal
        try:
            for name, call in readers.items():  # the unchanged file must be accepted
                assert self.code(call) == 2 * ((self.pattern, name) in ENDS_OTHERWISE), (self.pattern, name)
            for place in places(values):
                for text in texts if isinstance(value_at(values, place), str) else texts[:1]:
                    changed = with_text(values, place, text)
                    self.path.write_text((yaml.safe_dump if is_yaml else json.dumps)(changed), encoding="utf-8")
                    for name, call in readers.items():
                        self.note(self.code(call), (place, text, name))
        finally:
            self.path.write_text(original, encoding="utf-8")
        return self

    def code(self, call):
        out = self.tmp_path / "out"
        out.mkdir()
        try:
            return call(self.stranger, out)
        except Exception as error:  # tests/hostile/test_mutations.py forbids it; here only execution counts
            return repr(error)
        finally:
            shutil.rmtree(out)

    def note(self, code, what):
        assert not self.canary.exists(), (self.pattern, *what)
        self.tries += 1
        self.refused += code == 2
        self.broken += [] if code in (0, 2) else [(what, code)]


@pytest.mark.parametrize("pattern", [pattern for pattern, (_, few) in FILES.items() if few])
def test_no_field_of_a_file_runs_code(pattern, stranger, canary, tmp_path):
    readers, few = FILES[pattern]
    attack = Attack(stranger, canary, tmp_path, pattern).run(dict(list(readers.items())[:few]), payloads(canary)[:1])
    assert attack.tries > 1


@pytest.mark.slow
@pytest.mark.parametrize("pattern", FILES)
def test_no_field_of_a_file_runs_code_with_any_verb(pattern, stranger, canary, tmp_path, capsys):
    attack = Attack(stranger, canary, tmp_path, pattern).run(FILES[pattern][0], payloads(canary))
    with capsys.disabled():
        print(f"{pattern}: {attack.tries:,} tries, {attack.refused:,} refused, 0 executed", *attack.broken, sep="\n  ")


def change(stranger, tmp_path, **changes):
    """A copy of the foreign run with some settings changed."""
    run = tmp_path / "run"
    shutil.copytree(stranger / "run", run)
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
    return run


def test_the_refusal_names_module_and_flag_and_the_flag_permits_it(stranger, canary, tmp_path, capsys):
    run = change(stranger, tmp_path, autoencoder="canary.sing")
    assert repa(["sample", str(run), *SMALL, "--out", str(tmp_path / "s.npz")]) == 2
    error = capsys.readouterr().err
    assert "'canary'" in error
    assert "--trust canary" in error
    assert not canary.exists()
    assert repa(["sample", str(run), *SMALL, "--out", str(tmp_path / "s.npz"), "--trust", "canary"]) == 2
    assert "must return an instance of Autoencoder, but returned NoneType" in capsys.readouterr().err
    assert canary.read_text() == "called"


def test_from_python_the_caller_is_trusted_but_files_are_not(stranger, canary, tmp_path):
    run = change(stranger, tmp_path, diffusion={"path": "canary.sing"})
    with pytest.raises(UserError, match="--trust canary"):
        load_run(run)
    run = change(stranger, tmp_path / "two", autoencoder="canary.sing")
    with pytest.raises(UserError, match="--trust canary"):
        load_run(run)
    assert not canary.exists()
    assert LOSSES.build("canary.sing").__name__ == "sing"


def test_typed_settings_and_named_recipes_are_trusted(data_folder, tiny_config, tmp_path, monkeypatch):
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
    for name in ("named", "typed"):  # a run folder is a file and not trusted, even one's own
        again = ["train", str(tmp_path / name), "--data", str(data_folder), "--out", str(tmp_path / name)]
        assert repa([*again, "--num-steps", "2"]) == 2
        assert repa([*again, "--num-steps", "2", "--trust", "privatelab"]) == 0


def registries():
    """All registries, found by their type."""
    rooms = [
        importlib.import_module(f"repa.{room.name}")
        for room in pkgutil.iter_modules(repa_package.__path__)
        if room.ispkg
    ]
    rooms += [opening, hooked, evaluation_config]  # empty registries that accept only private code
    found = {id(value): value for room in rooms for value in vars(room).values() if isinstance(value, Registry)}
    return sorted(found.values(), key=lambda registry: registry.kind)


@pytest.mark.parametrize("registry", registries(), ids=lambda registry: registry.kind)
def test_a_dotted_name_must_refer_to_an_object_of_the_right_kind(registry, canary):
    """Even in trusted modules, an object is called only if it is a function or a class of the right kind."""
    with trust.command([]):
        trust.trust("subprocess", "os", "builtins", "shutil", "canary", "threading")
        for spec in (
            f"subprocess.Popen:args=touch {canary},shell=true", "os.system", "builtins.eval", "builtins.exec", "os.path.sep",
            "canary.Bird:song=loud", "canary.Bird", "threading.Thread",
        ):  # fmt: skip
            with pytest.raises(UserError, match="must be a (function|class)"):
                registry.build(spec)
        with pytest.raises(UserError, match="has no setting 'path'|must be a class|is called with"):
            registry.build(f"shutil.rmtree:path={canary.parent}")
        assert not canary.exists() or canary.read_text() == "imported"


def test_trusting_a_module_does_not_trust_what_it_imports(canary):
    (canary.parent / "lab/helping.py").write_text("from shutil import rmtree\nfrom subprocess import Popen, run\n")
    for name in ("rmtree", "run"):
        with trust.command(["--trusted-before"]):
            trust.trust("helping")
            with pytest.raises(UserError, match="--trust (shutil|subprocess)"):
                LOSSES.build(f"helping.{name}")
        with trust.command(["--loss", f"helping.{name}"]):  # typed in full
            assert LOSSES.build(f"helping.{name}").__name__ == name


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


def test_a_matplotlibrc_in_the_current_folder_starts_no_latex(tmp_path):
    (tmp_path / "bin").mkdir()
    for program in ("latex", "pdflatex", "kpsewhich"):
        (tmp_path / "bin" / program).write_text(f"#!/bin/sh\ntouch {tmp_path / 'sang'}\nexit 1\n")
        (tmp_path / "bin" / program).chmod(0o755)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    fake_run(tmp_path / "run", distances={50: 20.0, 100: 10.0})
    path = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-m", "repa", "report", "run"], cwd=tmp_path, env=path, capture_output=True)
    assert not (tmp_path / "sang").exists()
    assert done.returncode == 0, done.stderr


def test_data_whose_file_names_leave_the_folder_is_refused(stranger, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(stranger / "data", data)
    text = json.dumps(read_json(data / "manifest.json"))  # without the seal
    for name in ("../labels-00000.npy", "/etc/passwd", "sub/../../x.npy"):
        (data / "manifest.json").write_text(text.replace("labels-00000.npy", name), encoding="utf-8")
        with pytest.raises(UserError):
            open_data(data)


@pytest.mark.parametrize("name", ["text", "text_weights"])
def test_a_private_text_encoder_named_by_a_folder_is_not_run(name, stranger, canary, tmp_path):
    data = tmp_path / "words"
    shutil.copytree(stranger / "words", data)
    manifest = read_json(data / "manifest.json")
    for text in payloads(canary):
        manifest["config"][name] = text
        (data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for words in (("check", str(data), "--full"), ("prepare", str(data), "--only", "text"), ("show", str(data))):
            assert repa(list(words)) in (0, 2)
            assert not canary.exists()


def test_pickles_are_not_read(tmp_path):
    class Sings:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sang",))

    torch.save({"ema": Sings()}, tmp_path / "bad.pt")
    assert repa(["convert", str(tmp_path / "bad.pt"), str(tmp_path / "run")]) == 2
    assert not (tmp_path / "sang").exists()
