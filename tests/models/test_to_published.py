"""Conversion of our networks to the released formats and back."""

import pytest
import torch

from repa.base.errors import UserError
from repa.models import load_published, to_published
from tests.oracles import dit, published


def inputs():
    stream = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 6, 6, generator=stream), torch.tensor([0.13, 0.82]), torch.tensor([1, 5])


def projectors():
    stream = torch.Generator().manual_seed(2)
    return {f"0.{layer}.weight": torch.randn(4, 4, generator=stream) for layer in (0, 2, 4)}


@pytest.mark.parametrize(("kind", "learn_sigma"), [("repa", False), ("sit", False), ("dit", True)])
def test_writing_and_reading_a_checkpoint_round_trips(kind, learn_sigma, random_dit):
    state = random_dit(learn_sigma=learn_sigma).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    again, back, *_ = load_published(to_published(state, projectors(), kind), kind)
    assert back.keys() == (projectors().keys() if kind == "repa" else set())
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(value, before[key])  # the input is unchanged
        if kind == "sit":  # reversing time rounds twice
            torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(again[key], value)


def test_reading_and_writing_a_released_sit_round_trips(random_dit):
    """A SiT converted to our convention and back is unchanged except for its unused variance channels."""
    sit = random_dit(learn_sigma=True).state_dict()
    state = load_published(sit, "sit").ema
    again = to_published(state, {}, "sit")
    x_t, t, labels = inputs()
    expected = published.sit_velocity(sit, x_t, t, labels, num_heads=2)
    torch.testing.assert_close(
        published.sit_velocity(again, x_t, t, labels, num_heads=2), expected, rtol=1e-4, atol=1e-5
    )
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in sit.items()}


def test_a_repa_file_keeps_its_projectors_by_name(random_dit):
    state = random_dit().state_dict()
    out = to_published(state, projectors(), "repa")
    assert out.keys() == state.keys() | {f"projectors.{key}" for key in projectors()}


def test_the_time_convention_is_reversed_for_sit(random_dit):
    state = random_dit().state_dict()
    x_t, t, labels = inputs()
    ours, _ = dit.forward(state, x_t, t, labels, num_heads=2)
    theirs = published.sit_velocity(to_published(state, {}, "sit"), x_t, 1 - t, labels, num_heads=2)
    torch.testing.assert_close(theirs, -ours, rtol=1e-4, atol=1e-5)


def test_invalid_input_is_refused(random_dit):
    for kind, learn_sigma, choice in [("repa", True, "dit"), ("sit", True, "dit"), ("dit", False, "repa or sit")]:
        with pytest.raises(UserError, match=f"cannot be written as kind '{kind}': choose {choice}"):
            to_published(random_dit(learn_sigma=learn_sigma).state_dict(), {}, kind)
    with pytest.raises(UserError, match="Did you mean 'repa'"):
        to_published(random_dit().state_dict(), {}, "reap")
