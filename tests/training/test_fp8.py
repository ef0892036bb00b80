"""8-bit linear layers against a float64 emulation with the same rounding, and a run that learns with them."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from repa.base.device import autocast
from repa.base.errors import UserError
from repa.data import open_data
from repa.models import Condition, build_model
from repa.runs import read_metrics
from repa.training import train
from repa.training.acceleration import FORWARD, GRADIENT, Float8Linear, rounded, use_fp8

CPU = torch.device("cpu")


def layer(bias: bool = True) -> Float8Linear:
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias)
    linear.__class__ = Float8Linear
    return linear


def emulated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In float64: scaled so that the largest number is the format's largest, rounded, and scaled back."""
    scale = x.abs().max().double() / torch.finfo(dtype).max
    return (x.double() / scale).float().to(dtype).double() * scale


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_equal_those_of_rounded_numbers(bias):
    linear, x = layer(bias), torch.randn(4, 8, 48, requires_grad=True)
    out = linear(x)
    gradient = torch.randn(out.shape).to(torch.bfloat16)
    out.backward(gradient)
    x8, w8 = emulated(x.detach(), FORWARD).flatten(0, 1), emulated(linear.weight.detach(), FORWARD)
    g8 = emulated(gradient.float(), GRADIENT).flatten(0, 1)
    wanted = x8 @ w8.T + (linear.bias.detach().double() if bias else 0)
    assert out.dtype == torch.bfloat16

    def near(found, wanted):  # up to two roundings to bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().mean()))

    near(out.flatten(0, 1), wanted)
    near(x.grad.flatten(0, 1), g8 @ w8)
    near(linear.weight.grad, g8.T @ x8)
    assert linear.weight.grad.dtype == torch.float32
    if bias:
        torch.testing.assert_close(linear.bias.grad, gradient.float().sum((0, 1)), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
def test_numbers_of_any_size_keep_their_precision(size, dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * size
    x8, scale = rounded(x, dtype)
    assert x8.float().isfinite().all()
    large = x.abs() > 0.05 * x.abs().max()
    relative = ((x8.float() * scale - x).abs() / x.abs())[large]
    assert relative.max() <= (1 / 16 if dtype == FORWARD else 1 / 8) * 1.001  # half of the last bit


def test_zeros_stay_zero_and_nan_stays_nan():
    x8, scale = rounded(torch.zeros(4), FORWARD)
    assert not x8.float().any()
    assert scale > 0
    broken, _ = rounded(torch.tensor([1.0, float("nan")]), FORWARD)
    assert broken.float().isnan().any()  # so that the guard skips the step


def network(**changes):
    torch.manual_seed(0)
    size = {"hidden_dim": 32, "depth": 4, "num_heads": 2, "latent_size": 8, "latent_channels": 4, "num_classes": 3}
    model = build_model("SiT-S/2", **{**size, **changes})
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def test_only_matrices_of_inner_blocks_become_8_bit():
    model = network()
    names = list(model.state_dict())
    turned = use_fp8(model, "bf16", CPU)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert sorted(turned) == sorted(f"blocks.{i}.{name}" for i in (1, 2) for name in layers)
    assert {name for name, m in model.named_modules() if isinstance(m, Float8Linear)} == set(turned)
    assert list(model.state_dict()) == names


def test_the_predictions_are_close_to_full_precision():
    plain = network()
    turned = copy.deepcopy(plain)
    use_fp8(turned, "bf16", CPU)
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), Condition(torch.arange(4) % 3)
    with torch.no_grad():
        exact = plain({"x": x}, t, y).prediction["x"]
        with autocast(CPU, "bf16"):
            half, eighth = (model({"x": x}, t, y).prediction["x"].float() for model in (plain, turned))
    errors = [float((found - exact).norm() / exact.norm()) for found in (half, eighth)]
    assert errors[0] < errors[1] < 0.1


def test_8_bit_blocks_compile_without_graph_breaks():
    torch._dynamo.reset()
    model = network()
    use_fp8(model, "bf16", CPU)
    counter = CompileCounterWithBackend("aot_eager")
    x, silu_c = torch.randn(2, 16, 32, requires_grad=True), torch.randn(2, 32)
    with autocast(CPU, "bf16"):
        wanted, _ = model.blocks[1](x, silu_c)
        found, _ = torch.compile(model.blocks[1], backend=counter, fullgraph=True)(x, silu_c)
    found.sum().backward()
    assert (found - wanted).norm() < 0.02 * wanted.norm()  # the two round bfloat16 sums differently
    assert counter.frame_count == 1
    assert model.blocks[1].mlp.fc1.weight.grad.abs().sum() > 0


def test_unsupported_networks_and_precisions_are_refused():
    with pytest.raises(UserError, match="precision is fp32"):
        use_fp8(network(), "fp32", CPU)
    with pytest.raises(UserError, match="needs matrices with sides"):
        use_fp8(network(depth=2), "bf16", CPU)
    with pytest.raises(UserError, match="not on mps"):
        use_fp8(network(), "bf16", torch.device("mps"))


def test_an_8_bit_run_learns_like_a_16_bit_run(tiny_config, data_folder, tmp_path):
    """With the same draws, the losses of thirty steps stay close, and the run resumes bit for bit."""
    config = tiny_config.override(
        model=tiny_config.model.override(depth=3, hidden_dim=32, num_heads=2), precision="bf16", num_steps=30, save_every=20,
        optimizer={"learning_rate": 2e-3},
    )  # fmt: skip
    losses = {}
    for name, fp8 in (("16", False), ("8", True), ("8 again", True)):
        data, silent = open_data(data_folder), lambda text: None
        settings = config.override(fp8=fp8)
        if name == "8 again":
            train(settings.override(num_steps=20), data, tmp_path / name, device=CPU, say=silent)
        train(settings, data, tmp_path / name, device=CPU, say=silent)
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name) if row["kind"] == "train"]
    assert losses["8"] == losses["8 again"] != losses["16"]
    first, last = (sum(losses["16"][part]) for part in (slice(5), slice(-5, None)))
    assert sum(losses["8"][-5:]) == pytest.approx(last, rel=0.03)
    assert last < 0.9 * first
