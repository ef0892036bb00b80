"""The images of the page, PNG in data URIs: previews of runs as a grid and one by one, training images, what analyses drew.
And images in rows and columns as one PNG: what runs did, for a README, and the tables of pictures of `repa analyse`."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from repa.base import faults, files
from repa.base.arrays import load_npz
from repa.base.errors import UserError, printable
from repa.base.images import decode_image
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
from repa.report.speedups import Group, group_indices, grouped
from repa.report.style import TEXT, colour, new_figure, write_png
from repa.report.text import count, figure
from repa.runs import layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

GRID_WIDTH = 930  # CSS pixels for the columns of the sample grid
CELL_WIDTH = 320  # and at most for one of them
TOP_RUNS = 3  # whose last samples are shown next to the curve at the top
MOST_BYTES = 2**30  # of the arrays of a preview
MOST_IMAGES = 16  # per tile, in rows of 4
MOST_COLUMNS = 6  # steps side by side
MOST_OF_ANALYSIS = 1600  # side of a picture of `repa analyse`
CAPTIONS = {
    "pictures": "Tokens as colours, their first three principal components, next to the images.",
    "progress": "Samples of checkpoints from the same noise and labels.",
    "depth": "How far the prediction moves when a block is left out, for every block and noise level.",
    "neighbours": "The samples that are nearest to training images, each with its distance and its nearest training images.",
}
MOST_LETTERS = 300  # of a prompt under its sample
SAMPLE_PIXELS = 128  # side of an image that stands alone
MOST_PIXELS = 512  # side of a tile in stored pixels: larger images are reduced


class Sample(NamedTuple):
    """One image as a data URI, and what is written under it: the name of its class, or nothing."""

    uri: str
    caption: str


class Tile(NamedTuple):
    """A square-ish grid of images as a data URI, and its size in stored pixels."""

    uri: str
    width: int
    height: int
    num_images: int

    def shown(self, target: int) -> tuple[int, int]:
        """Size on the page: the largest whole multiple of stored pixels within `target`, or `target` if none is."""
        factor = target // self.width or target / self.width
        return round(self.width * factor), round(self.height * factor)


class Cell(NamedTuple):
    """One run at one step of the sample grid; no tile where that run has no preview then."""

    tile: Tile | None
    distance: str
    alt: str


def sample_pictures(
    records: Sequence[RunRecord],
    groups: Sequence[Group],
    training_images: np.ndarray | None,
    training_captions: Sequence[str],
) -> dict[str, Any]:
    """The last samples, one by one; the grid (rows are runs, columns steps); training images."""
    steps = preview_columns(records)
    protocol = common_protocol(records)
    grid = [[_cell(run, step, protocol) for step in steps] for run in records]
    last = [(run, _last_samples(run)) for run in records if any(has_preview(run, step) for step in steps)]
    leaders = [group.runs[0] for group in _best_first(groups, protocol)][:TOP_RUNS]
    return {
        "steps": steps,
        "cell_width": min(CELL_WIDTH, GRID_WIDTH // max(len(steps), 1)),
        "grid": [(run, cells) for run, cells in zip(records, grid, strict=True) if any(cell.tile for cell in cells)],
        "top_samples": [(run, found) for run, found in last if run in leaders],
        "other_samples": [(run, found) for run, found in last if run not in leaders],
        "training_samples": [] if training_images is None else samples(training_images, training_captions),
        "captioned_samples": [(run, _last_samples(run, texts)) for run, _ in last if (texts := preview_prompts(run))],
    }


def _best_first(groups: Sequence[Group], protocol: Protocol | None) -> list[Group]:
    """The first group, then the others by the last distance of their first run, where all were measured alike."""

    def last_distance(group: Group) -> float:
        rows = group.runs[0].distances(protocol)
        return rows[-1][DISTANCE] if rows else math.inf

    return [*groups[:1], *sorted(groups[1:], key=last_distance)]


def _last_samples(run: RunRecord, captions: Sequence[str] = ()) -> list[Sample]:
    """Of the last step; under them the captions, or the names of their classes."""
    step = layout.preview_steps(run.path)[-1]
    return samples(read_preview(run, step), captions or preview_classes(run, step))


def _cell(run: RunRecord, step: int, protocol: Protocol | None) -> Cell:
    rows = [row for row in run.distances(protocol) if row["step"] == step]
    distance = figure(rows[-1][DISTANCE]) if rows else ""
    if not has_preview(run, step):
        return Cell(None, distance, "")
    drawn = tile(read_preview(run, step))
    score = f", {distance_name(protocol)} {distance}" if protocol is not None and distance else ""
    return Cell(drawn, distance, f"{drawn.num_images} samples of {run.name} at {count(step)} steps{score}")


def tile(images: np.ndarray) -> Tile:
    """uint8 (N, H, W, C) -> a tile of the first 16, rows of 4."""
    from PIL import Image

    images = checked_images(images)[:MOST_IMAGES]
    picture = Image.fromarray(tile_pixels(images), "RGBA")
    # BOX averages pixels within a cell; a longer filter would mix images across the gaps.
    if max(picture.size) > MOST_PIXELS:
        picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.BOX)
    return Tile(_uri(picture), *picture.size, len(images))


def samples(images: np.ndarray, captions: Sequence[str] = ()) -> list[Sample]:
    """uint8 (N, H, W, C) -> the first 16, one by one, each of at most 128 stored pixels a side."""
    from PIL import Image

    found = []
    for index, image in enumerate(checked_images(images)[:MOST_IMAGES]):
        picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        picture.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS), Image.Resampling.LANCZOS)
        found.append(Sample(_uri(picture), captions[index] if index < len(captions) else ""))
    return found


def tile_pixels(images: np.ndarray, columns: int = 4) -> np.ndarray:
    """uint8 (N, H, W, C) -> RGBA (H', W', 4), with transparent gaps."""
    num, height, width, _ = images.shape
    columns = min(columns, num)
    rows, gap = -(-num // columns), max(1, width // 32)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width, :3] = image  # a single channel broadcasts to grey
        canvas[top : top + height, left : left + width, 3] = 255
    return canvas


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
        raise UserError(f"{path} is damaged: it lacks the array arr_0. Remove it.")
    return checked_images(arrays["arr_0"], str(path))


def preview_classes(run: RunRecord, step: int) -> list[str]:
    """The names of the classes that the samples of one step are of; none where there is one class only, or none was kept."""
    names = run.data.get("class_names") or []
    path = layout.preview(run.path, step, ".npz")
    labels = load_npz(path, "a preview", ("labels",), remedy="Remove it.", limit=MOST_BYTES).get("labels")
    if labels is None or len(names) < 2:
        return []
    if labels.ndim != 1 or labels.dtype.kind != "i":
        raise UserError(f"{path} is damaged: its labels are not a list of whole numbers. Remove it.")
    # Names are data.json's and labels the preview's: in a damaged folder they need not fit.
    return [printable(str(names[label])) if 0 <= label < len(names) else "" for label in labels.tolist()]


def preview_prompts(run: RunRecord) -> list[str]:
    """The prompts that the samples of every step are of; none of a run without prompts."""
    path = layout.prompts_file(run.path)
    texts = files.read_json(path) if path.is_file() else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} is damaged: it must hold a list of texts. Remove it.")
    return [text[:MOST_LETTERS] for text in texts]


def preview_columns(runs: Sequence[RunRecord]) -> list[int]:
    """The steps of the sample grid: at most 6, evenly chosen from all that have previews, first and last among them."""
    return layout.evenly_spaced(sorted({step for run in runs for step in layout.preview_steps(run.path)}), MOST_COLUMNS)


def has_preview(run: RunRecord, step: int) -> bool:
    return Path(layout.preview(run.path, step, ".npz")).is_file()


class AnalysisPicture(NamedTuple):
    """A picture that `repa analyse` made, and what it shows."""

    tile: Tile
    caption: str


def analysis_pictures(run: RunRecord) -> list[AnalysisPicture]:
    """Pictures in the folder of analyses, except those of rows that the page itself draws."""
    found = []
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
        found.append(AnalysisPicture(Tile(_uri(picture), *picture.size, 1), caption))
    return found


def _verdict(found: Any) -> str:
    """What `repa analyse neighbours` found, as its file says it; whoever made the file may have written anything."""
    share, threshold = (found.get("share_near"), found.get("threshold")) if isinstance(found, dict) else (None, None)
    if not (is_number(share) and is_number(threshold)):
        return ""
    return (
        f"{100 * share:.1f} % of the samples are nearer than {threshold:.4f}, as 1 % of real images are: about 1 % where nothing "
        "is copied."
    )


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    # Pages are mailed and committed: smaller is worth the time.
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


SHOWN = 4  # samples of each run and step, 2 x 2
# inches
CELL, GAP = 1.36, 0.1  # side of those four, room between cells
NAME, NUMBER, ABOVE, BELOW = 1.0, 0.24, 0.42, 0.5  # a run's name, under a cell, steps above, the curve's label below
CURVE, CURVE_LABELS = 4.4, 0.75
PICTURE = 1.05  # side of a picture in a table


def save_figure(runs: Sequence[str | Path | RunRecord], out: str | Path, names: Sequence[str] | None = None) -> Path:
    """Write a PNG: a row of previews for each run, a column for each step, next to the Fréchet distance against steps.

    Four samples stand for each step, evenly chosen from those of a preview. Runs without previews have no row; without
    evaluations the denoising loss is drawn instead.
    Raises UserError when there is neither a preview nor a logged step.
    """
    records, _ = add_evaluations(read_runs(runs, names))
    drawn = [(index, run) for index, run in enumerate(records) if layout.preview_steps(run.path)]
    if not drawn and not any(run.steps for run in records):
        raise UserError("There is nothing to draw: the runs have neither samples nor logged steps yet.")
    steps, protocol = preview_columns(records), common_protocol(records)
    groups = group_indices(records, grouped(records))
    rows = max(len(drawn), 2)  # the curve needs the height of two
    width = NAME + len(steps) * (CELL + GAP) if drawn else 0.0
    size = width + CURVE_LABELS + CURVE + 0.2, ABOVE + rows * (CELL + NUMBER) + BELOW
    picture = new_figure(figsize=size, facecolor="white")
    for row, (index, run) in enumerate(drawn):
        _draw_row(picture, run, steps, row, colour(groups[index]), protocol)
    box = [width + CURVE_LABELS, BELOW, CURVE, size[1] - BELOW - ABOVE / 2]
    axes = picture.add_axes((box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]))
    kind = "frechet_distance" if any(run.protocols for run in records) else "denoising"
    draw_curves(axes, records, kind, protocol=protocol)
    return write_png(picture, out)


def _draw_row(
    picture: Figure, run: RunRecord, steps: Sequence[int], row: int, run_colour: str, protocol: Protocol | None
) -> None:
    """The name of a run, and its samples at every step with their distance."""
    width, height = picture.get_size_inches()
    bottom = height - ABOVE - (row + 1) * (CELL + NUMBER) + NUMBER
    style: dict[str, Any] = {"fontsize": 10, "color": TEXT, "va": "center", "parse_math": False}
    picture.text(
        (NAME - 0.12) / width, (bottom + CELL / 2) / height, run.name, **{**style, "color": run_colour}, ha="right", weight="bold"
    )  # fmt: skip
    found = {r["step"]: r[DISTANCE] for r in run.distances(protocol)}
    for column, step in enumerate(steps):
        left = NAME + column * (CELL + GAP)
        middle = (left + CELL / 2) / width
        if row == 0:
            picture.text(middle, (height - ABOVE / 2) / height, f"{count(step)} steps", **style, ha="center")
        if has_preview(run, step):
            axes = picture.add_axes((left / width, bottom / height, CELL / width, CELL / height))
            images = read_preview(run, step)
            chosen = images[np.linspace(0, len(images) - 1, SHOWN).round().astype(int)]
            axes.imshow(tile_pixels(chosen, 2), interpolation="lanczos", aspect="auto")
            axes.set_axis_off()
        if step in found:
            picture.text(middle, (bottom - NUMBER / 2) / height, figure(found[step]), **style, ha="center")


def picture_table(
    pictures: Sequence[Sequence[np.ndarray]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Figure:
    """Pictures uint8 (H, W, 3) in rows and columns, enlarged without smoothing, each row and column with its label."""
    num_rows, num_columns = len(pictures), max(map(len, pictures))
    beside = 0.2 + 0.065 * max((len(part) for label in row_labels for part in label.split("\n")), default=0)
    above = 0.1 + 0.17 * max((label.count("\n") + 1 for label in column_labels if label), default=0)
    size = beside + PICTURE * num_columns, above + PICTURE * num_rows + 0.1
    picture = new_figure(figsize=size, facecolor="white")
    for r, row in enumerate(pictures):
        bottom = (PICTURE * (num_rows - 1 - r) + 0.1) / size[1]
        picture.text(
            (beside - 0.1) / size[0], bottom + PICTURE / 2 / size[1], row_labels[r] if row_labels else "",
            ha="right", va="center", fontsize=8, color=TEXT, parse_math=False,
        )  # fmt: skip
        for c, pixels in enumerate(row):
            box = ((beside + PICTURE * c) / size[0], bottom, 0.96 * PICTURE / size[0], 0.96 * PICTURE / size[1])
            axes = picture.add_axes(box)
            axes.imshow(pixels, interpolation="nearest")
            axes.set_axis_off()
            if r == 0 and c < len(column_labels):
                axes.set_title(column_labels[c], fontsize=8, color=TEXT, pad=3, parse_math=False)
    return picture
