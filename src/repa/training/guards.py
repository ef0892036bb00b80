"""What keeps a run sound: steps with a gradient that is not finite are skipped on the device, loss scaling, spikes.

Every process sees the same gradient, so all decide alike, and nothing waits for the device but `row`.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from repa.base.errors import UserError
from repa.training.ema import local

SPIKE = 10.0  # times the running median
REMEMBERED, ENOUGH = 100, 10  # rows of the median; rows before it says anything
# the rule of torch.amp.GradScaler: halve after a skipped step, double after so many good ones in a row
FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000


class Guard:
    """Judges every step, and counts and scales as it says.

    Args:
        precision: of the run; fp16 scales the loss, so that small gradients do not vanish.
        device: where gradients are.
    """

    def __init__(self, precision: str, device: torch.device):
        self.scales = precision == "fp16"
        # skipped steps in all and in a row; largest finite norm since the last row; loss scale and good steps since it changed
        self.skipped, self.in_row, self.largest, self.good = (torch.zeros((), device=device) for _ in range(4))
        self.scale = torch.full((), FIRST_SCALE if self.scales else 1.0, device=device)
        self._reported = 0.0
        self._norms: deque[float] = deque(maxlen=REMEMBERED)

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call backward on."""
        return loss * self.scale if self.scales else loss

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the loss scale out of the gradients, before they are clipped."""
        if self.scales:
            gradients = [local(p.grad) for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / self.scale)  # exact: the scale is a power of two

    @torch.no_grad()
    def judge(self, norms: Sequence[Tensor]) -> Tensor:
        """1.0 on the device when a gradient norm is not finite, so that the step must be skipped; else 0.0."""
        finite = torch.isfinite(torch.stack(list(norms)))
        skip = 1.0 - finite.all().float()
        self.skipped = self.skipped + skip
        self.in_row = (self.in_row + 1.0) * skip
        self.largest = torch.where(finite[0], torch.maximum(self.largest, norms[0]), self.largest)
        if self.scales:
            good = (self.good + 1.0) * (1.0 - skip)
            grows = (good >= GROWTH_STEPS).float()
            self.scale = self.scale * (1.0 - 0.5 * skip) * (1.0 + grows)
            self.good = good * (1.0 - grows)
        return skip

    def row(self) -> dict[str, float]:
        """Values for the row of metrics (waits for the device); the largest norm begins anew."""
        skipped, largest, scale = torch.stack([self.skipped, self.largest, self.scale]).tolist()
        self.largest = torch.zeros_like(self.largest)
        values = {"skipped_steps": skipped, "grad_norm_max": largest}
        return {**values, "loss_scale": scale} if self.scales else values

    def notes(self, row: dict[str, float], step: int) -> list[str]:
        """Sentences about what happened since the last row: skipped steps, and a gradient norm far above its median."""
        notes, new = [], int(row["skipped_steps"] - self._reported)
        self._reported = row["skipped_steps"]
        if new:
            lowered = f", the loss scale is now {row['loss_scale']:g}" if self.scales else ""
            notes.append(
                f"{new} of the steps up to {step:,} had a gradient that is not finite and were skipped{lowered}."
            )
        usual = statistics.median(self._norms) if len(self._norms) >= ENOUGH else float("inf")
        if row["grad_norm_max"] > SPIKE * usual:
            notes.append(
                f"The gradient norm rose to {row['grad_norm_max']:.3g} by step {step:,}, "
                f"{row['grad_norm_max'] / usual:.0f} times its running median of {usual:.3g}."
            )
        if row["grad_norm_max"] > 0:
            self._norms.append(row["grad_norm_max"])
        return notes

    def stuck(self, allowed: int) -> bool:
        """Were more than `allowed` steps in a row skipped (waits for the device)?"""
        return int(self.in_row) > allowed

    def require_progress(self, allowed: int, step: int, loss: float, checkpoints: Sequence[int]) -> None:
        """UserError after more than `allowed` skipped steps in a row (waits for the device). `checkpoints`: steps of those there are."""
        if not self.stuck(allowed):
            return
        in_row = int(self.in_row)
        good = f"The checkpoint of step {checkpoints[-1]} is good. " if checkpoints else ""
        raise UserError(
            f"The gradient was not finite in {in_row} steps in a row, up to step {step} (loss {loss}): training stopped and "
            f"wrote nothing of it. {good}Look at the data, or start another --out with a lower --optimizer.learning-rate, "
            "--precision fp32 or --model.qk-norm layer."
        )

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps (waits for the device)."""
        names = ("skipped", "in_row", *(("scale", "good") if self.scales else ()))
        return {f"guard_{name}": float(getattr(self, name)) for name in names}

    def load(self, counters: dict[str, float]) -> None:
        """Take up the state of a checkpoint; one that was written before there were guards has none."""
        for name in ("skipped", "in_row", "scale", "good"):
            if f"guard_{name}" in counters:
                setattr(self, name, torch.full_like(getattr(self, name), counters[f"guard_{name}"]))
        self._reported = float(self.skipped)
