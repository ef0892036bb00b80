import contextlib
import sys
import textwrap

import pytest
import torch

from repa.alignment import LOSSES, SCHEDULES, TARGETS
from repa.base.errors import UserError
from repa.base.registry import Registry, parse_spec
from repa.conditions import TEXT_ENCODERS
from repa.diffusion import SAMPLERS, TIMESTEPS
from repa.encoders import ENCODERS
from repa.models.hooked import NETS


def test_specs_hold_literals_and_text():
    name, settings = parse_spec("name:a=0.07,b=3,c=none,d=true,e=-1e-3")
    assert name == "name"
    assert settings == {"a": 0.07, "b": 3, "c": "none", "d": True, "e": -1e-3}


@pytest.mark.parametrize("spec", ["name:temperature", "name:=3", "name:a b=3"])
def test_unreadable_settings_are_refused(spec):
    with pytest.raises(UserError, match="cannot be read"):
        parse_spec(spec)


def test_building_binds_a_functions_settings_and_instantiates_classes():
    table = Registry("thing", {"isclose": "math:isclose", "fraction": "fractions:Fraction"})
    assert table.build("isclose:rel_tol=0.5")(1.0, 1.4)
    assert not table.build("isclose")(1.0, 1.4)
    assert table.build("fraction:numerator=3,denominator=6") == 0.5


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="sampler 'huen'.*Did you mean 'heun'"):
        SAMPLERS.check("huen")


def test_unknown_settings_are_refused_before_anything_is_imported():
    with pytest.raises(UserError, match="no setting 'lats'.*Did you mean 'last'"):
        SAMPLERS.check("euler_maruyama:lats=0.04")
    assert SAMPLERS.check("euler_maruyama:last=0.04") == "euler_maruyama:last=0.04"


@pytest.mark.parametrize(
    ("spec", "is_right"),
    [("nt_xent:temperature=1", True), ("nt_xent:temperature=0", False), ("nt_xent:temperature=true", False),
     ("nt_xent:temperature=1e999", False), ("attention_ce:heads=2.0", False), ("gram:norm=l1,margin=0", True),
     ("gram:norm=l2", False)],
)  # fmt: skip
def test_setting_values_must_match_their_annotations(spec, is_right):
    """Checked against the source when a configuration is read, and against the signature when the object is built."""
    for read in (LOSSES.check, LOSSES.build):
        with contextlib.nullcontext() if is_right else pytest.raises(UserError, match=" is "):
            read(spec)


def test_a_text_setting_may_look_like_a_number():
    assert TARGETS.check("run:path=2024,depth=3") == "run:path=2024,depth=3"


def test_a_missing_required_setting_is_found_when_the_configuration_is_read():
    registry = Registry("target", {"block": "repa.alignment.targets:block"})
    for read in (registry.check, registry.build):
        with pytest.raises(UserError, match="block:depth="):
            read("block")


class Scaled:
    def __init__(self, factor, *, offset=0.0, **others):
        self.factor, self.offset = factor, offset

    def __call__(self, x):
        return self.factor * x + self.offset


def test_settings_of_classes_are_checked_before_construction(monkeypatch):
    """For registered and for private classes, because Python's TypeError would give a traceback."""
    monkeypatch.setitem(sys.modules, "mylab", sys.modules[__name__])
    monkeypatch.setattr(Scaled, "__module__", "mylab")
    for table, name in ((Registry("thing", {"scaled": f"{__name__}:Scaled"}), "scaled"),
                        (Registry("thing", {}, base="callable"), "mylab.Scaled")):  # fmt: skip
        assert table.build(f"{name}:factor=2,offset=1")(3) == 7
        with pytest.raises(UserError, match="needs factor"):
            table.build(name)
        with pytest.raises(UserError, match="no setting 'ofset'"):
            table.build(f"{name}:factor=2,ofset=1")


def test_private_code_is_built_by_its_dotted_name():
    table = Registry("thing", {})
    assert table.build("textwrap.dedent") is textwrap.dedent
    with pytest.raises(UserError, match="cannot be imported"):
        table.build("no_such_package.thing")


def right(x, n, draw=None, *, power): ...


def too_few(x): ...


def too_many(x, n, draw, extra): ...


def other_name(x, n, noise): ...


def test_private_functions_with_other_arguments_are_refused():
    table = Registry("thing", {}, takes=("x", "n"), takes_named=("draw",))
    assert table.load(f"{__name__}.right") is right
    for name in ("too_few", "too_many", "other_name"):
        with pytest.raises(UserError, match=rf"{name}' takes \(x.*is called with \(x, n, draw\): change its arguments"):
            table.load(f"{__name__}.{name}")
    assert Registry("thing", {}).load(f"{__name__}.too_few") is too_few


class Called:
    def __call__(self, x): ...


def test_private_classes_whose_instances_take_other_arguments_are_refused():
    assert Registry("thing", {}, base="callable", takes=("x",)).load(f"{__name__}.Called") is Called
    with pytest.raises(UserError, match=r"Called.__call__' takes \(self, x\), but is called with \(self, x, n\)"):
        Registry("thing", {}, base="callable", takes=("x", "n")).load(f"{__name__}.Called")


@pytest.mark.parametrize("registry", [TARGETS, ENCODERS, TEXT_ENCODERS, NETS, TIMESTEPS, SCHEDULES, SAMPLERS])
def test_every_kind_of_private_code_is_refused_with_other_arguments(registry):
    with pytest.raises(UserError, match=f"The {registry.kind} .* takes \\(\\), but is called with"):
        registry.load(f"{__name__}.test_a_setting_that_is_given_twice_is_refused")


@pytest.mark.parametrize(
    ("value", "shape", "sentence"),
    [
        (None, (2,), r"must return things of shape \(2,\), but returned NoneType"),
        (torch.zeros(1), (2,), r"must return things of shape \(2,\), but returned \(1,\)"),
        ("1", (), "must return things, but returned str"),
        (torch.zeros(1), (), r"must return things, but returned \(1,\)"),
    ],
)
def test_a_returned_value_of_another_shape_is_refused(value, shape, sentence):
    with pytest.raises(UserError, match=f"The thing 'own.f' {sentence}"):
        Registry("thing", {}).returned("own.f", value, shape, "things")


@pytest.mark.parametrize(("value", "shape"), [(torch.zeros(2), (2,)), (0.5, ()), (1, ()), (torch.tensor(0.5), ())])
def test_a_returned_value_of_the_right_shape_is_passed_on(value, shape):
    assert Registry("thing", {}).returned("own.f", value, shape, "things") is value


def test_a_setting_that_is_given_twice_is_refused():
    with pytest.raises(UserError, match="'cfg:scale=2,low=0,scale=3' has the setting 'scale' twice: remove one"):
        parse_spec("cfg:scale=2,low=0,scale=3")


@pytest.mark.parametrize("sign", ["-", "~", "not "])
def test_a_value_that_is_nested_without_end_is_plain_text(sign):
    """Such a spec may come from the configuration of a stranger's run."""
    for number in (3_000, 100_000):
        value = sign * number + "1"
        assert parse_spec(f"cfg:scale={value}")[1] == {"scale": value}
