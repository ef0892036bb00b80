"""`repa estimate RECIPE --data DATA --devices K [overrides]`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from repa.autoencoders import AUTOENCODER
from repa.base.errors import UserError, choices
from repa.base.reporting import duration
from repa.cli import options
from repa.cli.console import say
from repa.cli.train import about_passes, of_recipe
from repa.diffusion.config import Guidances
from repa.performance import DEVICES
from repa.recipes import RECIPES
from repa.recipes.recipe import IMAGES as IMAGENET
from repa.runs import layout
from repa.training.config import TrainConfig

if TYPE_CHECKING:
    from repa.models.cost import Cost
    from repa.performance.estimate import Estimate, Passes


CPU = "cpu"  # this machine


class EstimateArguments(TrainConfig, options.Command):
    """Predict the cost of a recipe without downloading or training: parameters, FLOPs, device memory, disk, time, and
    whether stored tokens pay off. Any setting of the recipe can be overridden as in `repa train`.
    """

    verb = "estimate"
    positional = ("recipe",)

    recipe: str
    """recipe name, .yaml file, or run folder"""
    data: options.DataFolder = ""
    """Folder of prepared data, whose images, classes, resolution and autoencoder the estimate uses."""
    images: int = Field(0, ge=0)
    """Number of images, flipped copies included; 0: that of --data or of the run, otherwise ImageNet's 1,281,167."""
    classes: int = Field(0, ge=0)
    """Number of classes; 0: that of --data or of the run, otherwise ImageNet's 1,000."""
    devices: int = Field(1, ge=1)
    """Devices that share the batch."""
    device: str = "h100"
    """Device, such as h100 or rtx4090, or cpu: this machine, measured; for others give `--tflops` and `--memory`."""
    tflops: float = Field(0.0, ge=0)
    """Peak TFLOP/s of a device in the precision of the run; 0: that of --device."""
    memory: float = Field(0.0, ge=0)
    """Memory of a device in GB, to predict whether the run fits; 0: that of --device."""
    utilisation: float = Field(0.35, gt=0, le=1)
    """MFU: the share of the peak that the run reaches; `repa bench` measures it."""
    resolution: int = Field(0, ge=0)
    """Resolution in pixels; 0: that of --data, the recipe or the run, otherwise 256."""
    samples: int = Field(50_000, ge=1)
    """Number of samples after training."""
    sample_steps: int = Field(250, ge=1)
    """Steps of the sampler euler_maruyama."""
    sample_guidance: Guidances = ("cfg:scale=1.8,high=0.7",)
    """Guidances of the samples; a guided step takes two network calls."""

    def idle(self) -> dict[str, str]:
        of_device = {"device": "with --tflops"} if self.tflops else {}
        return super().idle() | of_device | ({} if self.devices > 1 else {"parallel": "with one device"})

    @field_validator("device")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in (known := [CPU, *DEVICES]):
            raise ValueError(
                f"{name!r} is not a known device{choices(name, known)} For others give --tflops and --memory."
            )
        return name


