"""Update after the backward pass: the guard that may skip it, AdamW or Muon with a learning rate, and the averages.

All decisions are made on the device, without synchronisation.
"""

import copy
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from repa.base import dist
from repa.base.errors import UserError
from repa.models.contract import Backbone
from repa.runs import layout
from repa.runs.averaging import gamma_of
from repa.training.acceleration import ParameterRow, update_by_triton
from repa.training.config import OptimizerConfig

if TYPE_CHECKING:
    from repa.training.state import TrainState

SPIKE = 10.0  # times the running median
MEDIAN_ROWS, LEAST_ROWS = 100, 10  # log entries in the median; the fewest for a valid median
# The rule of torch.amp.GradScaler: halve after a skipped step, double after this many consecutive good steps
FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_

AverageShare = Callable[[int], float]  # share of the network in its average at step t = 1, 2, ...


def update(state: "TrainState", groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
    """A step of optimizer and averages with the current gradients; returns the norm of each group's gradients.

    If a norm is not finite, only the counters change.
    """
    # First the loss scale is removed, so that later code sees true gradients; the guard checks the norms from clipping; the
    # averages come last, with the weights of this step.
    settings = state.config.optimizer
    state.guard.unscale(state.objective.parameters())
    norms = clip(state.optimizer, groups, settings.max_grad_norm)
    skip = state.guard.check(norms)
    state.rate = learning_rate(settings, state.config.num_steps, state.step)
    set_learning_rate(state.optimizer, state.rate)
    state.step += 1
    averages = dict(state.averages)
    if state.config.fused_update:
        step_and_average(state.optimizer, averages.pop("ema"), state.step, skip)
    else:
        step_unless_skipped(skip, state.optimizer)
    # None, not zeros: the next backward pass writes gradients instead of adding to them.
    state.optimizer.zero_grad(set_to_none=True)
    for average in averages.values():
        average.update(state.step, skip)
    return norms


class Guard:
    """Skips steps with non-finite gradients, counts them, and scales the fp16 loss.

    Every process has the same averaged gradients, so all make the same decision. Only `row`, `require_progress` and `state`
    synchronise.

    Args:
        precision: precision of the run; fp16 scales the loss, so that small gradients do not underflow.
        device: device of the gradients.
    """

    def __init__(self, precision: str, device: torch.device):
        self.scales = precision == "fp16"
        # On the device: total and consecutive skipped steps, the largest finite norm since the last log entry, good steps since
        # the last change of the loss scale, and the loss scale.
        self.skipped, self.in_row, self.largest, self.good = (torch.zeros((), device=device) for _ in range(4))
        self.scale = torch.full((), FIRST_SCALE if self.scales else 1.0, device=device)
        self._reported = 0.0
        self._norms: deque[float] = deque(maxlen=MEDIAN_ROWS)

    def scaled(self, loss: Tensor) -> Tensor:
        """The scaled loss for the backward pass."""
        return loss * self.scale if self.scales else loss

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remove the loss scale from the gradients, before clipping."""
        if self.scales:
            gradients = [local(p.grad) for p in parameters if p.grad is not None]
            # Exact, because the scale is a power of two.
            torch._foreach_mul_(gradients, 1.0 / self.scale)

    @torch.no_grad()
    def check(self, norms: Sequence[Tensor]) -> Tensor:
        """1.0 on the device if a gradient norm is not finite and the step must be skipped, else 0.0."""
        finite = torch.isfinite(torch.stack(list(norms)))
        skip = 1.0 - finite.all().float()
        self.skipped = self.skipped + skip
        # Arithmetic instead of branches: a branch would synchronise at every step.
        self.in_row = (self.in_row + 1.0) * skip
        self.largest = torch.where(finite[0], torch.maximum(self.largest, norms[0]), self.largest)
        if self.scales:
            good = (self.good + 1.0) * (1.0 - skip)
            grows = (good >= GROWTH_STEPS).float()
            self.scale = self.scale * (1.0 - 0.5 * skip) * (1.0 + grows)
            self.good = good * (1.0 - grows)
        return skip

    def row(self) -> dict[str, float]:
        """Values for the log entry (synchronises); resets the largest norm."""
        skipped, largest, scale = torch.stack([self.skipped, self.largest, self.scale]).tolist()
        self.largest = torch.zeros_like(self.largest)
        values = {"skipped_steps": skipped, "grad_norm_max": largest}
        return {**values, "loss_scale": scale} if self.scales else values

    def notes(self, row: dict[str, float], step: int) -> list[str]:
        """Warnings on events since the last log entry: skipped steps, and a gradient norm far above its median."""
        notes, new = [], int(row["skipped_steps"] - self._reported)
        self._reported = row["skipped_steps"]
        if new:
            lowered = f", the loss scale is now {row['loss_scale']:g}" if self.scales else ""
            notes.append(f"Steps skipped up to step {step:,} because their gradient was not finite: {new}{lowered}.")
        usual = statistics.median(self._norms) if len(self._norms) >= LEAST_ROWS else float("inf")
        if row["grad_norm_max"] > SPIKE * usual:
            notes.append(
                f"The gradient norm rose to {row['grad_norm_max']:.3g} by step {step:,}, "
                f"{row['grad_norm_max'] / usual:.0f} times its running median of {usual:.3g}."
            )
        if row["grad_norm_max"] > 0:
            self._norms.append(row["grad_norm_max"])
        return notes

    def require_progress(self, allowed: int, step: int, loss: float, run: Path) -> None:
        """Raises UserError after more than `allowed` consecutive skipped steps (synchronises); it names the newest checkpoint of `run`."""
        if (in_row := int(self.in_row)) <= allowed:
            return
        # Every process has the same averaged gradients, so all reach this line or none, without communication.
        with dist.together():
            steps = layout.checkpoint_steps(run)
            good = f"The checkpoint of step {steps[-1]} is good. " if steps else ""
            raise UserError(
                f"The gradient was not finite in {in_row} steps in a row, up to step {step} (loss {loss}): training stopped and "
                f"wrote no checkpoint of these steps. {good}Check the data, or start another --out with a lower --optimizer.learning-rate, "
                "--precision fp32 or --model.qk-norm layer."
            )

    def state(self) -> dict[str, float]:
        """The state for a checkpoint (synchronises)."""
        names = ("skipped", "in_row", *(("scale", "good") if self.scales else ()))
        return {f"guard_{name}": float(getattr(self, name)) for name in names}

    def load(self, counters: dict[str, float]) -> None:
        """Restore the state of a checkpoint; older checkpoints have none."""
        for name in ("skipped", "in_row", "scale", "good"):
            if f"guard_{name}" in counters:
                setattr(self, name, torch.full_like(getattr(self, name), counters[f"guard_{name}"]))
        self._reported = float(self.skipped)


def clip(optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[nn.Parameter]], limit: float) -> list[Tensor]:
    """Clip each group's gradients to the norm `limit` for the next step; returns the norms before clipping.

    The fused AdamW scales gradients while it reads them, which saves a pass over them. With separate scales per group, or
    another optimizer, they are scaled here.
    """
    if len(groups) > 1 or not isinstance(optimizer, torch.optim.AdamW):
        return [dist.full_tensor(nn.utils.clip_grad_norm_(group, limit)) for group in groups]
    # Sharded gradients give a partial norm, which is complete only after a sum over processes.
    norm = dist.full_tensor(nn.utils.get_total_norm([p.grad for p in groups[0] if p.grad is not None]))
    vars(optimizer)["grad_scale"] = ((norm + CLIP_EPS) / limit).clamp(min=1.0)  # what gradients are divided by
    return [norm]


def adamw(parameters: list[nn.Parameter], settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW that can skip a step on the device."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,  # also needed to skip a step by `found_inf` without synchronisation
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon, with Nesterov momentum, and AdamW as one optimizer with one state.

    Muon's updates are scaled to the root mean square of AdamW's (arXiv 2502.16982), so that one learning rate serves both.
    Where `found_inf` is 1, a step changes nothing, as in the fused AdamW. It is not torch.optim.Muon, which always multiplies
    in bfloat16: a CPU without instructions for it then spends most of a step there.

    Args:
        precision: "bf16" orthogonalises in bfloat16, any other in float32.
    """

    MOMENTUM = 0.95

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], settings: OptimizerConfig, precision: str
    ):
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.adamw = adamw(others, settings)
        muon = {"params": matrices, "lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        super().__init__([muon, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        muon, adamw = self.param_groups
        skip: Tensor | None = getattr(self, "found_inf", None)
        # Set again at each step, because load_state_dict replaces them.
        self.adamw.state, self.adamw.param_groups = self.state, [adamw]
        vars(self.adamw)["found_inf"] = skip
        self.adamw.step()
        for p in muon["params"]:
            if p.grad is not None:
                self._muon(p, p.grad, muon["lr"], muon["weight_decay"], skip)

    def _muon(self, p: Tensor, grad: Tensor, rate: float, decay: float, skip: Tensor | None) -> None:
        """Update one matrix; if `skip`, momentum and matrix stay unchanged."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momentum = self.state[p]["momentum_buffer"]
        # In a skipped step the momentum is averaged with itself, because a NaN gradient multiplied by 0 would stay NaN.
        if skip is not None:
            grad = torch.where(skip > 0, momentum, grad)
        momentum.lerp_(grad, 1 - self.MOMENTUM)
        direction = orthogonalised(grad.lerp(momentum, self.MOMENTUM), self.dtype)
        moved = (p * (1 - rate * decay)).add_(direction, alpha=-rate * (0.2 * math.sqrt(max(p.shape))))
        p.copy_(moved if skip is None else torch.where(skip > 0, p, moved))


def orthogonalised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix with singular values near 1, between about 0.7 and 1.2, after Muon's five Newton-Schulz steps."""
    # The Gram matrix of the shorter side is the smaller one.
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    # The iteration converges for singular values up to 1, and the largest is at most the Frobenius norm.
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.T


def step_unless_skipped(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer, unless `skip` (a float on the device) is 1; without synchronisation.

    Gradients are divided by the attribute `grad_scale`, if it is set; it applies to one step.
    """
    # The protocol between torch.amp.GradScaler and fused optimizers: attributes that apply to one step and are not state.
    vars(optimizer)["found_inf"] = skip
    optimizer.step()
    for name in ("found_inf", "grad_scale"):
        vars(optimizer).pop(name, None)


def learning_rate(settings: OptimizerConfig, num_steps: int, step: int) -> float:
    """Learning rate of the step after `step` completed ones: linear over warmup_steps, then the schedule to 0 at num_steps."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)  # in [0, 1)
    left = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.learning_rate * left


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def exponential(decay: float) -> AverageShare:
    """An exponential moving average: 1 - decay at every step."""
    return lambda t: 1.0 - decay


def power_function(width: float) -> AverageShare:
    """1 - beta(t) with beta(t) = (1 - 1/t)^(gamma + 1): the profile t^gamma of relative width `width` (EDM2, arXiv 2312.02696)."""
    exponent = gamma_of(width) + 1.0
    return lambda t: 1.0 - (1.0 - 1.0 / t) ** exponent


class EMA:
    """A frozen copy of `model` that follows it: ema <- ema + share(t) * (model - ema)."""

    def __init__(self, model: Backbone, share: AverageShare):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.share = share
        self._followed = model

    @cached_property
    def pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(averages, their source tensors), looked up at the first update, because sharding replaces parameters before it."""
        own = dict(self.model.named_parameters())
        trained = [(own[name], p) for name, p in self._followed.named_parameters() if p.requires_grad]
        return [mine for mine, _ in trained], [p for _, p in trained]

    @torch.no_grad()
    def update(self, t: int, skip: Tensor) -> None:
        """Update the average after step t. Bit-identical if `skip` (a float on the device) is 1."""
        averages, followed = ([local(p) for p in side] for side in self.pairs)
        # A tensor, so that `skip` needs no synchronisation; on CUDA this costs one kernel per parameter.
        share = self.share(t) * (1.0 - skip)
        torch._foreach_lerp_(averages, followed, [share] * len(averages))


@torch.no_grad()
def step_and_average(optimizer: torch.optim.Optimizer, ema: EMA, t: int, skip: Tensor) -> None:
    """`step_unless_skipped` and `ema.update` after step t, on CUDA in one pass.

    The first step creates the optimizer's state, so it uses the two calls, as does a step in which a parameter has no gradient.
    """
    (group,) = optimizer.param_groups
    averages = dict(zip(*reversed(ema.pairs), strict=True))
    has_all = all(p.grad is not None and optimizer.state[p] for p in group["params"])
    # The kernel covers only the optimizer's parameters, so averaged tensors that are not optimised would be missed.
    whole = has_all and averages.keys() <= {*group["params"]}
    if skip.device.type != "cuda" or not whole:
        step_unless_skipped(skip, optimizer)
        ema.update(t, skip)
        return
    rows = []
    for p in group["params"]:
        state, average = optimizer.state[p], averages.get(p)
        parts = (p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], state["step"])
        weight, gradient, first, second, step = map(local, parts)
        rows.append(ParameterRow(weight, gradient, first, second, step, None if average is None else local(average)))
    scale = vars(optimizer).pop("grad_scale", torch.ones_like(skip))
    update_by_triton(
        rows, skip, scale, ema.share(t), rate=group["lr"], betas=group["betas"], eps=group["eps"],
        decay=group["weight_decay"],
    )  # fmt: skip


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; other tensors unchanged."""
    return tensor.to_local() if dist.is_sharded(tensor) else tensor
