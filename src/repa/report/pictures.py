"""The images of the page as PNG data URIs: previews as a grid and separately, training images, pictures of analyses.
Also tables of images as one PNG: the progress of runs, for a README, and the pictures of `repa analyse`."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from repa.base import faults, files
from repa.base.arrays import load_npz
from repa.base.errors import UserError, printable
from repa.base.images import decode_image, grid
from repa.report.analyses import VALUES
from repa.report.curves import draw_curves
from repa.report.runs import (
    DISTANCE,
    Protocol,
    RunRecord,
    add_evaluations,
    common_protocol,
    distance_name,
    is_number,
    read_runs,
)
from repa.report.speedups import SeedGroup, group_indices, group_seeds
from repa.report.style import TEXT, colour, count, new_figure, short_number, write_png
from repa.runs import layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure
    from PIL import Image

GRID_WIDTH = 930  # CSS pixels for the columns of the sample grid
CELL_WIDTH = 320  # largest width of one column
TOP_RUNS = 3  # runs with samples next to the curve at the top
MOST_BYTES = 2**30  # largest size of a preview's arrays
MOST_IMAGES = 16  # per tile, in rows of 4
MOST_COLUMNS = 6  # steps side by side
MOST_OF_ANALYSIS = 1600  # side of a picture of `repa analyse`
CAPTIONS = {
    "pictures": "Tokens as colours (their first three principal components) beside the images.",
    "progress": "Samples of checkpoints from the same noise and labels.",
    "depth": "Change of the prediction without a block, by block and noise level.",
    "neighbours": "The samples that are nearest to training images, each with its distance and its nearest training images.",
}
MOST_LETTERS = 300  # of a prompt under its sample
SAMPLE_PIXELS = 128  # side of an image that stands alone
MOST_PIXELS = 512  # side of a tile in stored pixels: larger images are reduced


class Picture(NamedTuple):
    """A PNG as a data URI, its size in stored pixels, and its caption: the name of a class, a sentence, or empty."""

    uri: str
    width: int
    height: int
    caption: str = ""

    @classmethod
    def of(cls, image: Image.Image, caption: str = "") -> Self:
        buffer = io.BytesIO()
        # Pages are mailed and committed, so a smaller file is worth the time.
        image.save(buffer, "PNG", optimize=True)
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        return cls(uri, *image.size, caption)

    def shown(self, target: int) -> tuple[int, int]:
        """Size on the page: the largest integer multiple of stored pixels up to `target`, or `target` if there is none."""
        factor = target // self.width or target / self.width
        return round(self.width * factor), round(self.height * factor)


def sample_pictures(
    records: Sequence[RunRecord],
    groups: Sequence[SeedGroup],
    training_images: np.ndarray | None,
    training_captions: Sequence[str],
) -> dict[str, Any]:
    """The last samples separately; the grid (a row per run, a column per step); training images."""
    steps = preview_columns(records)
    protocol = common_protocol(records)
    grid = [[_cell(run, step, protocol) for step in steps] for run in records]
    last = [(run, _last_samples(run)) for run in records if any(has_preview(run, step) for step in steps)]
    leaders = [group.runs[0] for group in _best_first(groups, protocol)][:TOP_RUNS]
    return {
        "steps": steps,
        "cell_width": min(CELL_WIDTH, GRID_WIDTH // max(len(steps), 1)),
        "grid": [(run, cells) for run, cells in zip(records, grid, strict=True) if any(tile for tile, _ in cells)],
        "top_samples": [(run, found) for run, found in last if run in leaders],
        "other_samples": [(run, found) for run, found in last if run not in leaders],
        "training_samples": [] if training_images is None else samples(training_images, training_captions),
        "captioned_samples": [(run, _last_samples(run, texts)) for run, _ in last if (texts := preview_prompts(run))],
    }


def _best_first(groups: Sequence[SeedGroup], protocol: Protocol | None) -> list[SeedGroup]:
    """The first group, then the others by the last distance of their first run, if all have the same protocol."""

    def last_distance(group: SeedGroup) -> float:
        rows = group.runs[0].distances(protocol)
        return rows[-1][DISTANCE] if rows else math.inf

    return [*groups[:1], *sorted(groups[1:], key=last_distance)]


def _last_samples(run: RunRecord, captions: Sequence[str] = ()) -> list[Picture]:
    """Samples of the last step with their prompts, or the names of their classes, as captions."""
    step = layout.preview_steps(run.path)[-1]
    return samples(read_preview(run, step), captions or preview_classes(run, step))


def _cell(run: RunRecord, step: int, protocol: Protocol | None) -> tuple[Picture | None, str]:
    """One run at one step of the sample grid: its preview and its distance, if they exist."""
    rows = [row for row in run.distances(protocol) if row["step"] == step]
    distance = short_number(rows[-1][DISTANCE]) if rows else ""
    if not has_preview(run, step):
        return None, distance
    images = read_preview(run, step)
    score = f", {distance_name(protocol)} {distance}" if protocol is not None and distance else ""
    num = min(len(images), MOST_IMAGES)
    return tile(images, f"{num} samples of {run.name} at {count(step)} steps{score}"), distance


def tile(images: np.ndarray, caption: str = "") -> Picture:
    """uint8 (N, H, W, C) -> the first 16 as one picture, rows of 4."""
    from PIL import Image

    images = checked_images(images)[:MOST_IMAGES]
    picture = Image.fromarray(tile_pixels(images), "RGBA")
    # BOX averages pixels within a cell; a longer filter would mix images across the gaps.
    if max(picture.size) > MOST_PIXELS:
        picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.BOX)
    return Picture.of(picture, caption)


def samples(images: np.ndarray, captions: Sequence[str] = ()) -> list[Picture]:
    """uint8 (N, H, W, C) -> the first 16, one by one, each of at most 128 stored pixels a side."""
    from PIL import Image

    shown = []
    for index, image in enumerate(checked_images(images)[:MOST_IMAGES]):
        picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        picture.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS), Image.Resampling.LANCZOS)
        shown.append(Picture.of(picture, captions[index] if index < len(captions) else ""))
    return shown


def tile_pixels(images: np.ndarray, columns: int = 4) -> np.ndarray:
    """uint8 (N, H, W, C) -> RGBA (H', W', 4), with transparent gaps."""
    opaque = np.full((*images.shape[:3], 4), 255, np.uint8)
    opaque[..., :3] = images  # a single channel broadcasts to grey
    gap = max(1, images.shape[2] // 32)
    return grid(torch.from_numpy(opaque).permute(0, 3, 1, 2), columns, gap, background=0)


def checked_images(images: np.ndarray, what: str = "Images") -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise UserError(
            f"{what} must be uint8 (N, H, W, 3 or 1) with N at least 1, but are {images.dtype} {images.shape}."
        )
    return images


def read_preview(run: RunRecord, step: int) -> np.ndarray:
    """uint8 (N, H, W, C) of one step."""
    path = layout.preview(run.path, step, ".npz")
    arrays = load_npz(path, "a preview", ("arr_0",), remedy="Remove it.", limit=MOST_BYTES)
    if "arr_0" not in arrays:
        raise UserError(f"{path} is damaged: the array arr_0 is missing. Remove the file.")
    return checked_images(arrays["arr_0"], str(path))


def preview_classes(run: RunRecord, step: int) -> list[str]:
    """The class names of the samples of one step; empty for a single class, or if no names are stored."""
    names = run.data.get("class_names") or []
    path = layout.preview(run.path, step, ".npz")
    labels = load_npz(path, "a preview", ("labels",), remedy="Remove it.", limit=MOST_BYTES).get("labels")
    if labels is None or len(names) < 2:
        return []
    if labels.ndim != 1 or labels.dtype.kind != "i":
        raise UserError(f"{path} is damaged: its labels are not a list of whole numbers. Remove the file.")
    # Names come from data.json and labels from the preview: in a damaged folder they may not match.
    return [printable(str(names[label])) if 0 <= label < len(names) else "" for label in labels.tolist()]


def preview_prompts(run: RunRecord) -> list[str]:
    """The prompts of the samples, equal for every step; empty for a run without prompts."""
    path = layout.prompts_file(run.path)
    texts = files.read_json(path) if path.is_file() else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} is damaged: it must contain a list of texts. Remove the file.")
    return [text[:MOST_LETTERS] for text in texts]


def preview_columns(runs: Sequence[RunRecord]) -> list[int]:
    """The steps of the sample grid: at most 6, evenly spaced over all steps with previews, including the first and the last."""
    return layout.evenly_spaced(sorted({step for run in runs for step in layout.preview_steps(run.path)}), MOST_COLUMNS)


def has_preview(run: RunRecord, step: int) -> bool:
    return Path(layout.preview(run.path, step, ".npz")).is_file()


def analysis_pictures(run: RunRecord) -> list[Picture]:
    """Pictures in the folder of analyses, except those that the page plots itself."""
    shown = []
    for file in sorted((run.path / layout.ANALYSIS).glob("*.png")):
        beside = file.with_suffix(".json")
        content = files.read_object(beside) if beside.is_file() else {}
        if content.get("analysis") in VALUES:
            continue
        with faults.reading(file, "a picture", "Remove it."):
            data = file.read_bytes()
        picture = decode_image(data, str(file))
        picture.thumbnail((MOST_OF_ANALYSIS, MOST_OF_ANALYSIS))
        caption = f"{CAPTIONS.get(file.stem, file.stem)} {_verdict(content.get('verdict'))}".rstrip()
        shown.append(Picture.of(picture, caption))
    return shown


def _verdict(verdict: Any) -> str:
    """The results of `repa analyse neighbours`, from an untrusted file."""
    share, threshold = (
        (verdict.get("share_near"), verdict.get("threshold")) if isinstance(verdict, dict) else (None, None)
    )
    if not (is_number(share) and is_number(threshold)):
        return ""
    return (
        f"{100 * share:.1f} % of the samples are nearer than {threshold:.4f}, compared with 1 % of real images; expect about 1 % if "
        "nothing is copied."
    )


SHOWN = 4  # samples of each run and step, 2 x 2
# inches: side of those four, of a picture in a table, of the curve beside them, and of a letter in front of a row
CELL, PICTURE, CURVE, LETTER = 1.45, 1.05, 5.2, 0.1


def save_figure(runs: Sequence[str | Path | RunRecord], out: str | Path, names: Sequence[str] | None = None) -> Path:
    """Write a PNG: a row of previews per run, a column per step, next to the Fréchet distance against steps.

    Each step shows four samples, evenly spaced over its preview. Runs without previews have no row; without evaluations the
    denoising loss is plotted instead.
    Raises UserError if there is neither a preview nor a logged step.
    """
    records, _ = add_evaluations(read_runs(runs, names))
    shown = [run for run in records if layout.preview_steps(run.path)]
    if not shown and not any(run.steps for run in records):
        raise UserError("There is nothing to plot: the runs have neither samples nor logged steps yet.")
    steps, protocol = preview_columns(records), common_protocol(records)
    height = max(len(shown), 2) * (CELL + 0.25) + 0.3  # the curve needs the height of two rows
    width = LETTER * max((len(run.name) for run in shown), default=0) + len(steps) * CELL
    picture = new_figure(figsize=(width + CURVE, height), layout="constrained", facecolor="white")
    beside: Figure | SubFigure = picture
    if shown:
        left, beside = picture.subfigures(1, 2, width_ratios=(width, CURVE))  # type: ignore[misc]  # an array of the two
        groups = dict(zip((run.name for run in records), group_indices(records, group_seeds(records)), strict=True))
        axes = _place_pictures(
            left, [[_four_samples(run, step) for step in steps] for run in shown], [run.name for run in shown],
            [f"{count(step)} steps" for step in steps], fontsize=10, interpolation="lanczos",
        )  # fmt: skip
        for row, run in zip(axes, shown, strict=True):
            row[0].yaxis.label.set(color=colour(groups[run.name]), weight="bold")
            found = {r["step"]: r[DISTANCE] for r in run.distances(protocol)}
            for place, step in zip(row, steps, strict=True):
                place.set_xlabel(short_number(found[step]) if step in found else "", fontsize=10, color=TEXT)
    kind = DISTANCE if any(run.protocols for run in records) else "denoising"
    draw_curves(beside.add_subplot(), records, kind, protocol=protocol)
    return write_png(picture, out)


def _four_samples(run: RunRecord, step: int) -> np.ndarray | None:
    """RGBA (H, W, 4) of samples evenly chosen from a preview, where there is one."""
    if not has_preview(run, step):
        return None
    images = read_preview(run, step)
    return tile_pixels(images[np.linspace(0, len(images) - 1, SHOWN).round().astype(int)], 2)


def picture_table(
    pictures: Sequence[Sequence[np.ndarray]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Figure:
    """Pictures uint8 (H, W, 3) in rows and columns, enlarged without smoothing, each row and column with its label."""
    letters = max((len(part) for label in row_labels for part in label.split("\n")), default=0)
    size = 0.1 + 0.65 * LETTER * letters + PICTURE * max(map(len, pictures)), 0.3 + PICTURE * len(pictures)
    picture = new_figure(figsize=size, layout="constrained", facecolor="white")
    _place_pictures(picture, pictures, row_labels, column_labels, fontsize=8, interpolation="nearest")
    return picture


def _place_pictures(
    figure: Figure | SubFigure, pictures: Sequence[Sequence[np.ndarray | None]], row_labels: Sequence[str],
    column_labels: Sequence[str], *, fontsize: int, interpolation: str,
) -> np.ndarray:  # fmt: skip
    """Axes (rows, columns), each with its picture, if any; labels stand in front of rows and above columns."""
    axes = figure.subplots(len(pictures), max(map(len, pictures)), squeeze=False)
    style: dict[str, Any] = {"fontsize": fontsize, "color": TEXT, "parse_math": False}
    for place in axes.flat:
        place.set(xticks=[], yticks=[], frame_on=False)
    for row, images in zip(axes, pictures, strict=True):
        for place, image in zip(row, images, strict=False):
            if image is not None:
                place.imshow(image, interpolation=interpolation)
    for place, label in zip(axes[:, 0], row_labels, strict=False):
        place.set_ylabel(label, rotation=0, ha="right", va="center", **style)
    for place, label in zip(axes[0], column_labels, strict=False):
        place.set_title(label, pad=3, **style)
    return axes
