"""Run all measurements of `benchmarks/gpu.sh` on a GPU, in one process, the most important first.

    python benchmarks/gpu.py --out results/gpu.json --seconds 380

Measures the rates of bf16 and float32 products, memory bandwidth, the products of a block in bf16 and fp8, and
attention kernels. Then come training steps: eager, compiled by block, with fp8 linear layers, with other sizes, and
with the whole step as one graph. Results are written after each row. A row is skipped when the remaining time is too
short; a row that fails is recorded and does not stop the others. --device cpu tries everything with a tiny network.
"""

import argparse
import dataclasses
import functools
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from repa.base import files
from repa.base.device import timed
from repa.base.launch import keep_freed_memory
from repa.performance.costs import encoder_cost
from repa.performance.counts import product_shapes
from repa.performance.profiling import device_state, profile_step, rate, shape_rates, summary
from repa.training.acceleration import kernel_seconds
from train_step import configuration, source_of, teacher_folder


@dataclasses.dataclass(frozen=True)
class Row:
    """A training step to measure, and its time limit in seconds."""

    model: str
    batch: int
    teacher: str
    seconds: float
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


PLAN = (
    Row("SiT-XL/2", 256, "online", 40),
    Row("SiT-XL/2", 256, "online", 60, {"compile": True}),
    Row("SiT-XL/2", 256, "online", 60, {"compile": True, "fp8": True}),
    Row("SiT-XL/2", 256, "online", 60, {"compile": True, "fused_norm": True, "fused_update": True}),
    Row("SiT-XL/2", 256, "cached", 40, {"compile": True}),
    Row("SiT-B/2", 256, "online", 25, {"compile": True}),
    Row("SiT-L/2", 256, "online", 35, {"compile": True}),
    Row("SiT-B/2", 256, "cached", 25, {"compile": True}),
    Row("SiT-XL/2", 256, "online", 150, {"compile": True, "compile_scope": "step"}),
)
TINY = (Row("SiT-S/8", 2, "cached", 60), Row("SiT-S/8", 2, "online", 60))


class Results:
    """A JSON file that is complete after each part."""

    def __init__(self, out: Path, seconds: float):
        self.out, self.seconds, self.began = out, seconds, time.monotonic()
        self.found: dict[str, Any] = {"torch": torch.__version__, "rows": [], "failed": {}}

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def part(self, name: str, needs: float, run: Callable[[], Any]) -> Any:
        """Run a part if enough time is left; returns None when it did not finish."""
        if self.left < needs:
            self.found["failed"][name] = f"not started: {self.left:.0f} s were left, {needs:.0f} are needed"
            print(f"{name}: {self.found['failed'][name]}", flush=True)
            return None
        begin, result = time.monotonic(), None
        try:
            result = run()
        except Exception:
            self.found["failed"][name] = traceback.format_exc(limit=-6)
            print(f"{name} failed:\n{self.found['failed'][name]}", flush=True)
        print(f"{name}: {time.monotonic() - begin:.1f} s, {self.left:.0f} s left", flush=True)
        if self.out:
            files.write_json(self.out, self.found)
        return result


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy on the device, counting reads and writes."""
    x = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * len(x) / min(timed(lambda: y.copy_(x), device) for _ in range(8))


def fp8_rates(config: Any, device: torch.device) -> dict[str, float]:
    """FLOP/s of a block's forward products in e4m3 with one scale per tensor."""
    rates, one = {}, torch.ones((), device=device)
    for name, (m, k, n) in product_shapes(config).items():
        if not name.endswith("forward"):
            continue
        a = torch.randn(m, k, device=device).to(torch.float8_e4m3fn)
        b = torch.randn(n, k, device=device).to(torch.float8_e4m3fn).t()
        product = lambda a=a, b=b: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)  # noqa: E731
        rates[name] = 2 * m * k * n / min(timed(product, device) for _ in range(8))
    return rates


def row_of(args: argparse.Namespace, row: Row, rates: dict[str, float], trace: str) -> dict[str, Any]:
    config = configuration(args, row.model, row.batch, row.teacher, "bf16", False).override(**row.changes)
    flops = float(encoder_cost("dinov2-b", 16).cost.forward) if row.teacher == "online" and args.layers == 12 else 0.0
    source = source_of(config, args, row.teacher, flops)
    figures, seen = profile_step(config, source, rates, args.rounds, torch.device(args.device), trace)
    print(
        f"{row.model}, batch {row.batch}, {row.teacher} {row.changes or 'eager'}: {figures.images_per_second:.1f} images/s, "
        f"{figures.utilisation:.0%} of the rate, {figures.utilisation_with_encoder:.0%} with the encoder, first step "
        f"{figures.first_seconds:.1f} s\n{summary(seen)}",
        flush=True,
    )
    return {**seen, "changes": row.changes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trace", default="", help="write the timeline of the first compiled row to this FILE.json.gz")
    parser.add_argument("--seconds", type=float, default=380, help="total time limit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    keep_freed_memory()
    tiny = args.device == "cpu"
    args.latent, args.width, args.layers = (16, 64, 1) if tiny else (32, 768, 12)
    device, results = torch.device(args.device), Results(args.out, args.seconds)
    found, plan = results.found, TINY if tiny else PLAN
    first = plan[0]
    config = configuration(args, first.model, first.batch, "none", "bf16", False)
    dims = config.model.dims()
    shape = (first.batch, dims.num_heads, (args.latent // dims.patch_size) ** 2, dims.hidden_dim // dims.num_heads)

    def ceilings() -> None:
        found["rates"] = {name: rate(name, device) for name in ("bf16", "fp32")}
        found["bandwidth"], found["device_state"] = bandwidth(device), device_state(device)

    results.part("ceilings", 10, ceilings)
    if "rates" not in found:
        return
    results.part("products", 10, lambda: found.update(products=shape_rates(config, device)))
    results.part("fp8 products", 10, lambda: found.update(fp8_products=fp8_rates(config, device)))
    results.part("attention", 10, lambda: found.update(attention=kernel_seconds(shape, torch.bfloat16, device)))
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        teacher_folder(Path(folder), args.width, args.layers)
        for number, row in enumerate(plan):
            trace = args.trace if number == min(1, len(plan) - 1) else ""
            name = " ".join(map(str, (row.model, row.batch, row.teacher, *row.changes)))
            seen = results.part(name, row.seconds, functools.partial(row_of, args, row, found["rates"], trace))
            if seen:
                found["rows"].append(seen)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    results.part("end", 0, lambda: None)


if __name__ == "__main__":
    main()
