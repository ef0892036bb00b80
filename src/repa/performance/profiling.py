"""Profile of a step: kernels by category, the busy share of the device, and a trace.

On CUDA these are kernels of the device; on a CPU they are PyTorch's operators, each with its self time.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from repa.base.device import DTYPES, product_rate, sustained_product_rate, timed
from repa.performance.batches import BatchSource
from repa.performance.counts import product_shapes
from repa.performance.measure import MeasuredStep, Measurement, measure
from repa.training.acceleration import fastest_kernels
from repa.training.config import TrainConfig

CATEGORIES = {  # in order: a name belongs to the first category that matches
    "attention": r"flash|fmha|attention|sdpa|mha",
    "optimizer": r"adam|lerp|muon|multi_tensor|foreach",
    "product": r"gemm|cutlass|nvjet|xmma|cublas|\bmm\b|addmm|\bbmm\b|baddbmm|convolution|conv2d|_scaled_mm|splitk",
    "copy": r"memcpy|memset|copy|_to_copy|\bto\b|fill_|zero_|\bcat\b|clone|contiguous|embedding",
    "norm and sum": r"norm|reduce|softmax|\bsum\b|\bmean\b|triton_red|triton_per",
    "pointwise": r"elementwise|gelu|silu|\bmul\b|\badd\b|addcmul|\bdiv\b|\bsub\b|pow|sigmoid|where|triton_poi|triton_",
}
OTHER = "other"
LONGEST = 25


@dataclass(frozen=True)
class KernelProfile:
    """Of one step."""

    seconds: float
    categories: dict[str, float]
    """Seconds per element of CATEGORIES and "other"; overlapping streams each count."""
    busy: float
    """Share of the time in which the device was busy."""
    launches: float
    """Number of kernels on the device, or of operators on the CPU."""
    longest: list[dict[str, Any]]
    """Name, seconds and number of calls of the LONGEST kernels."""


def category_of(name: str) -> str:
    """Of a kernel or operator."""
    return next((c for c, pattern in CATEGORIES.items() if re.search(pattern, name.lower())), OTHER)


def profiled(
    run: Callable[[], object], device: torch.device, *, steps: int = 2, trace: str | Path = ""
) -> KernelProfile:
    """Profile `steps` calls of `run`, a step that has already run once.

    Args:
        trace: file for the timeline (.json or .json.gz), which chrome://tracing and ui.perfetto.dev show; empty: none.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities, acc_events=True) as recorded:
        seconds = timed(lambda: [run() for _ in range(steps)], device)
    if trace:
        recorded.export_chrome_trace(str(trace))
    rows = [
        (row.key, (row.self_device_time_total if on_cuda else row.self_cpu_time_total) / 1e6, row.count)
        for row in recorded.key_averages()
        if not on_cuda or row.device_type == DeviceType.CUDA
    ]
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
    categories = dict.fromkeys((*CATEGORIES, OTHER), 0.0)
    for name, spent, _ in rows:
        categories[category_of(name)] += spent / steps
    if on_cuda:
        # Kernels of several streams overlap: their sum can exceed the time of the step, their union cannot.
        spans = [(e.time_range.start, e.time_range.end) for e in recorded.events() if e.device_type == DeviceType.CUDA]
        busy = union(spans) / 1e6 / seconds
    else:
        busy = sum(spent for _, spent, _ in rows) / seconds
    longest = [{"name": name[:120], "seconds": spent / steps, "calls": n / steps} for name, spent, n in rows[:LONGEST]]
    return KernelProfile(seconds / steps, categories, busy, sum(n for _, _, n in rows) / steps, longest)


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of the spans."""
    covered, end = 0.0, float("-inf")
    for begin, finish in sorted(spans):
        covered += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return covered


def device_state(device: torch.device) -> dict[str, str]:
    """Clock, power, temperature and throttling as reported by the driver's tool; empty without the tool."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    # Recorded with a rate: nothing else shows that heat or the power limit slows the device down.
    asked = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(asked, (part.strip() for part in answer.strip().split(",")), strict=False))


def rate(precision: str, device: torch.device) -> float:
    """FLOP/s of matrix products: on CUDA over three seconds, at sustained clocks; elsewhere the best of several."""
    return (sustained_product_rate if device.type == "cuda" else product_rate)(precision, device)


def shape_rates(config: TrainConfig, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """FLOP/s of each of `product_shapes`, with the memory layout of autograd: the best of several."""
    dtype, rates = DTYPES[config.precision], {}
    for name, (m, k, n) in product_shapes(config).items():
        left, right = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        if name.endswith("forward"):  # x @ weight.T
            right = right.t().contiguous().t()
        elif name.endswith("weight"):  # gradient.T @ x
            left = left.t().contiguous().t()
        rates[name] = 2 * m * k * n / min(timed(lambda: left @ right, device) for _ in range(repeats))  # noqa: B023
    return rates


def profile_step(
    config: TrainConfig, source: BatchSource, rates: Mapping[str, float], rounds: int, device: torch.device,
    trace: str | Path = "",
) -> tuple[Measurement, dict[str, Any]]:  # fmt: skip
    """Time, then profile, a step of the training loop; returns the measurement and a row of all values for JSON."""
    # Each network is compiled again, and torch stops compiling a class after a few graphs.
    torch.compiler.reset()
    # as in the loop: TF32 for the float32 products that remain in half precision; fp32 means true float32
    torch.set_float32_matmul_precision("highest" if config.precision == "fp32" else "high")
    with fastest_kernels(config, 1, device) as attention:
        step = MeasuredStep(config, source, device)
        figures = measure(step, rates, rounds)
        profile = profiled(step, device, trace=trace)
    # A block's products are narrower than the square one behind the rate: their own rate bounds the utilisation.
    shapes = {name: found / rates[config.precision] for name, found in shape_rates(config, device).items()}
    row = {
        **figures.row(), "compile_scope": config.compile_scope if config.compile else "", "profile": vars(profile),
        "attention": dict(attention), "products_of_the_rate": shapes, "device_state": device_state(device),
    }  # fmt: skip
    return figures, row


def summary(row: Mapping[str, Any]) -> str:
    """The profile of a row as text."""
    profile = row["profile"]
    spent = sum(profile["categories"].values())
    shares = ", ".join(
        f"{name} {seconds / spent:.0%}"
        for name, seconds in sorted(profile["categories"].items(), key=lambda item: -item[1])
        if seconds / spent >= 0.005
    )
    products = row["products_of_the_rate"].values()
    return (
        f"Kernels: {shares}; {profile['launches']:,.0f} per step; the device is busy {profile['busy']:.0%} of the time. The products "
        f"of a block reach {sum(products) / len(products):.0%} of the rate of a large square product."
    )
