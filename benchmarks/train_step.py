"""Measure the training step: images per second, share of the machine's matrix-product rate, memory, and time by part.

    python benchmarks/train_step.py --models SiT-B/2 --batch 8 --plain
    python benchmarks/train_step.py --models SiT-S/2 SiT-B/2 SiT-L/2 SiT-XL/2 --batch 32 \
        --teachers cached online --compiled

Prints one row per combination. "online" runs a DINOv2-B with random weights on random images, "cached" keeps its tokens
in memory, and "none" trains without alignment. Random weights cost as much as trained ones. The batch is kept in
memory; `benchmarks/data.py` measures reading.

--plain compares with the step of typical research code: a Python loop over samples in the alignment, a loop over
parameters in the average, AdamW with its defaults, and .item() on every step. It is timed in float32 and also under
autocast in the precision of ours. The network is the same, and the variants take turns, so a drift in the machine's
speed affects all alike.

--return-memory keeps the C library's default of returning freed memory to the system (`repa.base.launch`). Commands of
`repa` keep freed memory.
"""

import argparse
import copy
import itertools
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from repa.alignment.config import AlignmentConfig
from repa.base import files
from repa.base.device import autocast, product_rate, timed
from repa.base.launch import keep_freed_memory
from repa.diffusion import interpolate
from repa.diffusion.flow import linear
from repa.models import Condition
from repa.models.config import ModelConfig
from repa.performance.batches import BatchSource, Synthetic, in_memory, latents
from repa.performance.measure import MeasuredStep, Measurement, measure, table
from repa.training.config import TrainConfig
from repa.training.inputs import EncoderFeatures
from repa.training.state import build_state

TEACHER = "dinov2-b"
RESOLUTION = 256  # side of an online teacher's images, which become 16 x 16 tokens