def main(argv: list[str]) -> int:
    given, config = of_recipe(EstimateArguments, argv)
    if given.device == CPU and given.devices > 1 and not given.tflops:
        raise UserError(
            f"--devices is {given.devices}, but --device cpu is this whole machine, and processes share it: leave --devices out. "
            "For several machines give --tflops, the peak of one."
        )
    images, classes, resolution = given.images, given.classes, given.resolution
    if given.data:
        from repa.data import open_data

        data = open_data(given.data)
        images, classes, resolution = images or len(data), classes or data.num_classes, resolution or data.resolution
        config = config.override(autoencoder=config.autoencoder or data.autoencoder)
    else:
        images = images or layout.read_data(Path(given.recipe)).get("num_images", 0)
    images, classes = images or IMAGENET, classes or 1000
    # The autoencoder of a run is that of its data; without data the recipe tells whether images are the latents.
    pixels = RECIPES[given.recipe].pixels if given.recipe in RECIPES else 0
    if not config.autoencoder:
        config = config.override(autoencoder="pixels" if pixels else AUTOENCODER)
    if given.device == CPU and not given.tflops:
        peak, memory = _of_this_machine(config.precision)
    else:
        peak, memory = (given.tflops, 0) if given.tflops else DEVICES[given.device]

    from repa.diffusion import build_process
    from repa.performance.estimate import estimate, passes_of, side_of

    resolution = resolution or pixels or side_of(config)
    estimated = estimate(
        config, num_images=images, num_devices=given.devices, resolution=resolution,
        rate=peak * 1e12 * given.utilisation, num_classes=classes,
    )  # fmt: skip
    where = f"{given.devices} x {'a device' if given.tflops else given.device} of {peak:.4g} TFLOP/s"
    theirs = "" if {"device", "tflops"} & given.model_fields_set else "; --device or --tflops for yours"
    memory = given.memory or memory
    whose = (
        "a device" if given.memory or given.tflops else "this machine" if given.device == CPU else f"one {given.device}"
    )
    fits = fitting(estimated, memory, whose, classes, resolution) if memory else []
    say(*report(estimated, f"{where} at {given.utilisation:.0%} utilisation (assumed{theirs})", fits))
    if note := about_passes(estimated.config, images):
        say("", note)
    asked = given.sample_steps, given.sample_guidance, build_process(estimated.config.diffusion).shift
    say(*sampling(estimated, passes_of(*asked), given))
    return 0


def _of_this_machine(precision: str) -> tuple[float, float]:
    """TFLOP/s of matrix products on the CPU in the precision of the run, measured in seconds, and GB of memory."""
    import torch

    from repa.base.device import quick_product_rate, resolved

    device = torch.device("cpu")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return quick_product_rate(resolved(precision, device), device) / 1e12, round(memory / 1e9, 1)


def report(estimated: "Estimate", machine: str, fits: Sequence[str] = ()) -> list[str]:
    """The estimate as lines of text, ending with `fits`."""
    config, model = estimated.config, estimated.config.model
    whose = "  (ImageNet; give --data or --images for yours)" if estimated.num_images == IMAGENET else ""
    head = (
        f"{model.name}, latents {model.latent_channels} x {model.latent_size} x {model.latent_size} of "
        f"{config.autoencoder}, {estimated.tokens} tokens; batch {config.batch_size}, {config.num_steps:,} steps, "
        f"{estimated.seen / estimated.num_images:.1f} epochs of {estimated.num_images:,} images{whose}"
    )
    return [head, *_networks(estimated), *_memory(estimated), *fits, *_disk(estimated), *_time(estimated, machine)]


def _networks(estimated: "Estimate") -> list[str]:
    lines = ["", _row("", "parameters", "GFLOP/image"), _network("network", estimated.network, "forward and backward")]
    if estimated.config.alignments:
        lines.append(_network("projectors", estimated.projectors, "forward and backward"))
    if estimated.averaged:
        lines.append(_row("averaged network", "", f"{estimated.averaged / 1e9:,.1f}", "forward, as a target"))
    for name, encoder in estimated.encoders.items():
        lines.append(
            _network(name, encoder.cost, f"{estimated.share(name):.1%} of the network's, unless its tokens are stored")
        )
    if estimated.autoencoder.stores_moments:
        lines.append(_network(estimated.config.autoencoder, estimated.autoencoder.cost, "encodes once per image"))
    return lines


def _network(name: str, cost: "Cost", note: str) -> str:
    return _row(name, f"{cost.parameters / 1e6:,.1f} M", f"{cost.training / 1e9:,.1f}", note)


def _memory(estimated: "Estimate") -> list[str]:
    held = estimated.memory(cached=False)
    lines = ["", f"memory of a device ({estimated.parallel}; without kernel workspaces)"]
    return [
        *lines,
        *(_row(what, _size(size)) for what, size in held.items() if size),
        _row("sum", _size(sum(held.values()))),
    ]


