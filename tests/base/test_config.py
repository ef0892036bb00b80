from typing import Annotated

import pytest
import yaml
from pydantic import Field

from repa.base.config import Config, difference
from repa.base.errors import UserError


class Inner(Config):
    depth: int = Field(2, ge=1)
    """Depth."""
    target: str = "tiny"
    """Target."""


class Outer(Config):
    rate: float = Field(1e-4, gt=0)
    """Rate."""
    inner: Inner = Inner()
    """Inner."""
    several: tuple[Inner, ...] = ()
    """Several."""


def test_configurations_round_trip_through_yaml(tmp_path):
    config = Outer(rate=3e-5, several=(Inner(depth=3), Inner(target="other")))
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml())
    assert Outer.load(path) == config


@pytest.mark.parametrize("number", ["010", "0x8", "0b11", "1_000", "1:30", "1:30.5", "1_0.5", "1.0_5"])
def test_numbers_that_are_not_decimal_are_refused(number, tmp_path):
    """YAML 1.1 reads them as other numbers: 010 is 8, and 1:30.5 is 90.5."""
    (tmp_path / "c.yaml").write_text(f"rate: {number}\n")
    with pytest.raises(UserError, match=f"line 1: '{number}' is not a decimal number"):
        Outer.load(tmp_path / "c.yaml")


def test_yaml_reads_exponents_without_a_point(tmp_path):
    (tmp_path / "c.yaml").write_text("rate: 1e-3\n")  # PyYAML alone reads this as text
    assert Outer.load(tmp_path / "c.yaml").rate == 0.001


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"rat": 1}, ["'rat'", "rate", "Did you mean 'rate'?"]),
        ({"inner": {"dept": 1}}, ["'inner.dept'", "depth", "Did you mean 'depth'?"]),
        ({"several": [{}, {"dephth": 1}]}, ["'several.1.dephth'", "Did you mean 'depth'?"]),
        ({"rate": -1}, ["'rate'", "-1", "greater than 0"]),
        ({"inner": {"depth": "deep"}}, ["'inner.depth'", "'deep'", "whole number"]),
        ({"rate": None}, ["'rate'", "None"]),
    ],
)
def test_errors_name_the_field_its_value_and_what_is_allowed(values, wanted):
    with pytest.raises(UserError) as error:
        Outer.parse(values)
    message = str(error.value)
    assert "\n" not in message
    for part in wanted:
        assert part in message
    with pytest.raises(UserError) as in_python:
        Outer(**values)
    assert str(in_python.value) == message


def test_a_configuration_takes_its_settings_by_name():
    with pytest.raises(UserError, match=r"Outer takes settings by name: write Outer\(name=value\), or Outer.load"):
        Outer(1e-4)


def test_booleans_are_not_accepted_as_numbers(tmp_path):
    class Numbers(Config):
        count: int = 1
        rates: tuple[Annotated[float, Field(ge=0)], ...] = ()
        is_fast: bool = False

    assert Numbers.parse({"count": 2, "rates": [1], "is_fast": True}).is_fast
    for values in ({"count": True}, {"rates": [0.5, False]}):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(UserError, match=f"{next(iter(values))}: expected a number"):
            Numbers.load(tmp_path / "c.yaml")


def test_broken_files_give_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="no configuration file"):
        Outer.load(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("rate: [1, 2\n")
    with pytest.raises(UserError, match=r"broken\.yaml cannot be read as YAML"):
        Outer.load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must hold a mapping"):
        Outer.load(tmp_path / "list.yaml")


def test_a_huge_configuration_file_is_refused(tmp_path):
    (tmp_path / "large.yaml").write_text("#" * (2**20 + 1))
    with pytest.raises(UserError, match="at most 131,072 bytes"):
        Outer.load(tmp_path / "large.yaml")


def test_configurations_are_frozen_and_override_validates():
    config = Outer()
    with pytest.raises(ValueError):
        config.rate = 1.0
    assert config.override(rate=0.5).rate == 0.5
    with pytest.raises(UserError, match="rate"):
        config.override(rate=0)


def test_difference_names_every_changed_leaf():
    a = Outer(several=(Inner(),))
    b = Outer(rate=1.0, several=(Inner(depth=5), Inner()))
    lines = difference(a, b)
    assert "rate: 0.0001 -> 1.0" in lines
    assert "several.0.depth: 2 -> 5" in lines
    assert any(line.startswith("several.1.depth: (none)") for line in lines)
    assert difference(a, a) == []
