import pytest

from repa.alignment import AlignmentConfig
from repa.base.errors import UserError


def parse(**settings):
    return AlignmentConfig.parse({"target": "dinov2-b", "depth": 8, **settings})


def test_defaults_are_the_papers():
    config = parse()
    assert (config.weight, config.loss, config.projector, config.schedule, config.token_norm) == (
        0.5,
        "cosine",
        "mlp",
        "constant",
        "none",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss": "nt_xnet"},
            "Did you mean 'nt_xent'?",
        ),
        (
            {"loss": "nt_xent:temprature=0.1"},
            "'temperature'",
        ),
        ({"loss": "nt_xent:target=3"}, "no setting 'target'"),
        ({"loss": "cosine:temperature=0.1"}, "Choose axis"),
        ({"projector": "conv:kernal=3"}, "Did you mean 'kernel'?"),
        ({"projector": "mlpp"}, "Did you mean 'mlp'?"),
        ({"token_norm": "zscore:beta=1"}, "Choose alpha"),
        ({"schedule": "stop:steps=100"}, "Did you mean 'step'?"),
        ({"schedule": "linear:steps=0"}, "'linear:steps=0' is 0"),
        ({"schedule": "cosine:steps=many"}, "is 'many'"),
        ({"depth": 0}, "setting 'depth' is 0"),
        ({"weight": -0.5}, "setting 'weight' is -0.5"),
        ({"weight": float("nan")}, "setting 'weight'"),
        ({"target": " "}, "the target is empty"),
        ({"target": "dinov2-b:part=attention,layer=nine", "tap": "attention"}, "has layer='nine'"),
        ({"target": "dinov2-b:part=attention,layer=0", "tap": "attention"}, "has layer=0"),
        ({"lambda": 1}, "unknown setting 'lambda'"),
    ],
)
def test_mistakes_give_one_line_errors(settings, message):
    with pytest.raises(UserError) as error:
        parse(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_target_with_a_part_uses_the_registrys_spelling():
    """Features are stored under the registry's name, so a term with another spelling would not find them."""
    for part in ("", ":part=all", ":layer=9,part=attention"):
        attention = {"tap": "attention", "projector": "none"} if "attention" in part else {}
        config = parse(target=f"dinov2-vit-B{part}", **attention)
        assert config.target == f"dinov2-b{part}"
        assert config.encoder[0] == "dinov2-b"


def test_the_key_of_a_term_names_target_and_depth():
    assert [parse().key, parse(depth=4).key, parse(target="tiny").key] == ["dinov2-b@8", "dinov2-b@4", "tiny@8"]


def test_specs_of_private_code_are_kept_unchanged():
    assert parse(loss="my.own.loss").loss == "my.own.loss"


@pytest.mark.parametrize("name", ["repa.alignment.targets.no_such_target", "no_such_module.targets.mine"])
def test_a_missing_private_name_is_called_a_target_or_encoder(name):
    with pytest.raises(UserError, match="The target or encoder") as error:
        parse(target=name)
    assert name in str(error.value)
