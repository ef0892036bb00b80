"""Running a DDT's encoder only on some evaluations of a sampler."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from repa.autoencoders import load_autoencoder
from repa.base.errors import UserError
from repa.diffusion.config import DiffusionConfig
from repa.models import DDT, DDTOptions, DiT
from repa.models.layers import BlockOptions
from repa.runs import LoadedRun
from repa.sampling import SampleConfig, generate
from repa.sampling.inputs import shared_evaluations
from repa.sampling.samples import prepared
from tests import golden

SIZES = {
    "latent_size": 8,
    "latent_channels": 3,
    "patch_size": 4,
    "hidden_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 2,
}


def run_of(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return LoadedRun(model.eval(), DiffusionConfig(), load_autoencoder("pixels"), 1, "ema", ("a", "b"))


@pytest.fixture
def run():
    return run_of(DDT(DDTOptions(head_depth=1), BlockOptions("rms", "swiglu"), **SIZES, heads=(1,)))


def config(**changes):
    return SampleConfig.parse({"sampler": "euler", "steps": 6, "precision": "fp32", **changes})


def test_encoder_evaluations_equal_those_of_the_released_code():
    i = torch.arange(72, dtype=torch.float64)
    states = torch.sin(0.37 * i + 0.2).reshape(12, 6).cumsum(0) + torch.sin(0.05 * i + 1).reshape(12, 6)
    units = torch.nn.functional.normalize(states, dim=1)
    for count, expected in golden.load("ddt_sharing")["expected"].items():
        assert shared_evaluations((1 - units @ units.T).numpy(), int(count)) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_chosen_evaluations_have_the_lowest_cost(count):
    errors = np.random.default_rng(0).random((7, 7)) * (1 - np.eye(7))

    def cost(chosen):
        return sum(errors[max(i for i in chosen if i <= j), j] for j in range(7))

    best = min(cost((0, *rest)) for rest in itertools.combinations(range(1, 7), count - 1))
    assert cost(shared_evaluations(errors, count)) == pytest.approx(best)


@pytest.mark.parametrize("guidance", [(), ("cfg:scale=2,high=0.7",)])
def test_the_encoder_runs_as_often_as_configured(run, guidance):
    calls = []
    given = config(guidance=guidance, encoder_steps=2)
    shared = prepared(run, given)
    run.model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    images = generate(shared, given, range(3)).images
    further = 1 if guidance else 0  # when guidance starts, the batch size changes and the encoder must run again
    assert 2 <= len(calls) <= 2 + further
    assert len(shared.identity["encoder_evaluations"]) == 2
    assert torch.equal(generate(shared, given, range(3)).images, images)  # no state remains from the first sampling
    assert not torch.equal(generate(run, config(guidance=guidance), range(3)).images, images)


def test_encoding_at_every_step_equals_no_sharing(run):
    given = config(encoder_steps=6)
    assert torch.equal(generate(prepared(run, given), given, range(2)).images, generate(run, config(), range(2)).images)


def test_unsupported_settings_are_refused(run):
    with pytest.raises(UserError, match="shares the encoder of a DDT, but this run has a DiT"):
        prepared(run_of(DiT(**SIZES)), config(encoder_steps=2))
    with pytest.raises(UserError, match="internal guidance"):
        prepared(run, config(encoder_steps=2, guidance=("internal:head=1,scale=1.4",)))
    with pytest.raises(UserError, match="dopri5"):
        prepared(run, config(encoder_steps=2, sampler="dopri5"))
    with pytest.raises(UserError, match="makes only 6 evaluations"):
        prepared(run, config(encoder_steps=7))
    assert prepared(replace(run), config()).sharing is None
