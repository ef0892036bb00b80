"""Averages against their definition as sums, and skipped steps."""

import pytest
import torch
from torch import nn

from repa.runs.averaging import gamma_of
from repa.training.update import EMA, exponential, power_function
from tests.oracles import averaging as oracle

GOOD, SKIPPED = torch.zeros(()), torch.ones(())


def followed(share, num: int) -> torch.Tensor:
    """The weights (num + 1,) of steps 0 (initialisation), 1 ... num, found with unit vectors as networks."""
    model = nn.Linear(num + 1, 1, bias=False)
    units = torch.eye(num + 1)
    model.weight.data.copy_(units[:1])
    ema = EMA(model, share)
    for t in range(1, num + 1):
        model.weight.data.copy_(units[t : t + 1])
        ema.update(t, GOOD)
    return ema.model.weight[0].double()


def test_a_constant_decay_weights_geometrically():
    weights = followed(exponential(0.9), 20)
    wanted = [0.9**20, *(0.1 * 0.9 ** (20 - s) for s in range(1, 21))]
    torch.testing.assert_close(weights, torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_a_power_function_average_has_the_defined_profile(width):
    weights = followed(power_function(width), 40)
    wanted = torch.from_numpy(oracle.profile_of_steps(40, gamma_of(width)))
    assert weights[0] == 0  # the initialisation has no weight
    torch.testing.assert_close(weights[1:], wanted, atol=1e-6, rtol=1e-4)


def test_a_skipped_step_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    ema = EMA(model, exponential(0.3))
    model.weight.data.normal_()
    ema.update(1, GOOD)
    before = [p.clone() for p in ema.model.parameters()]
    model.weight.data.normal_()
    ema.update(2, SKIPPED)
    assert all(torch.equal(p, old) for p, old in zip(ema.model.parameters(), before, strict=True))
    ema.update(3, GOOD)
    assert not torch.equal(ema.model.weight, before[0])


def test_frozen_parameters_are_not_averaged():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = EMA(model, exponential(0.5))
    before = model.bias.detach().clone()
    model.bias.data.add_(1)
    ema.update(1, GOOD)
    assert torch.equal(ema.model.bias, before)
