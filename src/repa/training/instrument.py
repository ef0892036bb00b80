"""The instrument of `repa bench` and benchmarks/gpu.sh: rates of a machine, and one way to run the step, measured and profiled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from repa.alignment.targets import Need
from repa.base.device import product_rate, sustained_product_rate
from repa.data import Batch
from repa.encoders.contract import Features
from repa.encoders.cost import encoder_cost
from repa.encoders.loading import weights_for
from repa.models import Condition
from repa.training.attention import fastest_kernels
from repa.training.config import TrainConfig
from repa.training.measure import Feed, Figures, Step, measure, shape_rates
from repa.training.profiling import device_state, profiled


@dataclass(frozen=True)
class Source:
    """Where a measured step's batches come from."""

    dims: Mapping[str, int]
    """Widths of tokens by encoder."""
    feed: Feed
    data: Callable[[], Batch]
    """Makes a batch by itself."""
    teacher: Callable[[Batch], Mapping[str, Features]]
    """Makes a batch's tokens by itself."""
    where: str
    """online, cached or none."""
    encoder_flops: float = 0.0
    """Of the encoders that run in the step, for one image."""
    condition: Callable[[Batch], Condition] = lambda batch: Condition(batch.labels)
    """What a batch is conditioned on; a network that reads text and is given none has the empty text."""


def rate(precision: str, device: torch.device) -> float:
    """FLOP/s of matrix products: on CUDA those of three seconds, whose clocks last; elsewhere the best of several."""
    return (sustained_product_rate if device.type == "cuda" else product_rate)(precision, device)


def flops_of_encoders(needs: tuple[Need, ...], grid: int, config: TrainConfig) -> float:
    """For one image."""
    costs = (encoder_cost(need.encoder, grid, weights_for(need.encoder, config.feature_weights)) for need in needs)
    return float(sum(found.cost.forward for found in costs))


def observed(
    config: TrainConfig, source: Source, rates: Mapping[str, float], rounds: int, device: torch.device,
    trace: str | Path = "",
) -> tuple[Figures, dict[str, Any]]:  # fmt: skip
    """A step in the loop's own way, timed, then profiled; the figures, and a row of all that was seen, for JSON."""
    torch.compiler.reset()  # each network is compiled anew, and only so many of one class would be
    # as the loop: TF32 for the float32 products that remain in half precision; fp32 means float32
    torch.set_float32_matmul_precision("highest" if config.precision == "fp32" else "high")
    with fastest_kernels(config, 1, device) as attention:
        step = Step(config, source.dims, source.feed, device, source.condition)
        figures = measure(step, rates, rounds, source.data, source.teacher, source.where, source.encoder_flops)
        profile = profiled(step, device, trace=trace)
    shapes = {name: found / rates[config.precision] for name, found in shape_rates(config, device).items()}
    row = {
        **figures.row(), "compile_scope": config.compile_scope if config.compile else "", "profile": vars(profile),
        "attention": dict(attention), "products_of_the_rate": shapes, "device_state": device_state(device),
    }  # fmt: skip
    return figures, row


def summary(row: Mapping[str, Any]) -> str:
    """What a row saw beside its figures, for people."""
    profile = row["profile"]
    spent = sum(profile["categories"].values())
    shares = ", ".join(
        f"{name} {seconds / spent:.0%}"
        for name, seconds in sorted(profile["categories"].items(), key=lambda item: -item[1])
        if seconds / spent >= 0.005
    )
    products = row["products_of_the_rate"].values()
    return (
        f"Kernels: {shares}; {profile['launches']:,.0f} a step, the device busy {profile['busy']:.0%} of the time. The products of "
        f"a block run at {sum(products) / len(products):.0%} of the rate of a large square one."
    )
