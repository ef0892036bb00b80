"""CKNNA and linear probe of a run: its hidden states at every asked depth and noise level, on prepared data."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from repa.analysis.config import AnalyseConfig
from repa.analysis.hidden import collect_hidden
from repa.analysis.probe import linear_probe
from repa.analysis.similarity import cknna
from repa.base.errors import UserError
from repa.base.rng import SampleStreams, fold, generator
from repa.data import DataSet
from repa.encoders import load_encoder
from repa.runs import LoadedRun

TRAIN_SHARE = 0.8  # of the images, for the probe; the others test it

Progress = Callable[[int, int], None]
Rows = list[dict[str, float]]


def cknna_of_run(
    run: LoadedRun, data: DataSet, config: AnalyseConfig, progress: Progress = lambda done, total: None
) -> Rows:
    """Rows {t, depth, cknna} between pooled hidden states and the pooled patches of an encoder (both means over tokens)."""
    indices = _indices(data, config.num)
    encoder = load_encoder(config.encoder, weights=config.encoder_weights or None, device=_device(run))
    grid = encoder.grid_for(data.resolution)
    with torch.inference_mode():
        tokens = [
            encoder(_images(data, part), grid).patches.float().mean(1).cpu() for part in _batches(indices, config)
        ]
    target = torch.cat(tokens)  # (n, F)
    rows = []
    for t, hidden in _hidden(run, data, indices, config, progress):
        rows += [
            {"t": t, "depth": d, "cknna": cknna(h, target, config.neighbours, config.variant)}
            for d, h in hidden.items()
        ]
    return rows


def probe_of_run(
    run: LoadedRun, data: DataSet, config: AnalyseConfig, progress: Progress = lambda done, total: None
) -> Rows:
    """Rows {t, depth, accuracy}: a linear probe on 80 % of the images, tested on the others."""
    if data.num_classes < 2:
        raise UserError(f"{data.folder} has one class: a linear probe needs at least two.")
    indices = _indices(data, config.num)
    order = torch.randperm(len(indices), generator=generator(config.seed, "probe split"))
    train, test = order.split([round(TRAIN_SHARE * len(order)), len(order) - round(TRAIN_SHARE * len(order))])
    labels = torch.from_numpy(data.gather("labels", indices))
    rows = []
    for t, hidden in _hidden(run, data, indices, config, progress):
        for depth, h in hidden.items():
            accuracy = linear_probe(
                h[train], labels[train], h[test], labels[test], epochs=config.epochs, seed=config.seed
            )
            rows.append({"t": t, "depth": depth, "accuracy": accuracy})
    return rows


def _hidden(
    run: LoadedRun, data: DataSet, indices: np.ndarray, config: AnalyseConfig, progress: Progress
) -> Iterator[tuple[float, dict[int, Tensor]]]:
    depths = config.depths or tuple(range(1, run.model.depth + 1))
    run.model.check_taps(depths)
    total = len(config.times) * len(indices)
    for number, t in enumerate(config.times):

        def latents(before: int = number * len(indices)) -> Iterator[Tensor]:
            for part in _batches(indices, config):
                yield _latents(run, data, part, config.seed)
                before += len(part)
                progress(before, total)

        yield (
            t,
            collect_hidden(
                run.model,
                latents(),
                depths=depths,
                t=t,
                path=run.path,
                seed=config.seed,
                null_label=run.model.null_label,
                network_time=run.process.network_time,
            ),
        )


@torch.inference_mode()
def _latents(run: LoadedRun, data: DataSet, part: np.ndarray, seed: int) -> Tensor:
    """Clean latents of images `part`, sampled from the posterior by a stream per image."""
    if data.has_moments:
        moments = torch.from_numpy(data.gather("moments", part)).float().to(_device(run))
    else:
        moments = run.autoencoder.encode(_images(data, part).to(_device(run)))
    noise = SampleStreams(fold(seed, "posterior"), [int(i) for i in part]).randn(
        moments.shape[1] // 2, *moments.shape[2:]
    )
    return run.autoencoder.sample(moments, noise=noise.to(moments.device))


def _images(data: DataSet, part: np.ndarray) -> Tensor:
    if not data.has_images:
        raise UserError(f"{data.folder} holds no images: prepare it with --store-images true.")
    return torch.from_numpy(data.gather("images", part))


def _indices(data: DataSet, num: int) -> np.ndarray:
    return np.unique(np.linspace(0, data.num_images - 1, min(num, data.num_images)).round().astype(np.int64))


def _batches(indices: np.ndarray, config: AnalyseConfig) -> Iterator[np.ndarray]:
    return (indices[s : s + config.batch_size] for s in range(0, len(indices), config.batch_size))


def _device(run: LoadedRun) -> torch.device:
    return next(run.model.parameters()).device
