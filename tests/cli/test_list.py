"""`repa list` and `repa show` describe every name."""

import re

import pytest
import yaml

from repa.base.errors import FITS, choices
from repa.cli import main, options
from repa.cli.list import KINDS, REGISTRIES, kinds
from repa.cli.main import command_of
from repa.cli.show import shown_names
from repa.encoders import ENCODERS, load_encoder
from repa.encoders.families import GRID, PACKAGED, facts_of
from repa.recipes import RECIPES, load_recipe
from repa.training.config import TrainConfig


@pytest.fixture
def printed(capsys):
    def run(*argv: str) -> str:
        assert main.run([*argv]) == 0
        return capsys.readouterr().out

    return run


def test_every_kind_describes_its_names(printed):
    assert set(KINDS) == set(kinds()) > set(REGISTRIES)
    shown = {line.partition(" ")[0]: line for line in printed("list").splitlines()}
    for kind, (_, taken) in KINDS.items():
        assert shown[kind].endswith(f"  {taken}")
        verb, *options_of_it = taken.split()
        for flag in options_of_it:
            options.annotation(command_of(verb, [])[0], flag[2:])  # raises for an unknown option
    for kind, registry in REGISTRIES.items():
        lines = printed("list", kind).splitlines()
        for name in registry:
            line = next(line for line in lines if line.split(" ")[0] == name)
            assert len(line.split()) > 2, f"{kind}: {line}"


def test_encoders_are_listed_with_licence_and_requirements(printed):
    lines = printed("list", "encoders").splitlines()
    row = next(line for line in lines if line.startswith("dinov2-b "))
    assert row.split() == ["dinov2-b", "768", "224", "16", "x", "16", "Apache", "2.0", "facebook/dinov2-base"]
    above = [line for line in lines[: lines.index(row)] if line.startswith("#")][-1]
    assert "repa[encoders]" in above


@pytest.mark.parametrize("name", PACKAGED)
def test_listed_facts_match_the_network(name):
    encoder, facts = load_encoder(name), facts_of(name)
    assert (encoder.dim, encoder.patch_size, encoder.grid_for(256)) == (facts.dim, facts.patch, facts.grid)
    assert facts.pixels == facts.grid * facts.patch
    assert facts_of("dinov2-b").grid == GRID


def test_the_documentation_page_lists_the_same_licences(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "encoders.md").read_text()
    for line in re.findall(r"^\| `.*\|$", page, re.MULTILINE):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7:
            name = re.findall(r"`([^`]+)`", cells[0])[0]
            assert facts_of(name).licence in cells[6], line


def test_show_describes_an_encoder(printed):
    shown = printed("show", "dinov2-vit-b")  # the spelling of the reference code
    assert "facebook/dinov2-base" in shown
    assert "768" in shown
    assert 'pip install "repa[encoders]"' in shown
    assert "--alignments.0.target dinov2-b" in shown
    assert "--features tiny-classifier" in printed("show", "tiny-classifier")


def test_a_name_of_two_kinds_shows_both(printed):
    shown = printed("show", "cosine")
    assert "loss cosine" in shown
    assert "weight schedule cosine" in shown
    assert "cosine:steps=400000 (the defaults)" in shown
    assert "cosine:axis=channels,margin=0.0 (the defaults)" in shown


def test_every_listed_name_can_be_shown(printed):
    for name in shown_names():
        assert printed("show", name).strip(), name
    assert "dinov2-b" in shown_names()
    assert set(ENCODERS) < set(shown_names())


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_the_configuration_that_show_prints_is_the_recipe(name, every, printed):
    text = printed("show", name, *["--all"] * every)
    assert TrainConfig.parse(yaml.safe_load(text)) == load_recipe(name)


def test_show_prints_changed_and_important_settings(printed, random_run):
    lines = printed("show", "sit-xl2-repa").splitlines()
    assert {"- target: dinov2-b", "  loss: cosine", "  weight: 0.5", "batch_size: 256"} <= set(lines)
    assert not any("qk_norm" in line for line in lines)
    assert re.search(r"^  qk_norm: none +# Normalisation ", printed("show", "sit-xl2-repa", "--all"), re.M)
    assert "- target: tiny" in printed("show", str(random_run)).splitlines()
    assert re.search(r"^  sampler: heun +# Sampler", printed("show", str(random_run), "--all"), re.M)


def test_show_needs_no_trust_for_a_run(printed, tmp_path):
    (tmp_path / "config.yaml").write_text("lora: 3\nmodel: {backbone: mylab.nets.unet}\nmine: {a: 1}\n")
    lines = printed("show", str(tmp_path)).splitlines()
    assert {"lora: 3", "  backbone: mylab.nets.unet", "mine: {a: 1}"} <= set(lines)


def test_rows_are_wrapped_to_the_terminals_width(monkeypatch, printed):
    whole = printed("list", "losses")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed("list", "losses").splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()) == " ".join(whole.split())


def test_the_nearest_name_comes_before_a_long_list():
    many = [f"name-{number}" for number in range(100)]
    assert choices("name-77x", many, "repa list x") == ". Did you mean 'name-77'? `repa list x` prints all 100."
    cut = choices("qqq", many, "repa list x")
    assert cut.startswith(". Choose name-0, name-1, ")
    assert cut.endswith(", ... `repa list x` prints all 100.")
    assert len(cut) < FITS + 60
    assert choices("b", ["a", "c"]) == ". Choose a or c."
    assert choices("bb", ["aa", "ba"]) == ". Choose aa or ba. Did you mean 'ba'?"
    assert choices("temp", ["temperature"]) == ". Did you mean 'temperature'?"
    assert choices("x", []) == ". There are none."


def test_a_setting_without_a_default_is_shown_open(printed):
    assert "written as block:depth=...\n" in printed("show", "block")
