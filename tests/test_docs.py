"""Names in README.md and docs/ exist, commands can be parsed, and code runs."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from repa.alignment import LOSSES, PROJECTORS, TARGETS
from repa.base.files import read_json
from repa.cli import options
from repa.cli.main import VERBS, command_of, run, trusted
from repa.data import open_data
from repa.diffusion import GUIDANCES, SAMPLERS
from repa.recipes import RECIPES
from repa.runs.checkpoint import load_projectors

ROOT = Path(__file__).parent.parent
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.is_file()]
READ = {page: page.read_text() for page in PAGES}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(text: str) -> list[list[str]]:
    """The words after `repa` of commands in fenced blocks, without comments and optional parts, with lines joined."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"[\[\]]", "", line), comments=True) if "repa" in line else []
            if words[:1] == ["repa"]:
                found.append(words[1:])
            elif "-m" in words and words[words.index("-m") + 1] == "repa":
                found.append(words[words.index("-m") + 2 :])
    return found


def defined(path: Path) -> set[str]:
    """Names of functions, classes and values at the top level of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_documentation_pages_are_found():
    assert {"architecture.md", "extending.md", "files.md", "methods.md"} <= {page.name for page in PAGES}


@pages
def test_relative_links_have_targets(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", READ[page]):
        if not re.match(r"\w+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pages
def test_named_files_exist(page):
    for path in re.findall(r"(?<![\w./-])((?:src|tests|tools|examples|benchmarks|docs)/[\w./-]+\.\w+)", READ[page]):
        assert (ROOT / path).exists(), path


@pages
def test_functions_named_by_file_exist(page):
    for path, name in re.findall(r"`(\w+/\w+\.py):(\w+)`", READ[page]):
        assert name in defined(ROOT / "src/repa" / path), f"{path}:{name}"


@pages
def test_verbs_and_recipes_exist(page):
    for verb in re.findall(r"(?:`|^|-m )repa ([a-z]+)\b", READ[page], re.M):
        assert verb in VERBS, verb
    for recipe in re.findall(r"repa train ([a-z][a-z0-9-]*)(?![\w./-])", READ[page]):
        assert recipe in RECIPES, recipe


@pages
def test_options_of_commands_exist(page):
    for verb, *arguments in commands(READ[page]):
        _, arguments = trusted(arguments)
        options.first(*command_of(verb, arguments), "")  # raises for an unknown option


def test_every_file_has_a_docstring_and_every_package_is_in_the_architecture():
    """The site's list of files shows the first lines of docstrings (tools/docs_hook.py)."""
    rooms = set(re.findall(r"^\| `(\w+)` \|", READ[ROOT / "docs/architecture.md"], re.M))
    assert rooms == {path.parent.name for path in (ROOT / "src/repa").glob("*/__init__.py")}
    for path in sorted((ROOT / "src/repa").rglob("*.py")):
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        assert first.endswith((".", "?", "!")), f"{path}: {first}"


