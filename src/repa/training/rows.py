"""The rows of metrics.jsonl that tell how training goes; making one is what waits for the device."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.base import dist
from repa.runs import MetricsLog, layout
from repa.training.meters import Waiting, peak_memory
from repa.training.objective import Losses
from repa.training.state import TrainState


class Rows:
    """Writes rows of kind "train". The clock runs from one to the next; `restart` leaves out what was done since the last.

    Args:
        state: what is trained.
        run: its folder.
        log: where rows go.
        batches: the iterator of batches, which counts the seconds that were waited for it.
        ideal: seconds that an image takes at the machine's rate of matrix products.
        say: gets sentences about what went wrong.
    """

    def __init__(
        self, state: TrainState, run: Path, log: MetricsLog, batches: Waiting, ideal: float, device: torch.device,
        say: Callable[[str], None],
    ):  # fmt: skip
        self.state, self.run, self.log, self.batches = state, run, log, batches
        self.ideal, self.device, self.say = ideal, device, say
        self.since, self.since_step = time.perf_counter(), state.step

    def restart(self) -> None:
        self.since = time.perf_counter()

    def write(self, losses: Losses, norm: Tensor) -> None:
        """The row of this step. Raises UserError when too many steps in a row had to be skipped."""
        state, config = self.state, self.state.config
        row = {**_means(losses), "grad_norm": float(norm), **state.guard.row()}  # waits for the device
        elapsed, steps = time.perf_counter() - self.since, state.step - self.since_step
        self.since_step = state.step
        self.restart()
        state.seconds += elapsed
        # every process judges the same averaged gradients, so all stop here or none: nobody asks, or reads the folder, to go on
        if state.guard.stuck(config.max_skipped_steps):
            with dist.together():
                steps_saved = layout.checkpoint_steps(self.run)
                state.guard.require_progress(config.max_skipped_steps, state.step, row["loss"], steps_saved)
        rate = config.batch_size * steps / elapsed
        state.metrics = {
            **row, "learning_rate": state.rate, "images_per_second": rate, "utilisation": rate / dist.world() * self.ideal,
            "data_wait": self.batches.take() / steps, "peak_memory": peak_memory(self.device),
        }  # fmt: skip
        for note in state.guard.notes(row, state.step):
            self.say(note)
            self.log.line(note)
            self.log.row("event", state.step, message=note)
        self.log.line(
            f"step {state.step}/{config.num_steps}: denoising loss {row['denoising']:.4f}, {rate:.1f} images/s"
        )
        self.log.row("train", state.step, seconds=state.seconds, **_nested(state.metrics))


def _means(losses: Losses) -> dict[str, float]:
    """Loss and terms, means over the global batch, as Python numbers."""
    names = ["loss", *losses.terms]
    means = torch.stack([losses.total.mean(), *(term.mean() for term in losses.terms.values())])
    return dict(zip(names, dist.mean_over(means).tolist(), strict=True))


def _nested(values: dict[str, float]) -> dict[str, Any]:
    """'alignment/tiny@3' becomes {'alignment': {'tiny@3': ...}}."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        room, _, rest = name.partition("/")
        if rest:
            out.setdefault(room, {})[rest] = value
        else:
            out[name] = value
    return out
