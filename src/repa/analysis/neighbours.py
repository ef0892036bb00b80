"""Detection of copies: distances of samples to the nearest training images, compared with those of held-out images.

A distance alone has no meaning: the question is whether samples are nearer to the training images than real images that
were not trained on. Without held-out images, the distance of each training image to its nearest other one is used.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from repa.analysis.collection import Rows, Stages
from repa.analysis.config import NeighboursConfig
from repa.analysis.hidden import batches, pixels, require_neighbours, spaced_rows
from repa.base.arrays import evenly_spaced
from repa.base.errors import UserError
from repa.base.reporting import Progress, silent
from repa.data import DataSet
from repa.data.dataset import load_encoder_of
from repa.encoders import VisionEncoder
from repa.metrics.distances import check_features

BLOCK = 1024  # queries per block
NEAR = 0.01  # share of held-out images below the distance that counts as a likely copy


class Nearest(NamedTuple):
    """The k nearest images of m queries, nearest first."""

    distances: Tensor  # (m, k) float64: Euclidean between features of unit length, from 0 to 2
    indices: Tensor  # (m, k) indices of the images


class DistanceSummary(NamedTuple):
    """Comparison of samples and held-out images by the distance to the nearest training image."""

    median: float  # of the samples
    median_held_out: float
    threshold: float  # distance below which the share NEAR of the held-out images lies
    share_near: float  # share of the samples below the threshold: about NEAR if nothing is copied


class Copies(NamedTuple):
    """Result of the comparison."""

    near: Nearest  # indices in the data, for each sample
    held_out: Tensor  # (h,) distances of held-out images to their nearest training image
    verdict: DistanceSummary

    def rows(self) -> Rows:
        """{sample, nearest (row of the data), distance, nearer_than (share of held-out images that are farther)}."""
        distances = self.near.distances[:, 0]
        return [
            {"sample": i, "nearest": nearest, "distance": d.item(), "nearer_than": (self.held_out > d).double().mean().item()}
            for i, (nearest, d) in enumerate(zip(self.near.indices[:, 0].tolist(), distances, strict=True))
        ]  # fmt: skip

    def beside(self, sample: Callable[[int], Tensor], data: DataSet, num: int) -> dict[int, Tensor]:
        """The `num` samples with the smallest distance: each uint8 (1, 3, R, R), and its nearest images."""
        closest = self.near.distances[:, 0].argsort()[:num].tolist()
        return {i: torch.cat([sample(i), pixels(data, self.near.indices[i].numpy())]) for i in closest}


def find_copies(
    samples: Iterable[Tensor],
    num_samples: int,
    data: DataSet,
    config: NeighboursConfig,
    *,
    held_out: DataSet | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Copies:
    """Compare samples, uint8 batches (n, 3, R, R), and the images of `held_out` with the images of `data`.

    Raises:
        UserError: data without images or with too few, held-out data of another resolution, or missing encoder weights.
    """
    if held_out is not None and held_out.resolution != data.resolution:
        raise UserError(
            f"{held_out.folder} holds images of {held_out.resolution} pixels, {data.folder} of {data.resolution}: "
            "compare images of one size."
        )
    indices = spaced_rows(data, config.num_images)
    require_neighbours(config.neighbours, len(indices))
    data.require_images()
    encoder = load_encoder_of(data, config.features, weights=config.features_weights, device=device)
    num_others = 0 if held_out is None else len(spaced_rows(held_out, config.num_held_out))
    stages = Stages(progress, [len(indices), num_samples, num_others])

    def rows_of(source: DataSet, rows: np.ndarray) -> Iterable[Tensor]:
        return (pixels(source, part) for part in batches(rows, config.batch_size))

    trained = summary_features(rows_of(data, indices), encoder, stages.next())
    near = nearest_images(summary_features(samples, encoder, stages.next()), trained, config.neighbours)
    if held_out is None:
        # Each training image against the others: the distances of images that are not copies.
        own = torch.from_numpy(evenly_spaced(len(trained), config.num_held_out))
        real = nearest_images(trained[own], trained, own=own).distances[:, 0]
    else:
        others = rows_of(held_out, spaced_rows(held_out, config.num_held_out))
        real = nearest_images(summary_features(others, encoder, stages.next()), trained).distances[:, 0]
    # From positions in the subset to indices in the data.
    near = near._replace(indices=torch.from_numpy(indices)[near.indices])
    return Copies(near, real, compare(near.distances[:, 0], real))


def summary_features(images: Iterable[Tensor], encoder: VisionEncoder, progress: Progress = silent) -> Tensor:
    """Features (N, D) of uint8 batches (n, 3, S, S): the encoder's pooled features, or else the mean of its patches."""
    rows, done = [], 0
    for batch in images:
        features = encoder(batch, encoder.grid_for(batch.shape[-1]))
        pooled = features.patches.mean(1) if features.pooled is None else features.pooled
        rows.append(pooled.float().cpu())
        done += len(batch)
        progress(done, done)
    return torch.cat(rows)


def nearest_images(queries: Tensor, images: Tensor, k: int = 1, own: Tensor | None = None) -> Nearest:
    """The k nearest of images (n, D) for each of queries (m, D), by the direction of their features.

    Args:
        queries: features.
        images: features of the training images.
        k: how many.
        own: (m,) index of each query in `images`, which is excluded.

    Raises:
        UserError: the widths differ, there are fewer than k images, or a value is not finite.
    """
    check_features(queries, images, "Nearest images")
    if not 1 <= k <= len(images) - (own is not None):
        raise UserError(
            f"{k} neighbours need at least {k} images, but got {len(images)}: give more images or ask for fewer neighbours."
        )
    queries, images = F.normalize(queries.float(), dim=1), F.normalize(images.float(), dim=1)
    distances, indices = [], []
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK]
        close = block @ images.T  # (rows, n)
        if own is not None:
            close[torch.arange(len(block)), own[start : start + BLOCK]] = -torch.inf
        near = close.topk(k, dim=1).indices  # (rows, k)
        # 2 - 2 <u, v> cancels for copies, which matter most: so the differences are computed directly, in float64
        exact = (block[:, None].double() - images[near].double()).norm(dim=2)  # (rows, k)
        exact, order = exact.sort(dim=1)
        distances.append(exact)
        indices.append(near.gather(1, order))
    return Nearest(torch.cat(distances), torch.cat(indices))


def compare(samples: Tensor, held_out: Tensor) -> DistanceSummary:
    """Compare distances to the nearest training image, of samples (m,) and of held-out images (h,)."""
    threshold = float(np.quantile(held_out.numpy(), NEAR))
    return DistanceSummary(
        median=samples.median().item(),
        median_held_out=held_out.median().item(),
        threshold=threshold,
        share_near=(samples < threshold).double().mean().item(),
    )
