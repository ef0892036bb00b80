"""Pictures of tokens: principal components as colours, for a run's blocks and for encoders."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from repa.analysis.hidden import check_run, hidden_states, latents, noised, pixels
from repa.base.errors import UserError
from repa.data import DataSet
from repa.encoders import VisionEncoder
from repa.runs import LoadedRun

RANGE = 0.01, 0.99  # quantiles that map to black and full colour, so that outliers do not leave the rest grey


def principal_colours(tokens: Tensor) -> Tensor:
    """The first three principal components of tokens (N, T, D) as red, green and blue in [0, 1]: (N, T, 3).

    All images share one basis and one scale, so that equal colours mean equal features. Signs are fixed (the largest entry
    of a component is positive); otherwise the same tokens could appear as negatives.

    Raises:
        UserError: fewer than 3 channels, fewer than 4 tokens in total, or values that are not finite.
    """
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
