"""The fused norm and modulation: gradients against float64 autograd, and the Triton kernel in its interpreter."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from repa.base.errors import UserError
from repa.models.config import ModelConfig
from repa.models.kernels import modulated_norm, modulated_norm_backward
from repa.models.layers import NORM_EPS, BlockOptions, modulate, token_norm
from repa.training import TrainConfig
from repa.training.state import build_state
from tests.interpreter import interpreted, needs_triton

CPU = torch.device("cpu")
EPS = NORM_EPS


def tensors(dtype, num=3, tokens=37, width=24):
    stream = torch.Generator().manual_seed(0)
    x = 2 + 3 * torch.randn(num, tokens, width, generator=stream, dtype=torch.float64)
    shift, scale = (torch.randn(num, 1, width, generator=stream, dtype=torch.float64) for _ in range(2))
    gradient = torch.randn(num, tokens, width, generator=stream, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (x, shift, scale)], gradient.to(dtype)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_the_pytorch_version_has_the_gradients_of_autograd(dtype, rtol):
    inputs, gradient = tensors(dtype)
    exact, exact_gradient = tensors(torch.float64)
    wanted_out = modulate(token_norm("layer", 24).double()(exact[0]), exact[1], exact[2])
    wanted = torch.autograd.grad(wanted_out, exact, exact_gradient)
    out = modulated_norm(*inputs, EPS)
    found = torch.autograd.grad(out, inputs, gradient)
    torch.testing.assert_close(out.double(), wanted_out, rtol=rtol, atol=rtol)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=10 * rtol)


def test_the_operator_passes_pytorchs_operator_checks():
    """torch.compile relies on fake tensors and on no hidden mutation."""
    inputs, gradient = tensors(torch.float32)
    x, _, scale = (t.detach() for t in inputs)
    _, mean, rstd = torch.native_layer_norm(x, (24,), None, None, EPS)
    torch.library.opcheck(
        modulated_norm_backward, (gradient, x, mean, rstd, scale), test_utils=("test_schema", "test_faketensor")
    )


def test_it_compiles_in_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs, gradient = tensors(torch.float32)
    wanted = torch.autograd.grad(modulated_norm(*inputs, EPS), inputs, gradient)
    compiled = torch.compile(lambda *inputs: modulated_norm(*inputs, EPS), backend=counter, fullgraph=True)
    found = torch.autograd.grad(compiled(*inputs), inputs, gradient)
    assert counter.frame_count == 1
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def configuration(**changes):
    size = {"hidden_dim": 32, "depth": 2, "num_heads": 2, "latent_size": 8, "latent_channels": 4, "num_classes": 3}
    return TrainConfig(model=ModelConfig(name="SiT-S/2", **{**size, **changes}), precision="fp32", batch_size=4)


def test_a_setting_enables_the_fused_norm():
    config, found = configuration(), []
    for fused in (False, True):
        state = build_state(config.override(fused_norm=fused), {}, CPU)
        for p in state.objective.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        clean = {"x": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
        from repa.models import Condition

        draws, weights = state.objective.draw(clean, 0), state.objective.weights(0, CPU)
        state.objective(clean, Condition(torch.arange(4) % 3), {}, draws, weights).total.sum().backward()
        found.append({name: p.grad for name, p in state.objective.named_parameters() if p.grad is not None})
        assert all(block.fused_norm == fused for block in state.model.blocks)
        assert not any(block.fused_norm for block in state.ema.model.blocks)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_network_without_such_norms_is_refused():
    assert BlockOptions().norm == "layer"
    with pytest.raises(UserError, match="--fused-norm needs blocks with LayerNorm"):
        build_state(configuration(norm="rms").override(fused_norm=True), {}, CPU)


INTERPRETED = """
import torch
from repa.models.kernels import norm_backward_by_triton, modulated_norm_backward

for num, tokens, width in ((2, 37, 24), (1, 16, 72), (3, 5, 1)):
    stream = torch.Generator().manual_seed(tokens)
    x = 2 + 3 * torch.randn(num, tokens, width, generator=stream)
    scale, gradient = torch.randn(num, 1, width, generator=stream), torch.randn(num, tokens, width, generator=stream)
    _, mean, rstd = torch.native_layer_norm(x, (width,), None, None, 1e-6)
    found = norm_backward_by_triton(gradient, x, mean, rstd, scale)
    wanted = modulated_norm_backward(*(t.double() for t in (gradient, x, mean, rstd, scale)))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
print("equal")
"""


@needs_triton
def test_the_triton_kernel_equals_the_pytorch_version():
    interpreted(INTERPRETED)