@pytest.fixture
def mylab(tmp_path, monkeypatch):
    """The files of docs/extending.md, written where the page says."""
    for block in re.findall(r"^```python\n(.*?)^```", READ[ROOT / "docs/extending.md"], re.S | re.M):
        if name := re.match(r"# (mylab/\w+\.py)\n", block):
            path = tmp_path / name[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("mylab.test_mylab")
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


def test_the_examples_of_extending_pass_their_tests(mylab):
    tests = [test for name, test in vars(mylab).items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_private_code_trains_and_samples_by_dotted_name(mylab, data_folder, tmp_path, capsys):
    train = [
        "train", "quickstart-repa", "--data", str(data_folder), "--out", "run", "--num-steps", "2", "--batch-size", "4",
        "--preview.every", "0", "--alignments.0.target", "mylab.encoders.random_patches:dim=32",
        "--alignments.0.loss", "mylab.losses.huber:delta=0.5", "--alignments.0.projector", "linear",
        "--alignments.1.target", "mylab.terms.colours", "--alignments.1.projector", "mylab.terms.narrow:width=8",
        "--alignments.1.depth", "2", "--alignments.1.loss", "mse",
        "--alignments.2.target", "mylab.terms.two_blocks:first=2,second=4", "--alignments.2.projector", "none",
        "--alignments.2.depth", "1",
        "--alignments.3.target", "mylab.terms.centred:encoder=tiny", "--alignments.3.projector", "linear",
        "--alignments.3.depth", "1",
    ]  # fmt: skip
    assert run(train) == 0
    sample = ["sample", "run", "--num-images", "2", "--steps", "2", "--sampler", "mylab.samplers.midpoint"]
    sample += ["--guidance", "mylab.guidances.Falling:scale=3"]
    assert run([*sample, "--out", "samples.npz"]) == 0
    assert (tmp_path / "samples.npz").is_file()
    measure = ["evaluate", "samples.npz", "--reference", str(data_folder), "--features", "tiny-classifier"]
    assert run([*measure, "--metrics", "fd", "mylab.metrics.energy", "--out", "results.json"]) == 0
    assert list(read_json(tmp_path / "results.json")["metrics"]) == ["fd", "mylab.metrics.energy"]
    assert run([*train, "--alignments.0.loss", "mylab.losses.smooth_l2", "--out", "other"]) == 2
    assert "smooth_l2" in capsys.readouterr().err


def test_a_private_target_resumes_with_its_state(mylab, data_folder, tmp_path):
    train = [
        "train", "quickstart-repa", "--data", str(data_folder), "--batch-size", "4", "--preview.every", "0",
        "--alignments.0.target", "mylab.terms.centred", "--alignments.0.projector", "linear",
    ]  # fmt: skip
    for out, steps in (("whole", "2"), ("parts", "1"), ("parts", "2")):
        assert run([*train, "--out", out, "--num-steps", steps]) == 0
    whole, parts = (load_projectors(tmp_path / out, 2) for out in ("whole", "parts"))
    (mean,) = (key for key in whole if key.endswith("target.mean"))
    assert whole[mean].any()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_private_images_are_prepared(mylab, tmp_path):
    assert run(["prepare", "mylab.sources.shapes:num=6", "shapes", "--resolution", "32", "--num-workers", "0"]) == 0
    data = open_data(tmp_path / "shapes")
    assert (data.num_images, data.class_names) == (6, ("disc", "square"))


def test_private_code_trains_and_samples_when_added_to_the_tables(mylab, data_folder, tmp_path, monkeypatch):
    tables = {
        LOSSES: ("huber", "losses:huber"), TARGETS: ("colours", "terms:colours"), PROJECTORS: ("narrow", "terms:narrow"),
        SAMPLERS: ("midpoint", "samplers:midpoint"), GUIDANCES: ("falling", "guidances:Falling"),
    }  # fmt: skip
    for registry, (name, where) in tables.items():
        monkeypatch.setitem(registry.table, name, f"mylab.{where}")
    train = [
        "train", "quickstart-repa", "--data", str(data_folder), "--out", "run", "--num-steps", "2", "--batch-size", "4",
        "--preview.every", "0", "--alignments.0.target", "colours", "--alignments.0.loss", "huber:delta=0.5",
        "--alignments.0.projector", "narrow:width=8",
    ]  # fmt: skip
    assert run(train) == 0
    sample = [
        "sample",
        "run",
        "--num-images",
        "2",
        "--steps",
        "2",
        "--sampler",
        "midpoint",
        "--guidance",
        "falling:scale=3",
    ]
    assert run([*sample, "--out", "samples.npz"]) == 0
    assert (tmp_path / "samples.npz").is_file()


def test_a_private_backbone_trains_and_samples(mylab, data_folder, tmp_path):
    train = [
        "train", "quickstart-repa", "--data", str(data_folder), "--out", "run", "--num-steps", "2", "--batch-size", "4",
        "--preview.every", "0", "--alignments.0.target", "tiny", "--alignments.0.projector", "linear",
        "--model.backbone", "mylab.backbones.convolutions:width=8", "--model.patch-size", "1",
        "--model.patch-overlap", "0", "--optimizer.name", "adamw",
    ]  # fmt: skip
    assert run(train) == 0
    assert run(["sample", "run", "--num-images", "2", "--steps", "2", "--out", "samples.npz", "--trust", "mylab"]) == 0
    assert (tmp_path / "samples.npz").is_file()