def fitting(estimated: "Estimate", memory: float, whose: str, classes: int, resolution: int) -> list[str]:
    """Lines that tell whether it fits into `memory` GB, and what would make it fit."""
    from repa.performance.fitting import memory_options, needed

    room = memory * 1e9
    if needed(estimated) <= room:
        return [f"  fits in the {memory:g} GB of {whose}"]
    ways = memory_options(estimated, room, num_classes=classes, resolution=resolution)
    said = f"  does not fit in the {memory:g} GB of {whose}"
    if not ways:
        return [f"{said}, nor with a smaller batch, checkpointing or a smaller network: use more or larger devices"]
    return [
        f"{said}; it fits with any of these:",
        *(f"    {w.options:<40}{_size(w.needed):>12}  {w.price}" for w in ways),
    ]


def _disk(estimated: "Estimate") -> list[str]:
    lines = ["", f"disk for {estimated.num_images:,} images"]
    pixels = 3 * (estimated.config.model.latent_size * estimated.autoencoder.factor) ** 2
    use = "these are the latents"
    if estimated.autoencoder.stores_moments:
        use = "only for encoders that run in training, and for metrics"
        lines.append(_row("latents", _size(estimated.num_images * estimated.moments_bytes())))
    lines.append(_row("images", _size(estimated.num_images * pixels), note=use))
    per_second = estimated.seen / estimated.training_seconds(cached=True)
    for name in estimated.encoders:
        for form in estimated.forms(name):
            size = estimated.tokens_bytes(name, form)
            note = f"read at {_size(size * per_second)}/s by all devices"
            lines.append(_row(f"{name} as {form}", _size(estimated.num_images * size), note=note))
    return lines


def _time(estimated: "Estimate", machine: str) -> list[str]:
    lines = ["", f"time on {machine}", _row("", "prepare", "train")]
    for what, cached in (("encoders in every step", False), ("stored tokens", True)):
        if cached and not estimated.storable:
            break
        times = (estimated.preparing_seconds(cached=cached), estimated.training_seconds(cached=cached))
        lines.append(_row(what if estimated.encoders else "the run", *map(duration, times)))
    return lines


def sampling(estimated: "Estimate", passes: "Passes", given: EstimateArguments) -> list[str]:
    """Lines about sampling, where the MFU differs from that of training."""
    rate = estimated.samples_per_second(passes)
    guided = f", {' '.join(given.sample_guidance)}" if given.sample_guidance else ""
    around = f", {passes.short} of them without the routed blocks" if passes.short else ""
    theirs = " (the paper's FID; --samples, --sample-steps or --sample-guidance for yours)"
    if {"samples", "sample_steps", "sample_guidance"} & given.model_fields_set:
        theirs = ""
    count = f"{given.samples:,} samples, {given.sample_steps} steps{guided}{theirs}"
    head = f"{count}, on the same devices at the same utilisation"
    flops, decoder = (number / 1e9 for number in (estimated.sampling_flops(passes), estimated.autoencoder.decoding))
    return [
        "", head,
        _row("network calls", f"{passes.whole + passes.short}", note=f"per image{around}"),
        _row("GFLOP/image", f"{flops:,.0f}", note=f"the decoder {decoder:,.0f} of them" if decoder else ""),
        _row("images/s", f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"),
        _row("time", duration(given.samples / rate)),
    ]  # fmt: skip


def _row(name: str, first: str, second: str = "", note: str = "") -> str:
    return f"  {name:<28}{first:>12}{second:>14}  {note}".rstrip()


def _size(num_bytes: float) -> str:
    """Decimal units, as disks are sold."""
    unit, size = next(
        (unit, size) for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if num_bytes >= size or unit == "MB"
    )
    return f"{num_bytes / size:,.{2 if unit == 'TB' else 1}f} {unit}"
