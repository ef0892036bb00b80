"""States are one tensor for samplers and named parts for networks."""

import pytest
import torch

from repa.base.errors import UserError
from repa.diffusion import Layout


def test_a_state_with_one_part_is_unchanged():
    layout, x = Layout({"x": (4, 2, 2)}), torch.randn(3, 4, 2, 2)
    assert layout.shape == (4, 2, 2)
    assert layout.pack({"x": x}) is x
    assert layout.unpack(x)["x"] is x


def test_parts_are_joined_into_one_tensor_and_split_again():
    layout = Layout({"x": (4, 2, 3), "class": (5,)})
    parts = {"x": torch.randn(3, 4, 2, 3), "class": torch.randn(3, 5)}
    flat = layout.pack(parts)
    assert (layout.shape, flat.shape) == ((29,), (3, 29))
    assert all(torch.equal(part, parts[name]) for name, part in layout.unpack(flat).items())
    assert torch.equal(flat[:, 24:], parts["class"])


def test_other_shapes_are_refused():
    layout = Layout({"x": (4, 2, 2), "class": (5,)})
    for parts in ({"x": torch.zeros(1, 4, 2, 2)}, {"x": torch.zeros(1, 4, 2, 2), "class": torch.zeros(1, 6)}):
        with pytest.raises(UserError, match="'class'"):
            layout.pack(parts)
    with pytest.raises(UserError, match="21"):
        layout.unpack(torch.zeros(1, 20))
    with pytest.raises(UserError, match="at least one"):
        Layout({})
