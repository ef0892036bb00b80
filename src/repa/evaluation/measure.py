"""Metrics of a stream of uint8 images against a reference: features, then sums in constant memory, then metrics."""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Real

import torch
from torch import Tensor

from repa.base import dist, rng
from repa.base.errors import UserError, choices, require_type
from repa.encoders.contract import VisionEncoder
from repa.evaluation.captions import CaptionMeasure
from repa.evaluation.config import METRICS, OF_CAPTIONS, is_private
from repa.evaluation.extractors import Extractor, as_extractor
from repa.evaluation.images import gather_rows
from repa.evaluation.reference import MeanCovariance, Reference, accumulator_of
from repa.metrics import (
    RunningScore,
    Statistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
    precision_recall_in_half,
)

NEIGHBOURS = 3  # k of precision and recall
KERNEL_SUBSET = 1000  # features in each subset of the kernel distance
NEED_SUMS = {"fid", "fd"}
NEED_ROWS = {"kid", "kd", "precision", "recall"}  # these need all features, not only sums; private metrics do too


def evaluate(
    batches: Iterable[Tensor],
    encoder: VisionEncoder | Extractor,
    reference: Reference,
    metrics: Sequence[str] = ("fd",),
    *,
    neighbours: str = "float32",
) -> dict[str, float]:
    """Metrics of uint8 batches (n, 3, H, W) by name.

    With several processes each passes its own images (possibly none), and all receive the result. The order of images matters
    for the inception score: image i of process r of W has the index i * W + r.

    Args:
        encoder: an encoder, for its pooled features, or an extractor from `load_extractor`.
        metrics: of an encoder fd, kd, precision, recall; of Inception fid, sfid, inception_score, kid, precision, recall. Or
            dotted names of private functions, `f(samples (N, D), reference (M, D), *, settings)` -> number.
        neighbours: "float16" rounds precision and recall as the ADM evaluator does.

    Raises:
        UserError: a metric that the features or the reference do not support, features that are not finite, or too few images.
    """

    require_type(reference, Reference, "The reference must come from repa.evaluation.reference_of")

    def numbered() -> Iterator[tuple[Tensor, Tensor]]:
        # Interleaved, so that indices are unique without knowing the number of images of the other processes.
        start = 0
        for images in batches:
            yield (start + torch.arange(len(images))) * dist.world() + dist.rank(), images
            start += len(images)

    return measure(numbered(), as_extractor(encoder), reference, metrics, neighbours=neighbours)


def measure(
    stream: Iterable[tuple[Tensor, Tensor]],
    extractor: Extractor,
    reference: Reference,
    metrics: Sequence[str],
    *,
    neighbours: str = "float32",
    caption_measures: Sequence[CaptionMeasure] = (),
) -> dict[str, float]:
    """`evaluate` for (indices (n,), images (n, 3, H, W)), with the index of each image over all processes.

    `caption_measures` compute the metrics of prompts.
    """
    check_measurable(extractor, reference, metrics)
    # Sums if they are enough: 50,000 spatial features of Inception need 400 MB, their covariance 33 MB.
    statistics, spatial = (Statistics(accumulator_of(extractor)) for _ in range(2))
    score, rows, places = RunningScore(), [], []
    for indices, images in stream:
        seen = extractor(images)
        if NEED_SUMS & set(metrics):  # the covariance of wide features costs more than a small network
            statistics.update(seen.pooled)
        for each in caption_measures:
            each.update(indices, images, seen.pooled)
        if "sfid" in metrics:
            assert seen.spatial is not None  # of Inception: see `check_measurable`
            spatial.update(seen.spatial)
        if "inception_score" in metrics:
            assert seen.logits is not None
            score.update(seen.logits, indices)
        # Only for metrics of pairs of images; on the CPU, because the GPU's memory is for the network.
        if needs_rows(metrics):
            rows.append(seen.pooled.cpu())
            places.append(indices)
    found: dict[str, float] = {}
    if NEED_SUMS & set(metrics):
        statistics.reduce()
        found["fid" if "fid" in metrics else "fd"] = _distance(reference.statistics, statistics)
    if "sfid" in metrics:
        spatial.reduce()
        assert reference.spatial is not None
        found["sfid"] = _distance(reference.spatial, spatial)
    if "inception_score" in metrics:
        score.reduce()
        found["inception_score"] = score.value
    if needs_rows(metrics):
        samples = gather_rows(rows, places)
        rows.clear()  # they are in `samples` now: frees the second copy
        assert reference.subset is not None
        found |= _metrics_of_features(
            reference.subset.to(extractor.device), samples.to(extractor.device), metrics, neighbours
        )
    for each in caption_measures:
        found |= each.result()
    # In the requested order, each with its shuffled control if it has one.
    wanted = [name for metric in metrics for name in (metric, f"{metric}_shuffled") if name in found]
    return {name: found[name] for name in wanted}


