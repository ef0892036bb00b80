"""Seconds per training step: ours against a plain float32 step, and against the floor that the matrix products set.

    python benchmarks/train_step.py --model SiT-S/2 --batch 16

Measured in one process, the variants in turn (A B C A B C ...), so that a machine whose speed drifts slows all of them.
"plain" is the step as research code writes it: float32, a Python loop over samples in the alignment, a loop over
parameters in the EMA, AdamW with its defaults, .item() on every step. The network is the same.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from repa.alignment.config import AlignmentConfig
from repa.base.precision import autocast
from repa.diffusion import interpolate
from repa.diffusion.interpolants import linear
from repa.encoders.contract import Features
from repa.models.config import ModelConfig
from repa.training.config import TrainConfig
from repa.training.state import build_state

FEATURE_DIM = 768  # DINOv2-B's


def configuration(args: argparse.Namespace, aligned: bool) -> TrainConfig:
    model = ModelConfig(name=args.model, latent_size=args.latent, latent_channels=4, num_classes=1000)
    depth = min(4, model.dims().depth)
    alignments = (AlignmentConfig(target="dinov2-b", depth=depth),) if aligned else ()
    return TrainConfig(model=model, alignments=alignments, batch_size=args.batch)


def our_step(config: TrainConfig, precision: str, batch: tuple, device: torch.device) -> Callable[[], None]:
    """The step of repa.training.loop, on a batch that lies in memory."""
    x, labels, tokens = batch
    state = build_state(config, {"dinov2-b": FEATURE_DIM}, device)
    features = {"dinov2-b": Features(tokens, None)} if config.alignments else {}
    groups = state.objective.trained_groups()

    def step() -> None:
        with autocast(device, precision):
            losses = state.objective(x, labels, features, state.step)
        losses.total.mean().backward()
        for group in groups:
            nn.utils.clip_grad_norm_(group, config.optimizer.max_grad_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update()
        state.step += 1

    return step


def plain_step(config: TrainConfig, batch: tuple, device: torch.device) -> Callable[[], None]:
    x, labels, tokens = batch
    objective = build_state(config, {"dinov2-b": FEATURE_DIM}, device).objective
    model, projector = objective.model, objective.alignments[0].projector if config.alignments else None
    ema = copy.deepcopy(model)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0)

    def step() -> None:
        t = torch.rand(len(x)).to(device)
        noise = torch.randn_like(x)
        x_t, velocity = interpolate(linear, x, noise, t)
        y = torch.where(torch.rand(len(x), device=device) < 0.1, model.null_label, labels)
        output = model(x_t, t, y, objective.taps)
        loss = ((output.prediction - velocity) ** 2).mean(dim=(1, 2, 3)).mean()
        if projector is not None:
            loss = loss + 0.5 * loop_alignment(projector(output.hidden[objective.taps[0]]), tokens)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for (_, average), (_, value) in zip(ema.named_parameters(), model.named_parameters(), strict=True):
                average.mul_(0.9999).add_(value, alpha=1 - 0.9999)
        loss.item(), norm.item()

    return step


def loop_alignment(projected: Tensor, target: Tensor) -> Tensor:
    loss = torch.zeros(())
    for z, y in zip(projected, target, strict=True):  # (T, F) each
        loss = loss - (F.normalize(z, dim=-1) * F.normalize(y, dim=-1)).sum(dim=-1).mean()
    return loss / len(target)


def flops(config: TrainConfig, batch: tuple) -> int:
    """Multiply-adds of the matrix products of one forward and backward, times two, counted by torch."""
    step = our_step(config, "fp32", batch, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def product_rate(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """FLOP/s of a square matrix product, the best of several."""
    a = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / min(timed(lambda: a @ a, device) for _ in range(8))


def timed(run: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--latent", type=int, default=32, help="side of the latent: 32 is 256 tokens at patch 2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    tokens = (args.latent // ModelConfig(name=args.model).dims().patch_size) ** 2
    batch = (
        torch.randn(args.batch, 4, args.latent, args.latent, device=device),
        torch.randint(1000, (args.batch,), device=device),
        torch.randn(args.batch, tokens, FEATURE_DIM, device=device),
    )
    aligned, baseline = configuration(args, True), configuration(args, False)
    variants = {
        "plain fp32, aligned": (plain_step(aligned, batch, device), aligned, torch.float32),
        "plain fp32, baseline": (plain_step(baseline, batch, device), baseline, torch.float32),
        "ours fp32, aligned": (our_step(aligned, "fp32", batch, device), aligned, torch.float32),
        "ours bf16, aligned": (our_step(aligned, "bf16", batch, device), aligned, torch.bfloat16),
        "ours bf16, baseline": (our_step(baseline, "bf16", batch, device), baseline, torch.bfloat16),
    }
    for step, _, _ in variants.values():
        timed(step, device)  # first calls pack weights and fill caches
    times: dict[str, list[float]] = {name: [] for name in variants}
    rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(args.rounds):
        for dtype, seen in rates.items():
            seen.append(product_rate(dtype, device))
        for name, (step, _, _) in variants.items():
            times[name].append(timed(step, device))

    cpu = [torch.device("cpu"), *(item.cpu() for item in batch)]
    work = {id(c): flops(c, tuple(cpu[1:])) for c in (aligned, baseline)}
    rate = {dtype: max(seen) for dtype, seen in rates.items()}
    print(
        f"{args.model}, batch {args.batch}, {tokens} tokens, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{platform.processor() or platform.machine()}; matrix product {rate[torch.float32] / 1e9:.0f} GFLOP/s float32, "
          f"{rate[torch.bfloat16] / 1e9:.0f} bf16; median of {args.rounds} rounds")  # fmt: skip
    print(f"{'':<24}{'s/step':>8}{'images/s':>10}{'floor s':>9}{'of floor':>10}{'against plain':>15}")
    rows = []
    for name, (_, config, dtype) in variants.items():
        seconds, floor = statistics.median(times[name]), work[id(config)] / rate[dtype]
        plain = times["plain fp32, aligned" if config.alignments else "plain fp32, baseline"]
        ratio = statistics.median(p / o for p, o in zip(plain, times[name], strict=True))
        rows.append({"variant": name, "seconds": seconds, "floor": floor, "against_plain": ratio})
        print(f"{name:<24}{seconds:8.3f}{args.batch / seconds:10.1f}{floor:9.3f}{floor / seconds:10.0%}{ratio:14.2f}x")
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": str(args.json), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
