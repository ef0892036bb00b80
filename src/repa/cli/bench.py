"""`repa bench RECIPE [--data DATA]`: what a recipe's step costs on this machine, and what to change next."""

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from repa.base.errors import UserError
from repa.cli import options
from repa.cli.console import say
from repa.recipes import load_recipe

if TYPE_CHECKING:
    import torch

    from repa.performance.measure import Advice, Measurement
    from repa.training.config import TrainConfig


class BenchArguments(options.Command):
    """Time a recipe's training step on this machine: images per second, MFU, memory, and the kernels that take the
    time. Ends with advice. Trains nothing, and writes only --out and --trace.
    """

    verb = "bench"
    positional = ("recipe",)

    recipe: str
    """recipe name, .yaml file, or run folder"""
    data: options.DataFolder = ""
    """Folder of prepared data; empty: random latents and tokens with the size of ImageNet at 256 pixels."""
    batch_size: tuple[int, ...] = ()
    """One or more batch sizes; empty: the recipe's."""
    precision: tuple[Literal["bf16", "fp16", "fp32"], ...] = ()
    """Precisions to measure in addition to the recipe's; empty: fp32, and bf16 if this machine is faster with it."""
    compiled: bool = False
    """Also measure compiled steps, which takes minutes."""
    rounds: int = Field(5, ge=1)
    """Rounds of measurement; each result is their median."""
    token_width: int = Field(768, ge=1)
    """Without data: channels of the random target tokens; DINOv2-B has 768."""
    out: str = ""
    """File (.json) for the results, updated after each row; empty: none."""
    trace: str = ""
    """File (.json.gz) for the timeline of two steps of the recipe, for ui.perfetto.dev; empty: none."""

    def idle(self) -> dict[str, str]:
        return {"token_width": "with --data"} if self.data else {}


def main(argv: list[str]) -> int:
    given = options.parse(BenchArguments, argv)
    recipe = load_recipe(given.recipe)
    if given.compiled and recipe.compile:
        raise UserError("--compiled has no effect: the recipe compiles its step already. Leave it out.")

    # torch's profiler would print its own stages
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from repa.base import dist, files
    from repa.base.device import peak_memory, resolved
    from repa.data import open_data
    from repa.performance.measure import table
    from repa.performance.profiling import rate, summary

    device = dist.setup()
    if dist.active():
        raise UserError("`repa bench` measures one process and its device: start it without torchrun.")
    if given.data:
        open_data(given.data)  # a wrong folder is reported before anything is measured
    for path in filter(None, (given.out, given.trace)):
        files.require_writable(path)
    if given.out:
        files.require_replaceable(given.out, ("rates", "rows"))
    # The advice is for the recipe's own step; the other steps are measured for comparison.
    own = resolved(recipe.precision, device)
    recipe = recipe.override(precision=own, init="")
    precisions = dict.fromkeys((own, *(given.precision or ("fp32", resolved("auto", device)))))
    rates = {precision: rate(precision, device) for precision in precisions}
    say(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix products: "
        + ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in rates.items()))  # fmt: skip
    results: dict[str, Any] = {"device": str(device), "rates": rates, "rows": []}
    measured = []
    first = recipe.override(batch_size=given.batch_size[0]) if given.batch_size else recipe
    for config in _variants(recipe, given, precisions):
        measurement, row = _measured(config, given, rates, device, given.trace if config == first else "")
        measured.append(measurement)
        results["rows"].append(row)
        how = f"{config.batch_size} images, {config.precision}{', compiled' * config.compile}"
        say(f"{how}: {measurement.images_per_second:.1f} images/s")
        if config == first:
            say(summary(row))
        if given.out:
            files.write_json(Path(given.out), results)
    say("", *table(measured).split("\n"), "")
    # The advice is relative to the recipe's own step.
    now = next(m for m in measured if (m.precision, m.compiled) == (own, recipe.compile))
    advice = _say_advice(now, [m for m in measured if m is not now])
    say(
        f"Peak memory: {files.size(peak_memory(device))} {'on the device' if device.type == 'cuda' else 'of the process'}."
    )
    if given.out:
        files.write_json(Path(given.out), results | {"advice": advice})
    return 0


def _variants(recipe: "TrainConfig", given: BenchArguments, precisions: Iterable[str]) -> "list[TrainConfig]":
    """The recipe in all batch sizes and precisions, as it is and compiled."""
    sizes = given.batch_size or (recipe.batch_size,)
    variants = itertools.product(sizes, precisions, {recipe.compile, recipe.compile or given.compiled})
    names = ("batch_size", "precision", "compile")
    return [recipe.override(**dict(zip(names, values, strict=True))) for values in sorted(variants)]


def _measured(
    config: "TrainConfig", given: BenchArguments, rates: dict[str, float], device: "torch.device", trace: str
) -> "tuple[Measurement, dict[str, Any]]":
    """One variant of the recipe's step, on prepared data or on random tensors."""
    from repa.performance.batches import prepared, random_batch
    from repa.performance.profiling import profile_step

    data = Path(given.data)
    batches = prepared(config, data, device) if given.data else random_batch(config, given.token_width, device)
    with batches as (config, source):
        return profile_step(config, source, rates, given.rounds, device, trace)


def _say_advice(now: "Measurement", others: Sequence["Measurement"]) -> list["Advice"]:
    """Print what would make the recipe's step faster, the largest gain first; returns it."""
    from repa.performance.measure import advise

    advice = advise(now, others)
    if not advice:
        say(f"No measured setting makes it faster. Its MFU is {now.utilisation:.0%}.")
    for number, (_, sentence) in enumerate(advice):
        say(f"{'Next' if number == 0 else 'Then'}: {sentence}")
    return advice
