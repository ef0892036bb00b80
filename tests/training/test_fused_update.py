"""AdamW and the average in one Triton kernel, against the two calls that it replaces, in Triton's interpreter."""

import pytest
import torch

from repa.base.errors import UserError
from repa.models.config import ModelConfig
from repa.performance.batches import Synthetic, in_memory
from repa.performance.measure import MeasuredStep
from repa.training import TrainConfig
from repa.training.acceleration import BLOCK, programs
from tests.interpreter import interpreted, needs_triton

CPU = torch.device("cpu")
MODEL = ModelConfig(
    name="SiT-S/2", hidden_dim=16, depth=2, num_heads=2, latent_size=8, latent_channels=4, num_classes=3
)


def test_every_element_is_updated_by_exactly_one_program():
    sizes, owner, start = programs((1, BLOCK, BLOCK + 1, 3 * BLOCK), CPU)
    assert sizes.tolist() == [1, BLOCK, BLOCK + 1, 3 * BLOCK]
    assert owner.tolist() == [0, 1, 2, 2, 3, 3, 3]
    assert start.tolist() == [0, 0, 0, BLOCK, 0, BLOCK, 2 * BLOCK]


def test_on_a_cpu_the_option_changes_no_bit():
    found = []
    for fused in (False, True):
        config = TrainConfig(model=MODEL, batch_size=2, precision="fp32", fused_update=fused, ema_decays=(0.5,))
        data = Synthetic({}, 4)
        batch = data.batch(config, CPU, 1)
        step = MeasuredStep(config, in_memory({}, batch), CPU)
        for _ in range(3):
            step()
        state = step.state
        found.append({**state.model.state_dict(), **{f"ema/{k}": v for k, v in state.ema.model.state_dict().items()}})
        assert not vars(state.optimizer).get("grad_scale")
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_muon_is_refused():
    with pytest.raises(UserError, match="--fused-update works only"):
        TrainConfig(model=MODEL, fused_update=True).override(optimizer={"name": "muon"})


INTERPRETED = """
import torch
from repa.training.acceleration import BLOCK, ParameterRow, update_by_triton

shapes = [(3,), (BLOCK,), (2, BLOCK // 2 + 5)]
settings = dict(betas=(0.9, 0.95), eps=1e-8)
stream = torch.Generator().manual_seed(0)
weights = [torch.nn.Parameter(torch.randn(shape, generator=stream)) for shape in shapes]
averages = [torch.randn(shapes[0], generator=stream), None, torch.randn(shapes[2], generator=stream)]
twins = [torch.nn.Parameter(p.detach().clone()) for p in weights]
twin_averages = [None if x is None else x.clone() for x in averages]
adamw = torch.optim.AdamW(twins, lr=0.03, weight_decay=0.1, fused=True, **settings)
rows = [
    ParameterRow(p.detach(), torch.empty_like(p), torch.zeros_like(p), torch.zeros_like(p), torch.zeros(()), average)
    for p, average in zip(weights, averages)
]
for t, skipped in enumerate((0.0, 0.0, 1.0, 0.0)):
    skip, scale, share = torch.tensor(skipped), torch.tensor(1.0 + t), 0.25 / (t + 1)
    for row, twin in zip(rows, twins):
        row.gradient.copy_(torch.randn(twin.shape, generator=stream))
        if skipped:
            row.gradient.view(-1)[0] = float("nan")
        twin.grad = row.gradient.clone()
    before = [x.clone() for row in rows for x in row if x is not None and x is not row.gradient]
    update_by_triton(rows, skip, scale, share, rate=0.03, decay=0.1, **settings)
    adamw.found_inf, adamw.grad_scale = skip, scale
    adamw.step()
    with torch.no_grad():
        for average, p in zip(twin_averages, twins):
            if average is not None:
                average.lerp_(p, share * (1.0 - skip))
    after = [x for row in rows for x in row if x is not None and x is not row.gradient]
    changed = [not torch.equal(a, b) for a, b in zip(before, after)]
    assert not any(changed) if skipped else all(changed), (t, changed)
    for row, twin, average in zip(rows, twins, twin_averages):
        state = adamw.state[twin]
        pairs = [(row.parameter, twin.detach()), (row.first, state["exp_avg"]), (row.second, state["exp_avg_sq"])]
        pairs += [(row.step, state["step"])] + ([] if average is None else [(row.average, average)])
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-7)
print("equal")
"""


@needs_triton
def test_the_triton_kernel_equals_adamw_and_the_average():
    interpreted(INTERPRETED)