def check_measurable(extractor: Extractor, reference: Reference, metrics: Sequence[str]) -> None:
    """Raises UserError for a metric that cannot be measured, before any image is read."""
    for name in metrics:
        if is_private(name):
            METRICS.build(name)  # reports a name that cannot be imported now
        elif name not in (*extractor.metrics, *OF_CAPTIONS):
            raise UserError(
                f"{name!r} is not measured in the features of {extractor.name}{choices(name, extractor.metrics)}"
            )
    if reference.subset is None and (needing := needs_rows(metrics)):
        raise UserError(
            f"The reference has only statistics, but {', '.join(needing)} needs its images: leave it out of --metrics, "
            "or give a reference with images."
        )
    if reference.spatial is None and "sfid" in metrics:
        raise UserError("The reference has no mu_s and sigma_s, which sfid needs: leave sfid out of --metrics.")


def check_number(num: int, metrics: Sequence[str], where: str) -> None:
    """Raises UserError for a metric that needs more images, before any is sampled or read."""
    if num <= NEIGHBOURS and {"precision", "recall"} & set(metrics):
        raise UserError(
            f"Precision and recall use {NEIGHBOURS} neighbours, so they need more than {NEIGHBOURS} images, but {where} "
            f"has {num}: give more, or leave both out of --metrics."
        )


def distance_of_real(reference: Reference, num: int) -> float | None:
    """Frechet distance of `num` random images of the reference to all of it: about the least that so many samples can have.

    None if the features are not stored, or if `num` exceeds a tenth of the images: a larger share is nearer to the reference
    than new images are.
    """
    count, subset = reference.statistics.count, reference.subset
    if subset is None or count is None or num > min(count // 10, len(subset)):
        return None
    drawn = Statistics()
    drawn.update(subset[torch.randperm(len(subset), generator=rng.generator(0, "real images"))[:num]])
    return _distance(reference.statistics, drawn)


def needs_rows(metrics: Iterable[str]) -> list[str]:
    """The metrics that compare features of single images."""
    return [name for name in metrics if name in NEED_ROWS or is_private(name)]


def _distance(real: MeanCovariance, statistics: Statistics) -> float:
    return frechet_distance(real.mean, real.covariance, statistics.mean, statistics.covariance)


def _metrics_of_features(
    reference: Tensor, samples: Tensor, metrics: Sequence[str], neighbours: str
) -> dict[str, float]:
    found: dict[str, float] = {}
    if {"kid", "kd"} & set(metrics):
        # KID's subsets have 1,000 images; a smaller set is one subset.
        size = min(KERNEL_SUBSET, len(reference), len(samples))
        found["kid" if "kid" in metrics else "kd"] = kernel_distance(reference, samples, subset_size=size)
    if {"precision", "recall"} & set(metrics):
        if neighbours == "float16":
            shares = precision_recall_in_half(reference, samples, NEIGHBOURS)
        else:
            shares = precision_recall(reference, samples, NEIGHBOURS, over_processes=True)
        found |= shares._asdict()
    for name in filter(is_private, metrics):
        value = METRICS.build(name)(samples, reference)
        if not (
            isinstance(value, (Real, Tensor)) and (number := torch.as_tensor(value)).numel() == 1 and number.isfinite()
        ):
            raise UserError(f"The metric {name!r} must return one finite number, but returned {value!r:.80}.")
        found[name] = float(value)
    return found
