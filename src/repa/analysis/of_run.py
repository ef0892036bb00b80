"""CKNNA and CKA of a run with an encoder: its hidden states at every asked depth and noise level, on prepared data."""

from collections.abc import Callable

from torch import Tensor

from repa.analysis.collection import Progress
from repa.analysis.config import SimilarityConfig
from repa.analysis.images import check_run, device_of, pixels, spread
from repa.analysis.pooled import PATCHES, features_of_encoder, field, hidden_of_run
from repa.analysis.similarity import cka, cknna_of, neighbourhoods
from repa.analysis.work import Rows, Stages, each, silent
from repa.base.errors import UserError
from repa.data import DataSet
from repa.data.recorded import load_encoder_of
from repa.runs import LoadedRun


def cknna_of_run(run: LoadedRun, data: DataSet, config: SimilarityConfig, progress: Progress = silent) -> Rows:
    """Rows {t, depth, cknna} (or cka, cka-unbiased) between hidden states and the patches of an encoder, averaged over tokens."""
    depths = check_run(run, data, config.depths)
    indices = spread(data, config.num_images)
    if config.measure == "cknna" and len(indices) <= config.neighbours:
        raise UserError(
            f"{config.neighbours} neighbours need more images than that, but there are {len(indices)}: "
            "give a lower --neighbours."
        )
    pixels(data, indices[:0])
    device = device_of(run)
    encoder = load_encoder_of(data, config.encoder, weights=config.encoder_weights, device=device)
    stages = Stages(progress, [len(indices)] * (1 + len(config.times)))
    grid = encoder.grid_for(data.resolution)
    load = features_of_encoder(encoder, config.encoder, grid, data, indices, config, stages.next())
    measure = _measure(load(PATCHES).to(device), config)
    rows: Rows = []
    for t in config.times:
        hidden = hidden_of_run(run, data, indices, depths, t, config, config.seed, stages.next())

        def measured(depth: int, t: float = t, hidden=hidden) -> Rows:
            return [{"t": t, "depth": depth, config.measure: measure(hidden(field(depth)).to(device))}]

        rows += each(depths, measured)
    return rows


def _measure(target: Tensor, config: SimilarityConfig) -> Callable[[Tensor], float]:
    """What compares hidden states (n, D) with the target (n, E), whose own neighbours are found once."""
    if config.measure != "cknna":
        return lambda hidden: cka(hidden, target, unbiased=config.measure == "cka-unbiased")
    side = neighbourhoods(target, config.neighbours, config.variant)
    return lambda hidden: cknna_of(neighbourhoods(hidden, config.neighbours, config.variant), side)
