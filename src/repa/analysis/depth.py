"""A run block by block: similarity of its hidden states to an encoder (CKNNA, CKA), and the prediction without a block.

The prediction moves far where a block that it needs is left out (AG-REPA, arXiv 2603.01006): where to align.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repa.analysis.collection import Load, Rows, Stages, each
from repa.analysis.config import DepthConfig, SimilarityConfig
from repa.analysis.features import PATCHES, features_of_encoder, field, hidden_of_run
from repa.analysis.hidden import (
    batches,
    check_run,
    device_of,
    latents,
    noised,
    null_condition,
    require_neighbours,
    spaced_rows,
)
from repa.analysis.similarity import cka, cknna_of, neighbourhoods
from repa.base.reporting import Progress, silent
from repa.data import DataSet
from repa.data.dataset import load_encoder_of
from repa.models import Backbone
from repa.runs import LoadedRun


def cknna_of_run(run: LoadedRun, data: DataSet, config: SimilarityConfig, progress: Progress = silent) -> Rows:
    """Rows {t, depth, cknna} (or cka, cka-unbiased) between hidden states and the patches of an encoder, averaged over tokens."""
    depths = check_run(run, data, config.depths)
    indices = spaced_rows(data, config.num_images)
    if config.measure == "cknna":
        require_neighbours(config.neighbours, len(indices))
    data.require_images()
    device = device_of(run)
    encoder = load_encoder_of(data, config.encoder, weights=config.encoder_weights, device=device)
    stages = Stages(progress, [len(indices)] * (1 + len(config.times)))
    grid = encoder.grid_for(data.resolution)
    load = features_of_encoder(encoder, config.encoder, grid, [PATCHES], config, data, indices, stages.next())
    measure = _similarity_to(load(PATCHES).to(device), config)
    rows: Rows = []
    for t in config.times:
        hidden = hidden_of_run(run, depths, t, config, data, indices, stages.next())

        def measured(depth: int, t: float = t, hidden: Load = hidden) -> Rows:
            return [{"t": t, "depth": depth, config.measure: measure(hidden(field(depth)).to(device))}]

        rows += each(depths, measured)
    return rows


def _similarity_to(target: Tensor, config: SimilarityConfig) -> Callable[[Tensor], float]:
    """What compares hidden states (n, D) with the target (n, E), whose own neighbours are found once."""
    if config.measure != "cknna":
        return lambda hidden: cka(hidden, target, unbiased=config.measure == "cka-unbiased")
    side = neighbourhoods(target, config.neighbours, config.variant)
    return lambda hidden: cknna_of(neighbourhoods(hidden, config.neighbours, config.variant), side)


@torch.inference_mode()
def depth_effects(run: LoadedRun, data: DataSet, config: DepthConfig, progress: Progress = silent) -> Rows:
    """Rows {t, depth, change, share}: the mean over images of |v - v without the block| / |v|, and its share of all blocks' sum.

    A block is left out by handing on what went into it. Images are noised by a stream each and no class is given, so that
    every block sees the same inputs. Each image costs a forward pass, and one more for each block.

    Raises:
        UserError: a depth that does not exist, or data that the run cannot read.
    """
    depths = check_run(run, data, config.depths)
    indices = spaced_rows(data, config.num_images)
    sums = {(t, depth): 0.0 for t in config.times for depth in depths}
    done = 0
    for part in batches(indices, config.batch_size):
        x = latents(run, data, part, config.seed)
        for t in config.times:
            x_t, times = noised(run.path, x, part, t, config.seed)
            whole = _predict(run, x_t, times)  # once: every block is compared with it
            for depth in depths:
                with without_block(run.model, depth):
                    without = _predict(run, x_t, times)
                moved = (whole - without).flatten(1).norm(dim=1)  # (n,)
                change = moved / whole.flatten(1).norm(dim=1).clamp_min(1e-12)  # a fresh network predicts 0
                sums[t, depth] += float(change.double().sum())
        done += len(x)
        progress(done, len(indices))
    rows = [{"t": t, "depth": depth, "change": total / len(indices)} for (t, depth), total in sums.items()]
    of_all = {t: sum(row["change"] for row in rows if row["t"] == t) for t in config.times}
    return [{**row, "share": row["change"] / of_all[row["t"]] if of_all[row["t"]] else 0.0} for row in rows]


def without_block(model: Backbone, depth: int) -> RemovableHandle:
    """A context in which the block hands on its input in place of its output: every stream of it, as text and image of an MMDiT."""
    return model.blocks[depth - 1].register_forward_hook(_return_inputs)


def _return_inputs(block: nn.Module, inputs: tuple, output: Any) -> Any:
    if not isinstance(output, tuple):
        return inputs[0]
    made = list(output)
    for i, (given, result) in enumerate(zip(inputs, output, strict=False)):
        # An argument and a result of one shape at one place are a stream of tokens. Other results, as attention logits, stay.
        if isinstance(given, Tensor) and isinstance(result, Tensor) and given.shape == result.shape:
            made[i] = given
    return tuple(made)


def _predict(run: LoadedRun, x_t: Tensor, times: Tensor) -> Tensor:
    return (
        run.model({"x": x_t}, run.process.network_time(times), null_condition(run.model, x_t)).prediction["x"].float()
    )
