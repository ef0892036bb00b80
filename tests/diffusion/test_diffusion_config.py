"""Diffusion settings: accepted values, errors, and no import of torch."""

import pytest

from repa import diffusion
from repa.base.errors import UserError
from repa.diffusion import DiffusionConfig
from repa.sampling import SampleConfig


def test_defaults_are_the_papers():
    config = DiffusionConfig()
    assert (config.path, config.prediction, config.timesteps) == ("linear", "velocity", "uniform")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"path": "liner"}, "path: .*'liner'.* 'linear'"),
        ({"path": "vp:beta_mx=3"}, "Did you mean 'beta_max'"),
        ({"prediction": "nois"}, "Did you mean 'noise'"),
        ({"timesteps": "logit_normal:sd=2"}, "no setting 'sd'"),
        ({"prediction": "x"}, "velocity, noise, data or score"),
    ],
)
def test_invalid_diffusion_settings_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        DiffusionConfig.parse(values)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cfg:scale=-1", "scale"),
        ("cfg:scale=x", "scale"),
        ("cfg:scale=2,low=0.7,high=0.2", "low <= high"),
        ("cfg:scale=2,high=1.2", "high"),
        ("cfg:scale=2,channels=-3", "channels"),
        ("cfg", "needs scale: write cfg:scale=..."),
        ("cfg:scal=2", "Did you mean 'scale'"),
        ("cgf:scale=2", "Did you mean 'cfg'"),
        ("internal:scale=2", "head"),
        ("internal:head=8.5,scale=2", "head"),
        ("autoguidance:scale=2", "--weak"),
    ],
)
def test_invalid_guidance_settings_are_refused(spec, words):
    with pytest.raises(UserError, match=words):
        SampleConfig.parse({"guidance": [spec]})


def test_guidances_are_recorded_in_one_spelling():
    given = ("cfg:high=0.70,scale=2.0,low=0", "cfg:scale=1", "internal:head=8,scale=1.4", "cfg:scale=1,streams=2")
    found = SampleConfig(guidance=given).guidance
    assert found == ("cfg:scale=2,high=0.7", "internal:head=8,scale=1.4", "cfg:scale=1,streams=2")
    assert SampleConfig(guidance=found).guidance == found


def test_settings_in_spec_strings_are_accepted():
    config = DiffusionConfig(path="vp:beta_max=10.0", timesteps="logit_normal:path=trigonometric")
    assert DiffusionConfig.parse(config.model_dump()) == config


def test_every_public_name_and_component_exists():
    for name in diffusion.__all__:
        assert getattr(diffusion, name) is not None
    for registry in (diffusion.PATHS, diffusion.TIMESTEPS, diffusion.SAMPLERS):
        for name in registry.names():
            assert callable(registry.build(registry.check(name)))
