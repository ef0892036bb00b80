"""The work of `repa evaluate`: from samples in a file, or a stream of new samples, to results with their provenance."""

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repa import __version__
from repa.base import dist, files
from repa.base.arrays import load_npz
from repa.base.errors import UserError
from repa.base.reporting import Progress, silent
from repa.conditions.loading import prompts_in
from repa.data.dataset import encoder_weights
from repa.evaluation.captions import CaptionAgreement, CaptionMeasure, ClipScore
from repa.evaluation.config import INCEPTION, OF_CAPTIONS, OF_CLIP, EvaluateConfig, FeaturesConfig, ReferenceConfig
from repa.evaluation.extractors import Extractor, InceptionExtractor, load_extractor
from repa.evaluation.images import DataImages, Images, open_images
from repa.evaluation.measure import (
    NEED_SUMS,
    NEIGHBOURS,
    check_measurable,
    check_number,
    distance_of_real,
    measure,
)
from repa.evaluation.reference import (
    Reference,
    ReferenceFile,
    checksum_of,
    kept_reference,
    load_reference,
    open_reference,
    subset_of,
    write_reference,
)
from repa.metrics.distances import SPLIT_SIZE

NUMBERS = {"fp32": "float32", "bf16": "bfloat16"}
TIME = "t = 0 is data, t = 1 is noise; low and high of a guidance are in this t"

ImageBatches = Iterable[tuple[Tensor, Tensor]]  # indices (n,) and images (n, 3, H, W) of this process's share