def teacher_folder(folder: Path, width: int, layers: int) -> Path:
    """Write a DINOv2 with random weights in the hub's format; 768 channels and 12 layers make a DINOv2-B."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, patch_size=14, image_size=518
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def configuration(
    args: argparse.Namespace, model: str, batch: int, teacher: str, precision: str, compiled: bool
) -> TrainConfig:
    network = ModelConfig(name=model, latent_size=args.latent, latent_channels=4, num_classes=1000)
    depth = min(8, network.dims().depth)
    alignments = () if teacher == "none" else (AlignmentConfig(target=TEACHER, depth=depth),)
    return TrainConfig(
        model=network, alignments=alignments, batch_size=batch, precision=precision, compile=compiled,
        feature_weights={TEACHER: str(args.folder)} if teacher == "online" else {},
    )  # fmt: skip


def source_of(config: TrainConfig, args: argparse.Namespace, teacher: str, flops: float = 0.0) -> BatchSource:
    """One random batch, with tokens in memory or computed by the encoder in every step."""
    device = torch.device(args.device)
    widths = {} if teacher == "none" else {TEACHER: args.width}
    synthetic = Synthetic(widths, config.model.latent_size // config.model.dims().patch_size)
    batch = synthetic.batch(config, device, RESOLUTION if teacher == "online" else 1)
    if teacher != "online":
        return in_memory(widths, batch)
    encoders = EncoderFeatures(config, cast(Any, Synthetic({}, synthetic.grid)), device)
    feed = encoders.iterate(itertools.repeat(batch), 0, lambda step: encoders.wanted)
    return BatchSource(
        encoders.dims, feed, lambda: batch, lambda batch: encoders(batch, encoders.wanted), teacher, encoder_flops=flops
    )


def plain_step(config: TrainConfig, args: argparse.Namespace, teacher: str) -> Callable[[], None]:
    device = torch.device(args.device)
    source = source_of(config, args, teacher)
    dims, tokens_of, batch = dict(source.dims), source.encode, source.data()
    x, labels = latents(batch, config.model.latent_channels), batch.labels
    objective = build_state(config, dims, device).objective
    model = objective.model
    projector: Any = next(iter(objective.alignments.values())).projector if dims else None
    ema = copy.deepcopy(model)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0)

    def step() -> None:
        t = torch.rand(len(x)).to(device)
        noise = torch.randn_like(x)
        x_t, velocity = interpolate(linear, x, noise, t)
        y = torch.where(torch.rand(len(x), device=device) < 0.1, model.null_label, labels)
        with autocast(device, config.precision):
            output = model({"x": x_t}, t, Condition(y), objective.taps)
            loss = ((output.prediction["x"] - velocity) ** 2).mean(dim=(1, 2, 3)).mean()
            if projector is not None:
                target = tokens_of(batch)[TEACHER].patches
                loss = loss + 0.5 * loop_alignment(projector(output.taps[objective.taps[0]]), target)
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
    loss = torch.zeros((), device=projected.device)
    for z, y in zip(projected, target, strict=True):  # (T, F) each
        loss = loss - (F.normalize(z, dim=-1) * F.normalize(y, dim=-1)).sum(dim=-1).mean()
    return loss / len(target)


def against_plain(
    args: argparse.Namespace, model: str, batch: int, teacher: str, precision: str
) -> tuple[float, float, float]:
    """Median seconds of the plain float32 step, and median time ratios of both plain steps to ours; all take turns."""
    device = torch.device(args.device)
    config = configuration(args, model, batch, teacher, precision, False)
    ours, alike = MeasuredStep(config, source_of(config, args, teacher), device), plain_step(config, args, teacher)
    plain = plain_step(config.override(precision="fp32"), args, teacher)
    turns = [[timed(step, device) for step in (plain, alike, ours)] for _ in range(args.rounds + 1)][1:]
    seconds, times, alike_times = zip(*((p, p / o, a / o) for p, a, o in turns), strict=True)
    return statistics.median(seconds), statistics.median(times), statistics.median(alike_times)


def rows(args: argparse.Namespace, rates: dict[str, float]) -> Iterator[Measurement]:
    steps = (False, True) if args.compiled else (False,)
    for model, batch, teacher, precision, compiled in itertools.product(
        args.models, args.batch, args.teachers, args.precision, steps
    ):
        torch.compiler.reset()  # else torch stops compiling after a few networks of one class
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")  # as the loop
        config = configuration(args, model, batch, teacher, precision, compiled)
        source = source_of(config, args, teacher)
        yield measure(MeasuredStep(config, source, torch.device(args.device)), rates, args.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["SiT-S/2"])
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--teachers", nargs="+", default=["cached"], choices=["online", "cached", "none"])
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--compiled", action="store_true", help="also measure compiled steps")
    parser.add_argument("--plain", action="store_true", help="compare each eager row with the plain step")
    parser.add_argument("--return-memory", action="store_true", help="return freed memory to the system (CPU)")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent; 32 makes 256 tokens at patch 2")
    parser.add_argument("--width", type=int, default=768, help="width of the teacher's tokens")
    parser.add_argument("--layers", type=int, default=12, help="layers of an online teacher")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the figures to FILE.json and the table to FILE.md")
    args = parser.parse_args()
    if not args.return_memory:
        keep_freed_memory()
    device = torch.device(args.device)
    rates = {precision: product_rate(precision, device) for precision in dict.fromkeys((*args.precision, "fp32"))}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    head = (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix products: "
        + ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {precision}" for precision, rate in rates.items())
        + f"; median of {args.rounds} rounds"
    )
    print(head, flush=True)
    figures: list[Measurement] = []
    compared: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        if "online" in args.teachers:
            teacher_folder(Path(folder), args.width, args.layers)
        for row in rows(args, rates):
            figures.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            write(args, head, rates, figures, compared)  # after each row, because a time limit may end the run
        variants = itertools.product(args.models, args.batch, args.teachers, args.precision) if args.plain else ()
        for variant in variants:
            seconds, ratio, alike = against_plain(args, *variant)
            names = dict(zip(("model", "batch_size", "teacher", "precision"), variant, strict=True))
            compared.append({**names, "plain_seconds": seconds, "times_as_fast": ratio, "like_for_like": alike})
            print(sentence(compared[-1]), flush=True)
            write(args, head, rates, figures, compared)
    print("\n" + table(figures))


def sentence(row: dict) -> str:
    return (
        f"{row['model']}, batch {row['batch_size']}, {row['teacher']}: {row['precision']} is {row['times_as_fast']:.2f} times "
        f"as fast as the plain float32 step, which takes {row['plain_seconds']:.3f} s, and {row['like_for_like']:.2f} times as "
        "fast as the plain step in the same precision."
    )


def write(args: argparse.Namespace, head: str, rates: dict, figures: list[Measurement], compared: list[dict]) -> None:
    if not args.out:
        return
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("folder", "out")}
    values = {"settings": settings, "rates": rates, "rows": [f.row() for f in figures], "against_plain": compared}
    files.write_json(args.out, {"machine": head, **values})
    files.write_text(
        args.out.with_suffix(".md"), "\n".join([head, "", table(figures), "", *map(sentence, compared), ""])
    )


if __name__ == "__main__":
    main()
