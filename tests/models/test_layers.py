import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from repa.models.jit import BottleneckEmbedding
from repa.models.layers import (
    PatchEmbedding,
    attend,
    by_head,
    gelu,
    sincos_positions,
    timestep_frequencies,
    unpatchify,
)
from tests.oracles import dit as oracle


def test_positions_equal_the_literal_sinusoids():
    positions = sincos_positions(dim=16, grid=(3, 3))
    assert positions.dtype == torch.float32
    literal = torch.tensor([oracle.position(row, column, 16) for row in range(3) for column in range(3)])
    torch.testing.assert_close(positions[0], literal, rtol=0, atol=1e-7)


def test_the_first_half_of_a_position_encodes_its_column():
    positions = sincos_positions(dim=8, grid=(4, 4))[0].reshape(4, 4, 8)
    assert torch.equal(positions[1, :, :4], positions[3, :, :4])  # same columns, other row
    assert torch.equal(positions[:, 1, 4:], positions[:, 3, 4:])  # same rows, other column
    assert positions[0, 3, 0].item() == torch.tensor(math.sin(3.0)).item()


def test_frequencies_have_full_float32_precision():
    exact = [10000 ** (-k / 128) for k in range(128)]
    assert torch.equal(timestep_frequencies(256), torch.tensor(exact, dtype=torch.float64).float())


def test_unpatchify_orders_rows_columns_channels():
    grid, p, channels = 2, 3, 2
    tokens = torch.arange(grid * grid * p * p * channels).reshape(1, grid * grid, -1)
    image = unpatchify(tokens, (grid, grid), p)
    assert image.shape == (1, channels, 6, 6)
    for token in range(4):
        for row in range(p):
            for column in range(p):
                for channel in range(channels):
                    y, x = token // grid * p + row, token % grid * p + column
                    assert image[0, channel, y, x] == tokens[0, token, (row * p + column) * channels + channel]


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
def test_overlapping_patches_are_summed(grid):
    p, overlap, channels = 3, 2, 2
    q = p + 2 * overlap
    tokens = torch.randn(1, grid[0] * grid[1], q * q * channels, dtype=torch.float64)
    image = unpatchify(tokens, grid, p, overlap)
    expected = torch.zeros(channels, grid[0] * p, grid[1] * p, dtype=torch.float64)
    for token, row, column, channel in itertools.product(range(grid[0] * grid[1]), range(q), range(q), range(channels)):
        y, x = token // grid[1] * p + row - overlap, token % grid[1] * p + column - overlap
        if 0 <= y < grid[0] * p and 0 <= x < grid[1] * p:
            expected[channel, y, x] += tokens[0, token, (row * q + column) * channels + channel]
    torch.testing.assert_close(image[0], expected)


def test_an_overlapping_patch_sees_neighbouring_pixels():
    embed = PatchEmbedding(1, 4, 2, overlap=1).double()
    image = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    tokens = embed(image)
    padded = F.pad(image, (1, 1, 1, 1))
    for token in range(6):
        y, x = token // 3 * 2, token % 3 * 2
        expected = (embed.proj.weight * padded[0, :, y : y + 4, x : x + 4]).sum((1, 2, 3)) + embed.proj.bias
        torch.testing.assert_close(tokens[0, token], expected)


@pytest.mark.parametrize("embed", [PatchEmbedding(3, 8, 2), BottleneckEmbedding(3, 5, 8, 2)])
def test_tokens_are_contiguous_in_memory(embed):
    """A norm copies its input when the residual stream has another memory layout."""
    found = embed(torch.randn(2, 3, 6, 4))
    assert found.shape == (2, 6, 8)
    assert found.is_contiguous()
    assert torch.addcmul(found + torch.ones(1, 6, 8), torch.ones(2, 1, 8), found).is_contiguous()


class Copies(TorchDispatchMode):
    """Counts copies of at least `size` numbers."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.found = size, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("stack", "clone", "cat", "copy_") and out.numel() >= self.size:
            self.found[name] += 1
        return out


def test_gradients_of_queries_keys_and_values_are_written_once():
    qkv = torch.randn(2, 5, 3 * 24, requires_grad=True)
    gradients = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    slow = qkv.unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    (wanted,) = torch.autograd.grad(tuple(slow), qkv, gradients)
    found = by_head(qkv, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, slow, strict=True))
    with Copies(qkv.numel()) as copies:
        (gradient,) = torch.autograd.grad(found, qkv, gradients)
        rows = gradient.flatten(0, 1)  # in the layout that the product's backward needs
    assert rows.is_contiguous()
    assert torch.equal(gradient, wanted)
    assert copies.found == {"stack": 1}


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_attention_on_a_cpu_matches_the_formula(masked):
    """Forward and backward match the float64 formula up to bfloat16 rounding."""
    stream = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 6, 3 * 24, generator=stream).bfloat16().requires_grad_()
    mask = torch.rand(3, 6, 6, generator=stream) < 0.7
    mask = (mask | torch.eye(6, dtype=torch.bool)) if masked else None
    gradient = torch.randn(3, 3, 6, 8, generator=stream, dtype=torch.float64)
    exact = qkv.detach().double().requires_grad_()
    q, k, v = by_head(exact, 3)
    logits = q @ k.transpose(-1, -2) / 8**0.5
    if masked:
        logits = logits.masked_fill(~mask[:, None], float("-inf"))
    wanted = logits.softmax(-1) @ v
    found = attend(*by_head(qkv, 3), mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2)
    (of_wanted,) = torch.autograd.grad(wanted, exact, gradient)
    (of_found,) = torch.autograd.grad(found, qkv, gradient.bfloat16())
    torch.testing.assert_close(of_found.double(), of_wanted, rtol=4e-2, atol=4e-2)


def test_the_compiled_gelu_for_cpus_matches_the_eager_one():
    torch._dynamo.reset()
    x = torch.linspace(-12, 12, 241, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(gelu, backend="eager", fullgraph=True)  # traces like every backend
    y, wanted = compiled(x), F.gelu(x, approximate="tanh")
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, wanted)), rtol=1e-12, atol=1e-12)
    for dtype in (torch.bfloat16, torch.float32):
        rounded = x.detach().to(dtype)
        found, exact = compiled(rounded), F.gelu(rounded.double(), approximate="tanh")
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
    torch._dynamo.reset()
