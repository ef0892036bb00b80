"""Settings of the diffusion room: what they accept, what they say, and that they do not need torch."""

import subprocess
import sys

import pytest

from repa import diffusion
from repa.base.errors import UserError
from repa.diffusion import DiffusionConfig, GuidanceConfig


def test_defaults_are_the_papers():
    config = DiffusionConfig()
    assert (config.path, config.prediction, config.timesteps) == ("linear", "velocity", "uniform")
    assert (GuidanceConfig().scale, GuidanceConfig().interval, GuidanceConfig().channels) == (1.0, (0.0, 1.0), 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"path": "liner"}, "path: Unknown path 'liner': allowed are linear, trigonometric, vp. Did you mean 'linear'"),
        ({"path": "vp:beta_mx=3"}, "Did you mean 'beta_max'"),
        ({"prediction": "nois"}, "Did you mean 'noise'"),
        ({"timesteps": "logit_normal:sd=2"}, "no setting 'sd'"),
        ({"prediction": "x"}, "velocity, noise, data, score"),
    ],
)
def test_mistakes_in_diffusion_are_one_sentence(values, words):
    with pytest.raises(UserError, match=words):
        DiffusionConfig.parse(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"interval": (0.7, 0.2)}, "interval: .*low <= high"),
        ({"interval": (0.0, 1.2)}, "interval"),
        ({"channels": -3}, "channels"),
    ],
)
def test_mistakes_in_guidance_are_one_sentence(values, words):
    with pytest.raises(UserError, match=words):
        GuidanceConfig.parse(values)


def test_settings_in_spec_strings_are_accepted():
    config = DiffusionConfig(path="vp:beta_max=10.0", timesteps="logit_normal:path=trigonometric,shift=2.0")
    assert DiffusionConfig.parse(config.model_dump()) == config


def test_every_public_name_and_component_exists():
    for name in diffusion.__all__:
        assert getattr(diffusion, name) is not None
    for registry in (diffusion.PATHS, diffusion.TIMESTEPS, diffusion.SAMPLERS):
        for name in registry.names():
            assert callable(registry.build(registry.check(name)))


def test_configuration_is_torch_free():
    code = (
        "import sys; from repa.diffusion.config import DiffusionConfig as D; D(path='vp:beta_max=3.0'); "
        "from repa.diffusion import SAMPLERS; SAMPLERS.check('ddim:eta=1'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "src"}, check=False).returncode == 0
