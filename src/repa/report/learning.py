"""How training went beside its losses: gradient norm, learning rate, skipped steps, waiting for data, speed."""

from collections.abc import Sequence
from typing import NamedTuple

from repa.report.runs import RunRecord, is_number
from repa.report.text import figure


class Quantity(NamedTuple):
    """A key of the training rows, and how it is drawn."""

    label: str
    scale: float = 1.0  # what the logged value is multiplied by
    is_noisy: bool = True  # a running mean over faint raw values; else the line as it is
    form: str = "{}"  # of the sentence that stands in place of a flat line


QUANTITIES = {
    "grad_norm": Quantity("gradient norm", form="The gradient norm was {} throughout."),
    "learning_rate": Quantity("learning rate", is_noisy=False, form="The learning rate was {} throughout."),
    "skipped_steps": Quantity(
        "skipped steps, so far", is_noisy=False, form="Steps skipped for gradients that are not finite: {}."
    ),
    "data_wait": Quantity("wait for data (ms a step)", 1000.0, form="The wait for data was {} ms a step throughout."),
    "images_per_second": Quantity("images per second", form="Images per second: {} throughout."),
    "loss_scale": Quantity("loss scale", is_noisy=False, form="The loss scale was {} throughout."),
    "utilisation": Quantity(
        "share of the matrix-product rate", form="The share of the matrix-product rate was {} throughout."
    ),
    "peak_memory": Quantity("peak memory (GiB)", 2.0**-30, False, "Peak memory was {} GiB throughout."),
}


def logged(records: Sequence[RunRecord]) -> tuple[list[str], list[str]]:
    """(keys that are worth a curve, sentences on those that are the same in every row of every run)."""
    moving, sentences = [], []
    for key, quantity in QUANTITIES.items():
        values = {row[key] for run in records for row in run.train if is_number(row.get(key))}
        if len(values) > 1:
            moving.append(key)
        elif values:
            value = values.pop() * quantity.scale
            sentences.append(quantity.form.format(f"{value:g}" if key != "peak_memory" else figure(value)))
    return moving, sentences
