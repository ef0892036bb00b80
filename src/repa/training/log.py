"""The training log: entries of losses, rates and memory; only logging waits for the device."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.alignment import Alignment
from repa.base import dist
from repa.base.device import peak_memory, quick_product_rate
from repa.models.routing import tokens_at
from repa.runs import MetricsLog
from repa.training.inputs import TimedIterator
from repa.training.objective import Losses, Objective
from repa.training.state import TrainState

ONCE = ("adaLN_modulation", "t_embedder")  # matrices that an image passes once; all others see each of its tokens
FORWARD_AND_BACKWARD = 3  # a product has two gradients, each as large as itself


class TrainingLog:
    """Writes log entries of kind "train". The clock runs between entries; `restart` excludes the time since the last.

    Args:
        state: what is trained.
        run: its folder.
        log: the log of the run.
        batches: the iterator of batches, which counts the time spent waiting.
        say: called with warnings.
    """

    def __init__(
        self, state: TrainState, run: Path, log: MetricsLog, batches: TimedIterator, device: torch.device,
        say: Callable[[str], None],
    ):  # fmt: skip
        self.state, self.run, self.log, self.batches = state, run, log, batches
        self.ideal, self.device, self.say = ideal_seconds(state.objective, state.config.precision, device), device, say
        self.since, self.since_step = time.perf_counter(), state.step

    def restart(self) -> None:
        """Exclude the time since the last entry, which was not training."""
        self.since = time.perf_counter()

    def write(self, losses: Losses, norm: Tensor) -> None:
        """Write the entry of this step. Raises UserError after too many consecutive skipped steps."""
        state, config = self.state, self.state.config
        row = {**_global_means(losses), "grad_norm": float(norm), **state.guard.row()}  # waits for the device
        elapsed, steps = time.perf_counter() - self.since, state.step - self.since_step
        self.since_step = state.step
        self.restart()
        state.seconds += elapsed
        state.guard.require_progress(config.max_skipped_steps, state.step, row["loss"], self.run)
        rate = config.batch_size * steps / elapsed
        state.metrics = {
            **row, "learning_rate": state.rate, "images_per_second": rate, "utilisation": rate / dist.world() * self.ideal,
            "data_wait": self.batches.take() / steps, "peak_memory": peak_memory(self.device),
        }  # fmt: skip
        for note in state.guard.notes(row, state.step):
            self.say(note)
            self.log.line(note)
            self.log.row("event", state.step, message=note)
        self.log.line(f"step {state.step}/{config.num_steps}: {readable(state.metrics)}")
        self.log.row("train", state.step, seconds=state.seconds, **_nested_by_slash(state.metrics))


def readable(metrics: dict[str, float]) -> str:
    """One line of text: the denoising loss, the loss of each alignment, and the rate."""
    terms = [
        f", {name.replace('/', ' loss ')} {value:.4f}"
        for name, value in metrics.items()
        if name.startswith("alignment/")
    ]
    return f"denoising loss {metrics['denoising']:.4f}{''.join(terms)}, {metrics['images_per_second']:.1f} images/s"


def _global_means(losses: Losses) -> dict[str, float]:
    """Loss and terms, means over the global batch, as Python numbers."""
    names = ["loss", *losses.terms]
    # Stacked, so that all terms cost one reduction and one wait for the device.
    means = torch.stack([losses.total.mean(), *(term.mean() for term in losses.terms.values())])
    return dict(zip(names, dist.mean_over(means).tolist(), strict=True))


def _nested_by_slash(values: dict[str, float]) -> dict[str, Any]:
    """'alignment/tiny@3' becomes {'alignment': {'tiny@3': ...}}."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        room, _, rest = name.partition("/")
        if rest:
            out.setdefault(room, {})[rest] = value
        else:
            out[name] = value
    return out


def flops_of(objective: Objective) -> float:
    """FLOPs of the matrix products of network and projectors for one image, forward and backward, from their shapes.

    A multiply and an add are two. `performance/counts.py` counts them in seconds; this takes no time at the start of a run.
    """
    model, products = objective.model, 0
    for name, p in objective.named_parameters():
        if p.ndim > 1 and "y_embedder" not in name:
            once = any(part in name for part in ONCE)
            products += 2 * p.numel() * (1 if once else tokens_at(model.route, _depth_of(name, objective), model.grid))
    seen = [tokens_at(model.route, depth, model.grid) for depth in range(1, model.depth + 1)]
    attention = sum(2 * (2 * tokens**2 * model.hidden_dim) for tokens in seen)  # queries with keys, weights with values
    return float(FORWARD_AND_BACKWARD * (products + attention))


def _depth_of(name: str, objective: Objective) -> int:
    """The block of a parameter, or of its projector's tap; 0: none, so it processes all tokens."""
    room, *path = name.split(".")
    if room == "alignments":
        term = objective.alignments[path[0]]
        assert isinstance(term, Alignment)
        return term.tap.depth
    return int(path[1]) + 1 if path[0] == "blocks" else 0


def ideal_seconds(objective: Objective, precision: str, device: torch.device) -> float:
    """Seconds that this device needs for the matrix products of one image at its full rate.

    NaN for fp16 on a CPU, which is emulated and has no single rate.
    """
    if precision == "fp16" and device.type == "cpu":
        return math.nan
    return flops_of(objective) / quick_product_rate(precision, device)
