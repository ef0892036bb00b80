"""Comparison of encoders in one table: spatial structure, linear probe, similarity to the others, speed and size."""

import functools
import time
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch

from repa.analysis.collection import Rows, Stages
from repa.analysis.config import EncodersConfig
from repa.analysis.features import PATCHES, STRUCTURE, STRUCTURE_DISTANCE, features_of_encoder
from repa.analysis.hidden import pixels, require_neighbours
from repa.analysis.measures import cknna_of, neighbourhoods
from repa.analysis.probes import ProbeImages, probe_rows
from repa.base import dist
from repa.base.reporting import Progress, silent
from repa.data import DataSet
from repa.data.dataset import load_encoder_of
from repa.encoders import VisionEncoder

SECONDS = 1.0  # shortest measurement of the speed


class Comparison(NamedTuple):
    """Rows {encoder, dim, grid, lds, cds, rmsc, top1, top5, images_per_second, bytes_fp16, bytes_int8} and {a, b, cknna}.

    An undefined value is None: CDS on a grid that is too small, the probe of data with one class.
    """

    encoders: Rows
    pairs: Rows

    def matrix(self) -> Rows:
        """{encoder, <encoder>: CKNNA}, one row per encoder; None on the diagonal, where it is 1 by definition."""
        names = [row["encoder"] for row in self.encoders]
        value = {frozenset((pair["a"], pair["b"])): pair["cknna"] for pair in self.pairs}
        return [{"encoder": a, **{b: value.get(frozenset((a, b))) for b in names}} for a in names]

    def rows(self) -> Rows:
        """The rows of encoders, with each one's CKNNA with every other as cknna.<encoder>."""
        others = [{f"cknna.{name}": row[name] for name in row if name != "encoder"} for row in self.matrix()]
        return [{**row, **(other if self.pairs else {})} for row, other in zip(self.encoders, others, strict=True)]


def compare_encoders(
    data: DataSet,
    config: EncodersConfig,
    *,
    val: DataSet | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    heads_progress: Progress = silent,
) -> Comparison:
    """Run every encoder on the same images; probe (best learning rate) and CKNNA use its averaged patches.

    Raises:
        UserError: missing weights of an encoder (before any work), data without images, or too few images.
    """
    data.require_images()
    images = ProbeImages.of(data, val, config.num_images, config.seed, least_classes=1)
    require_neighbours(config.neighbours, images.sizes[0])
    for spec in config.encoders:  # missing weights are reported before the first encoder runs for an hour
        load_encoder_of(data, spec, weights=config.encoder_weights.get(spec))
    stages = Stages(progress, images.sizes * len(config.encoders))
    epochs = Stages(heads_progress, [config.epochs] * len(config.encoders))
    rows, sides = [], []
    for spec in config.encoders:
        encoder = load_encoder_of(data, spec, weights=config.encoder_weights.get(spec), device=device)
        grid = config.grid or encoder.grid_for(data.resolution)
        shown = [name for name, distance in STRUCTURE_DISTANCE.items() if distance <= 2 * grid - 2]
        make = functools.partial(features_of_encoder, encoder, spec, grid, [PATCHES, *shown], config)
        loads = images.collect(make, stages)
        features = [load(PATCHES) for load in loads]
        accuracy: dict[str, Any] = {"top1": None, "top5": None}  # of data with one class
        if data.num_classes > 1:
            probed = probe_rows(images, features, config, config.seed, device, epochs.next())
            # The best learning rate differs between encoders: each is compared at its best.
            accuracy = max(probed, key=lambda row: row["top1"])
        rows.append({
            "encoder": spec, "dim": encoder.dim, "grid": grid,
            **{name: loads[0](name).double().mean().item() if name in shown else None for name in STRUCTURE},
            "top1": accuracy["top1"], "top5": accuracy["top5"],
            "images_per_second": dist.from_main(_images_per_second(encoder, data, grid, config.batch_size)),
            "bytes_fp16": 2 * grid**2 * encoder.dim,
            "bytes_int8": grid**2 * (encoder.dim + 4),  # and a float32 scale for each token
        })  # fmt: skip
        sides.append(neighbourhoods(features[0].to(device), config.neighbours, config.variant))
    pairs = [
        {"a": config.encoders[i], "b": config.encoders[j], "cknna": cknna_of(sides[i], sides[j])}
        for i, j in combinations(range(len(sides)), 2)
    ]
    return Comparison(rows, pairs)


def _images_per_second(encoder: VisionEncoder, data: DataSet, grid: int, batch_size: int) -> float:
    """Images per second of the encoder, including resizing; one warm-up batch is not counted."""
    # The images are on the device already: the copy is a cost of the data, not of the encoder.
    images = pixels(data, np.arange(min(batch_size, data.num_images))).to(next(encoder.parameters()).device)
    _run_and_wait(encoder, images, grid)
    begin, done = time.perf_counter(), 0
    while not done or time.perf_counter() - begin < SECONDS:
        _run_and_wait(encoder, images, grid)
        done += len(images)
    return done / (time.perf_counter() - begin)


def _run_and_wait(encoder: VisionEncoder, images: torch.Tensor, grid: int) -> None:
    encoder(images, grid).patches[0, 0, 0].item()  # reads a number, which waits until the GPU has finished
