"""What papers report of the methods around REPA, as data, each figure with how it was made. Free of torch.

FID of 50,000 samples of ImageNet 256 x 256. Exactly as many images of every class (balanced labels) give about 0.1 less than
labels drawn at random, so the two never stand in one column. REPA's own tables are in `paper_tables.py`.
"""

from typing import Literal, NamedTuple

from repa.recipes.paper_tables import printed, steps_text

EPOCH = 5_000  # steps of a batch of 256, as the papers round it: 80 epochs are 400K

Labels = Literal["random", "balanced", "not stated"]


class PublishedFid(NamedTuple):
    """One figure."""

    model: str
    step: int  # in batches of 256
    fid: float
    guidance: str = "none"
    labels: Labels = "not stated"
    note: str = ""


PUBLISHED: dict[str, tuple[PublishedFid, ...]] = {
    "reg": (
        PublishedFid("SiT-B/2", 400_000, 15.2),
        PublishedFid("SiT-L/2", 400_000, 4.6),
        PublishedFid("SiT-XL/2", 200_000, 5.0),
        PublishedFid("SiT-XL/2", 400_000, 3.4),
        PublishedFid("SiT-XL/2", 1_000_000, 2.7),
        PublishedFid("SiT-XL/2", 2_400_000, 2.2),
        PublishedFid("SiT-XL/2", 4_000_000, 1.8),
        PublishedFid("SiT-XL/2", 400_000, 1.86, "classifier-free"),
        PublishedFid("SiT-XL/2", 4_000_000, 1.36, "classifier-free, scale 2.3, t up to 0.85"),
    ),
    "sra": (PublishedFid("SiT-XL/2", 4_000_000, 1.58, "classifier-free"),),
    "sra-dts-as": (
        PublishedFid("SiT-B/2", 800_000, 25.06),
        PublishedFid("SiT-B/2", 800_000, 25.19, note="attention not separated"),
        PublishedFid("SiT-XL/2", 4_000_000, 1.44, "not stated"),
    ),
    "dispersive": (
        PublishedFid("SiT-B/2", 400_000, 36.49, note="baseline of that paper"),
        PublishedFid("SiT-B/2", 400_000, 32.35, note="block 3, lambda 0.5, temperature 0.5"),
        PublishedFid("SiT-XL/2", 400_000, 6.02, "classifier-free, scale 1.5", note="baseline of that paper"),
        PublishedFid("SiT-XL/2", 400_000, 5.09, "classifier-free, scale 1.5", note="lambda 0.5, temperature 0.5"),
    ),
    "dispersive-last": (
        PublishedFid("SiT-B/2", 400_000, 32.64, note="last block, lambda 0.25, temperature 1"),
        PublishedFid("SiT-XL/2", 400_000, 4.74, "classifier-free, scale 1.5", note="the same settings"),
    ),
    "urepa": (
        PublishedFid("SiT as a U-Net", 400 * EPOCH, 1.41, "an interval", note="another network than this recipe's"),
    ),
    "jit": (
        PublishedFid("JiT-B/16", 600 * EPOCH, 3.66, "classifier-free, t up to 0.9", "balanced", "as PixelREPA's paper reports it"),
    ),
    "pixelrepa": (
        PublishedFid("JiT-B/16", 600 * EPOCH, 3.17, "classifier-free, scale 3.1, t up to 0.9", "balanced"),
        PublishedFid("JiT-H/16", 600 * EPOCH, 1.81, "classifier-free, scale 2.4, t up to 0.9", "balanced"),
    ),
    "internal-guidance": (
        PublishedFid("SiT-XL/2", 400_000, 5.31, "internal, scale 1.4"),
        PublishedFid("SiT-XL/2", 4_000_000, 1.75, "internal, scale 1.4"),
        PublishedFid("SiT-XL/2", 4_000_000, 1.46, "internal 1.4, classifier-free 1.35, t up to 0.7"),
        PublishedFid("LightningDiT-XL/1", 680 * EPOCH, 1.34, "internal", "random", "another network"),
        PublishedFid("LightningDiT-XL/1", 680 * EPOCH, 1.24, "internal", "balanced", "another network"),
        PublishedFid("LightningDiT-XL/1", 680 * EPOCH, 1.19, "internal, classifier-free", "random", "another network"),
        PublishedFid("LightningDiT-XL/1", 680 * EPOCH, 1.07, "internal, classifier-free", "balanced", "another network"),
    ),
    "tread": (
        PublishedFid("DiT-XL/2", 400_000, 3.93, note="as the project's page has it; another parameterisation than this recipe's"),
        PublishedFid("DiT-XL/2", 400_000, 2.09, "classifier-free", note="and steps with all tokens, how many is not stated"),
    ),
    "sprint": (
        PublishedFid("SiT-XL/2", 400 * EPOCH, 1.62, "path-drop, scale 3", note="and the second stage"),
        PublishedFid("SiT-XL/2", 400 * EPOCH, 1.96, "classifier-free, scale 3", note="and the second stage"),
        PublishedFid("SiT-XL/2", 400 * EPOCH, 1.59, "path-drop, scale 3", note="with REPA, and the second stage"),
        PublishedFid("SiT-XL/2", 400 * EPOCH, 1.87, "classifier-free, scale 3", note="with REPA, and the second stage"),
    ),
    "lightningdit": (
        PublishedFid("LightningDiT-XL/1", 64 * EPOCH, 5.14),
        PublishedFid("LightningDiT-XL/1", 800 * EPOCH, 2.17),
        PublishedFid("LightningDiT-XL/1", 64 * EPOCH, 2.11, "classifier-free, scale 10, 3 channels, t up to 0.89"),
        PublishedFid("LightningDiT-XL/1", 800 * EPOCH, 1.35, "classifier-free, scale 6.7, 3 channels, t up to 0.875"),
    ),
    "ddt": (
        PublishedFid("DDT-XL/2", 400 * EPOCH, 6.27, note="as a later paper (2605.21981) reports it"),
        PublishedFid("DDT-XL/2", 400 * EPOCH, 1.26, "classifier-free, scale 2, t up to 0.7"),
    ),
    "rae": (
        PublishedFid("DiT-DH-XL", 80 * EPOCH, 2.16, labels="balanced"),
        PublishedFid("DiT-DH-XL", 800 * EPOCH, 1.51, labels="balanced"),
        PublishedFid("DiT-DH-XL", 800 * EPOCH, 1.13, "autoguidance, scale 1.42", "balanced"),
    ),
}  # fmt: skip