def evaluate_file(
    samples: str | Path,
    reference: str | Path,
    config: EvaluateConfig,
    *,
    device: torch.device,
    progress: Progress = silent,
    reference_progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate an .npz, a folder or a zip of samples; the results contain their provenance.

    The .json of `repa sample` next to an .npz, which records how it was made, is copied into the results.
    """
    images = open_images(samples)
    if images.height != images.width:
        raise UserError(f"{samples} holds images of {images.height}x{images.width} pixels: crop them to squares first.")
    # Other samples may have replaced those of the record: it counts only if its checksum matches.
    path, prompts = Path(samples).with_suffix(".json"), Path(samples).with_suffix(".jsonl")
    made = files.read_json(path) if Path(samples).suffix == ".npz" and path.is_file() else None
    is_stale = made is not None and not (isinstance(made, dict) and made.get("crc32") == images.identity.get("crc32"))

    def counted() -> ImageBatches:
        progress(0, images.num)
        for indices, pixels in images.batches(config.batch_size):
            yield indices, pixels
            progress(min(int(indices[0]) + dist.world() * config.batch_size, images.num), images.num)

    return evaluate_stream(
        counted(), images.num, images.height, reference, config, device=device, samples=str(samples),
        made=None if is_stale else made, prompts=_prompts_of(images, None if is_stale else prompts, config), progress=reference_progress,
    )  # fmt: skip


def evaluate_stream(
    stream: ImageBatches,
    num: int,
    side: int,
    reference: str | Path,
    config: EvaluateConfig,
    *,
    device: torch.device,
    samples: str,
    made: dict[str, Any] | None = None,
    prompts: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate `num` images of `side` pixels from a stream, without storing them.

    Args:
        stream: read only after all checks, when the reference is available.
        samples: name of the samples in the results.
        made: record of how they were made.
        prompts: the prompt of each image, if they have prompts.
        progress: progress of the reference, if it must be computed.
    """
    if num < 2:
        raise UserError(
            f"{samples} has {num} image{'s' * (num != 1)}, but metrics need at least two: give thousands for meaningful results."
        )
    check_number(num, config.wanted, samples)
    opened = open_reference(reference, side)
    # A file of statistics may not record the number of images.
    if not isinstance(opened, ReferenceFile):
        check_number(opened.num, config.wanted, str(reference))
    extractor = _load_extractor(config, opened, device)
    real = load_reference(opened, extractor, config.features, config.batch_size, progress)
    check_measurable(extractor, real, config.wanted)
    measures = _caption_measures(config, prompts, num, opened, real, device)
    found = measure(stream, extractor, real, config.wanted, neighbours=config.neighbours, caption_measures=measures)
    return {
        "metrics": found,
        "distance_of_real": distance_of_real(real, num) if NEED_SUMS & found.keys() else None,
        "num_samples": num,
        "num_reference": real.statistics.count,
        "num_reference_neighbours": None if real.subset is None else len(real.subset),
        "warnings": _warnings_about(extractor, num, config.wanted),
        "samples": samples,
        "made": None if made is None else {**made, "time": TIME},
        "reference": str(reference),
        "reference_sha256": checksum_of(opened),
        "reference_kind": "statistics" if isinstance(opened, ReferenceFile) else "images",
        **provenance(extractor, config, device),
    }


def _prompts_of(images: Images, beside: Path | None, config: EvaluateConfig) -> Sequence[str]:
    """Prompts of samples in a file: from the given file, the file next to them, or the first captions of data; empty if unneeded."""
    if not set(OF_CAPTIONS) & set(config.wanted):
        return ()
    if config.prompts:
        return prompts_in(Path(config.prompts))
    if isinstance(images, DataImages):
        data = images.data
        return [next(iter(texts), "") for texts in data.captions(data.originals)] if data.has_captions else ()
    return prompts_in(beside) if beside and beside.is_file() else ()


def _caption_measures(
    config: EvaluateConfig, prompts: Sequence[str], num: int, opened: Images | ReferenceFile, real: Reference,
    device: torch.device,
) -> list[CaptionMeasure]:  # fmt: skip
    """The requested metrics of samples and prompts; raises UserError if their inputs are missing."""
    asked = [name for name in config.wanted if name in OF_CAPTIONS]
    if asked and len(prompts) < num:
        raise UserError(
            f"{asked[0]} needs the prompts of all {num:,} samples, but there are {len(prompts):,}: give their file as --prompts, or a "
            "run that was trained on captions."
        )
    measures: list[CaptionMeasure] = []
    if "caption_agreement" in asked:
        if not (isinstance(opened, DataImages) and opened.data.has_captions):
            raise UserError(
                "caption_agreement needs captions, but the reference has none: give prepared data with captions."
            )
        assert real.subset is not None  # of images, not of a file of statistics
        captions = opened.data.captions(subset_of(opened.num))  # of the same images as the features
        measures.append(CaptionAgreement(real.subset, captions, prompts))
    if set(OF_CLIP) & set(asked):
        weights = Path(config.clip_weights) if config.clip_weights else None
        measures.append(ClipScore(config.clip, weights, prompts, device))
    return measures


def make_reference(
    where: str | Path, out: Path, config: ReferenceConfig, *, device: torch.device, progress: Progress = silent
) -> Reference:
    """Write `out` (.npz) with the statistics of all images of `where`, and 10,000 of the images for precision and recall."""
    if out.suffix != ".npz":
        raise UserError(
            f"A reference is written as one .npz file, but --out is {out}: give a name such as reference.npz."
        )
    images = open_images(where, resolution=config.resolution or None)
    if images.height != images.width:
        raise UserError(
            f"{where} holds images of {images.height}x{images.width} pixels: give --resolution to crop them to squares."
        )
    if config.resolution not in (0, images.height):
        raise UserError(
            f"{where} holds images of {images.height} pixels, which are not resized to {config.resolution}: leave --resolution out."
        )
    files.require_writable(out)  # before an hour of computation
    if out.exists() and not load_npz(out, "a reference", ("mu",)):
        raise UserError(f"{out} exists and is not a reference: choose another --out.")
    with dist.locked(out, "repa evaluate reference"):
        extractor = _load_extractor(config, images, device)
        reference = kept_reference(images, extractor, config.features, batch_size=config.batch_size, progress=progress)
        if dist.is_main():
            write_reference(out, reference, images, extractor, config.features)
        dist.barrier()
    return reference


def _load_extractor(config: FeaturesConfig, reference: object, device: torch.device) -> Extractor:
    """The extractor with the given weights, or else those recorded in the prepared data if it is the reference."""
    weights = config.features_weights or None
    if not weights and isinstance(reference, DataImages) and config.features != INCEPTION:
        weights = encoder_weights(reference.data, config.features)
    return load_extractor(config.features, weights=weights, precision=config.features_precision, device=device)


def provenance(extractor: Extractor, config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    """The extractor, its precision, and the versions of the software."""
    return {
        "features": config.features,
        "encoder": extractor.identity,
        "arithmetic": {
            "features": NUMBERS[extractor.precision],
            "statistics": "float64",
            "neighbours": config.neighbours,
        },
        "settings": {"neighbours": NEIGHBOURS, "inception_score_split": SPLIT_SIZE},
        "device": device.type,
        "processes": dist.world(),
        "repa": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _warnings_about(extractor: Extractor, num: int, metrics: Sequence[str]) -> list[str]:
    warnings = []
    if num < extractor.dim and {"fid", "sfid", "fd"} & set(metrics):
        warnings.append(
            f"{num:,} samples are fewer than the {extractor.dim:,} dimensions of the features, so their covariance lacks full "
            "rank, and Fréchet distances are too large: compare only results with the same number of samples."
        )
    if "fd" in metrics:
        warnings.append(
            f"fd in the features of {extractor.name} is not FID: compare it only with fd in the same features."
        )
    if isinstance(extractor, InceptionExtractor) and not extractor.is_published:
        warnings.append(
            "The weights are not the published ones of Inception: do not compare these results with papers."
        )
    if extractor.precision != "fp32":
        warnings.append(
            f"The features were computed in {NUMBERS[extractor.precision]}, which changes every result a little: papers use float32."
        )
    if "inception_score" in metrics and num % SPLIT_SIZE:
        warnings.append(
            f"{num:,} samples are not a multiple of {SPLIT_SIZE:,}: the last split of the inception score is smaller, which lowers it."
        )
    return warnings
