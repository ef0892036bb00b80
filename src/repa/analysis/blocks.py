"""A run's blocks: similarity of hidden states to an encoder (CKNNA, CKA), the prediction without a block, pictures of tokens.

Leaving out an important block changes the prediction a lot, which shows where to align (AG-REPA, arXiv 2603.01006). Pictures
show principal components as colours, also of encoders.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
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
    hidden_states,
    latents,
    noised,
    null_condition,
    pixels,
    require_neighbours,
    spaced_rows,
)
from repa.analysis.measures import cka, cknna_of, neighbourhoods
from repa.base.errors import UserError
from repa.base.reporting import Progress, silent
from repa.data import DataSet
from repa.data.dataset import load_encoder_of
from repa.encoders import VisionEncoder
from repa.models import Backbone
from repa.runs import LoadedRun

RANGE = 0.01, 0.99  # quantiles that map to black and full colour, so that outliers do not leave the rest grey


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
    """A function that compares hidden states (n, D) with the target (n, E); the target's neighbours are computed once."""
    if config.measure != "cknna":
        return lambda hidden: cka(hidden, target, unbiased=config.measure == "cka-unbiased")
    side = neighbourhoods(target, config.neighbours, config.variant)
    return lambda hidden: cknna_of(neighbourhoods(hidden, config.neighbours, config.variant), side)


@torch.inference_mode()
def depth_effects(run: LoadedRun, data: DataSet, config: DepthConfig, progress: Progress = silent) -> Rows:
    """Rows {t, depth, change, share}: the mean over images of |v - v without the block| / |v|, and its share of all blocks' sum.

    A block is left out by returning its input. Each image has its own noise stream and the condition is null, so that every
    block sees the same inputs. Each image needs one forward pass, and one more per block.

    Raises:
        UserError: a depth does not exist, or the run cannot read the data.
    """
    depths = check_run(run, data, config.depths)
    indices = spaced_rows(data, config.num_images)
    sums = {(t, depth): 0.0 for t in config.times for depth in depths}
    done = 0
    for part in batches(indices, config.batch_size):
        x = latents(run, data, part, config.seed)
        for t in config.times:
            x_t, times = noised(run.path, x, part, t, config.seed)
            whole = _predict(run, x_t, times)  # once, for the comparison with every block
            for depth in depths:
                with without_block(run.model, depth):
                    without = _predict(run, x_t, times)
                moved = (whole - without).flatten(1).norm(dim=1)  # (n,)
                change = moved / whole.flatten(1).norm(dim=1).clamp_min(1e-12)  # an untrained network predicts 0
                sums[t, depth] += float(change.double().sum())
        done += len(x)
        progress(done, len(indices))
    rows = [{"t": t, "depth": depth, "change": total / len(indices)} for (t, depth), total in sums.items()]
    of_all = {t: sum(row["change"] for row in rows if row["t"] == t) for t in config.times}
    return [{**row, "share": row["change"] / of_all[row["t"]] if of_all[row["t"]] else 0.0} for row in rows]


def without_block(model: Backbone, depth: int) -> RemovableHandle:
    """A context in which the block returns its input instead of its output, for every stream, such as text and image of an MMDiT."""
    return model.blocks[depth - 1].register_forward_hook(_return_inputs)


def _return_inputs(block: nn.Module, inputs: tuple, output: Any) -> Any:
    if not isinstance(output, tuple):
        return inputs[0]
    made = list(output)
    for i, (given, result) in enumerate(zip(inputs, output, strict=False)):
        # An argument and a result of equal shape and position are a stream of tokens. Other results, such as attention logits, stay.
        if isinstance(given, Tensor) and isinstance(result, Tensor) and given.shape == result.shape:
            made[i] = given
    return tuple(made)


def _predict(run: LoadedRun, x_t: Tensor, times: Tensor) -> Tensor:
    return (
        run.model({"x": x_t}, run.process.network_time(times), null_condition(run.model, x_t)).prediction["x"].float()
    )


def principal_colours(tokens: Tensor) -> Tensor:
    """The first three principal components of tokens (N, T, D) as red, green and blue in [0, 1]: (N, T, 3).

    All images share one basis and one scale, so that equal colours mean equal features. Signs are fixed (the largest entry
    of a component is positive); otherwise the same tokens could appear as negatives.

    Raises:
        UserError: fewer than 3 channels, fewer than 4 tokens in total, or values that are not finite.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        given = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise UserError(f"Colours need a tensor of tokens (N, T, D), but got {given}.")
    num, length, dim = tokens.shape
    if dim < 3 or num * length < 4 or not torch.isfinite(tokens).all():
        raise UserError(
            f"Three principal components need at least 4 finite tokens of 3 channels, but got {num * length} of {dim}."
        )
    x = tokens.detach().cpu().double().flatten(0, 1)  # (N * T, D)
    x = x - x.mean(0)
    # From the D x D matrix, because there may be a hundred times as many tokens as channels.
    directions = torch.linalg.eigh(x.T @ x).eigenvectors[:, -3:].flip(1)  # (D, 3), largest first
    largest = directions.abs().argmax(0)
    directions = directions * directions[largest, torch.arange(3)].sign()
    parts = x @ directions  # (N * T, 3)
    low, high = (torch.from_numpy(np.quantile(parts.numpy(), q, axis=0)) for q in RANGE)
    spread = (high - low).where(high > low, torch.ones(()).double())  # equal tokens have no spread
    return ((parts - low) / spread).clamp(0, 1).float().unflatten(0, (num, length))


def colour_pictures(tokens: Tensor, side: int) -> np.ndarray:
    """Tokens (N, G * G, D) as uint8 pictures (N, side, side, 3), each token a square of one colour."""
    grid = round(tokens.shape[1] ** 0.5)
    colours = principal_colours(tokens).unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (N, 3, G, G)
    large = torch.nn.functional.interpolate(colours, size=(side, side), mode="nearest-exact")
    return (255 * large).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def token_pictures(
    run: LoadedRun,
    data: DataSet,
    indices: np.ndarray,
    encoders: Mapping[str, VisionEncoder],
    *,
    depths: Sequence[int] = (),
    times: Sequence[float] = (0.0, 0.5),
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Title -> pictures uint8 (n, R, R, 3): the images, each encoder's tokens, and the run's blocks at every t.

    Without depths: the blocks at a quarter, half, three quarters and the end of the network.
    """
    images, side = pixels(data, indices), data.resolution
    found = {"image": images.permute(0, 2, 3, 1).numpy()}
    for name, encoder in encoders.items():
        found[name] = colour_pictures(encoder(images, encoder.grid_for(side)).patches, side)
    quarters = sorted({max(1, round(run.model.tapped_depth * part / 4)) for part in (1, 2, 3, 4)})
    for t in times:
        for depth, tokens in tokens_of_run(run, data, indices, tuple(depths or quarters), t, seed).items():
            found[f"block {depth}\nt = {t:g}"] = colour_pictures(tokens, side)
    return found


@torch.inference_mode()
def tokens_of_run(
    run: LoadedRun, data: DataSet, indices: np.ndarray, depths: tuple[int, ...], t: float, seed: int
) -> dict[int, Tensor]:
    """Hidden states (n, T, D) by depth, of images noised to level t with the null label; image i has its own noise."""
    depths = check_run(run, data, depths)
    x = latents(run, data, indices, seed)
    x_t, times = noised(run.path, x, indices, t, seed)
    hidden = hidden_states(run.model, x_t, run.process.network_time(times), depths)
    return {depth: hidden[depth].float().cpu() for depth in depths}