# FID on MS-COCO 2014 at 256 pixels, 40,192 samples of validation captions in order: the text-to-image table of REPA's later version
COCO: tuple[PublishedFid, ...] = (
    PublishedFid("MMDiT", 150_000, 6.05, "classifier-free, scale 2, ODE with 50 steps", note="without alignment"),
    PublishedFid("MMDiT", 150_000, 5.30, "classifier-free, scale 2, SDE with 250 steps", note="without alignment"),
    PublishedFid("MMDiT", 150_000, 4.73, "classifier-free, scale 2, ODE with 50 steps", note="with alignment"),
    PublishedFid("MMDiT", 150_000, 4.14, "classifier-free, scale 2, SDE with 250 steps", note="with alignment"),
)


def headline(figures: tuple[PublishedFid, ...], model: str, *, guided: bool = False) -> str:
    """'FID 5.0 at 200K, 1.8 at 4M': the first and the last of the same network, with guidance or without."""
    own = [f for f in figures if f.model == model and (f.guidance != "none") == guided and "baseline" not in f.note]
    if not own:
        return f"no {'guided' if guided else 'unguided'} figure known"
    ends = dict.fromkeys([min(own, key=lambda f: f.step), max(own, key=lambda f: f.step)])
    return "FID " + ", ".join(f"{printed(f.fid)} at {steps_text(f.step)}" for f in ends)


def figures_table(figures: tuple[PublishedFid, ...]) -> list[str]:
    """The papers' figures, one line each; a column for each way of drawing labels."""
    if not figures:
        return ["No figure of a paper is known here."]
    columns: tuple[Labels, ...] = ("random", "balanced", "not stated")
    lines = [["steps of 256", "network", *(f"FID, labels {labels}" for labels in columns), "guidance", ""]]
    for f in figures:
        cells = [printed(f.fid) if f.labels == labels else "" for labels in columns]
        lines.append([f"{f.step:,}", f.model, *cells, f.guidance, f.note])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
