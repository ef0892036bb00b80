"""What papers report of the methods around REPA, as data, each figure with how it was made. Free of torch.

FID of 50,000 samples of ImageNet 256 x 256. Exactly as many images of every class (balanced labels) give about 0.1 less than
labels drawn at random, so the two never stand in one column. REPA's own tables are in `paper_tables.py`.
"""

from typing import Literal, NamedTuple

from repa.recipes.paper_tables import printed, steps_text

EPOCH = 5_000  # steps of a batch of 256, as the papers round it: 80 epochs are 400K

Labels = Literal["random", "balanced", "not stated"]


class Published(NamedTuple):
    """One figure."""

    model: str
    step: int  # in batches of 256
    fid: float
    guidance: str = "none"
    labels: Labels = "not stated"
    note: str = ""


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "reg": (
        Published("SiT-B/2", 400_000, 15.2),
        Published("SiT-L/2", 400_000, 4.6),
        Published("SiT-XL/2", 200_000, 5.0),
        Published("SiT-XL/2", 400_000, 3.4),
        Published("SiT-XL/2", 1_000_000, 2.7),
        Published("SiT-XL/2", 2_400_000, 2.2),
        Published("SiT-XL/2", 4_000_000, 1.8),
        Published("SiT-XL/2", 400_000, 1.86, "classifier-free"),
        Published("SiT-XL/2", 4_000_000, 1.36, "classifier-free, scale 2.3, t up to 0.85"),
    ),
    "sra": (Published("SiT-XL/2", 4_000_000, 1.58, "classifier-free"),),
    "sra-dts-as": (
        Published("SiT-B/2", 800_000, 25.06),
        Published("SiT-B/2", 800_000, 25.19, note="attention not separated"),
        Published("SiT-XL/2", 4_000_000, 1.44, "not stated"),
    ),
    "dispersive": (
        Published("SiT-B/2", 400_000, 36.49, note="baseline of that paper"),
        Published("SiT-B/2", 400_000, 32.35, note="block 3, lambda 0.5, temperature 0.5"),
        Published("SiT-XL/2", 400_000, 6.02, "classifier-free, scale 1.5", note="baseline of that paper"),
        Published("SiT-XL/2", 400_000, 5.09, "classifier-free, scale 1.5", note="lambda 0.5, temperature 0.5"),
    ),
    "dispersive-last": (
        Published("SiT-B/2", 400_000, 32.64, note="last block, lambda 0.25, temperature 1"),
        Published("SiT-XL/2", 400_000, 4.74, "classifier-free, scale 1.5", note="the same settings"),
    ),
    "urepa": (
        Published("SiT as a U-Net", 400 * EPOCH, 1.41, "an interval", note="another network than this recipe's"),
    ),
    "jit": (
        Published("JiT-B/16", 600 * EPOCH, 3.66, "classifier-free, t up to 0.9", "balanced", "as PixelREPA's paper reports it"),
    ),
    "pixelrepa": (
        Published("JiT-B/16", 600 * EPOCH, 3.17, "classifier-free, scale 3.1, t up to 0.9", "balanced"),
        Published("JiT-H/16", 600 * EPOCH, 1.81, "classifier-free, scale 2.4, t up to 0.9", "balanced"),
    ),
    "internal-guidance": (
        Published("SiT-XL/2", 400_000, 5.31, "internal, scale 1.4"),
        Published("SiT-XL/2", 4_000_000, 1.75, "internal, scale 1.4"),
        Published("SiT-XL/2", 4_000_000, 1.46, "internal 1.4, classifier-free 1.35, t up to 0.7"),
        Published("LightningDiT-XL/1", 680 * EPOCH, 1.34, "internal", "random", "another network"),
        Published("LightningDiT-XL/1", 680 * EPOCH, 1.24, "internal", "balanced", "another network"),
        Published("LightningDiT-XL/1", 680 * EPOCH, 1.19, "internal, classifier-free", "random", "another network"),
        Published("LightningDiT-XL/1", 680 * EPOCH, 1.07, "internal, classifier-free", "balanced", "another network"),
    ),
    "tread": (
        Published("DiT-XL/2", 400_000, 3.93, note="as the project's page has it; another parameterisation than this recipe's"),
        Published("DiT-XL/2", 400_000, 2.09, "classifier-free", note="and steps with all tokens, how many is not stated"),
    ),
    "sprint": (
        Published("SiT-XL/2", 400 * EPOCH, 1.62, "path-drop, scale 3", note="and the second stage"),
        Published("SiT-XL/2", 400 * EPOCH, 1.96, "classifier-free, scale 3", note="and the second stage"),
        Published("SiT-XL/2", 400 * EPOCH, 1.59, "path-drop, scale 3", note="with REPA, and the second stage"),
        Published("SiT-XL/2", 400 * EPOCH, 1.87, "classifier-free, scale 3", note="with REPA, and the second stage"),
    ),
    "lightningdit": (
        Published("LightningDiT-XL/1", 64 * EPOCH, 5.14),
        Published("LightningDiT-XL/1", 800 * EPOCH, 2.17),
        Published("LightningDiT-XL/1", 64 * EPOCH, 2.11, "classifier-free, scale 10, 3 channels, t up to 0.89"),
        Published("LightningDiT-XL/1", 800 * EPOCH, 1.35, "classifier-free, scale 6.7, 3 channels, t up to 0.875"),
    ),
    "ddt": (
        Published("DDT-XL/2", 400 * EPOCH, 6.27, note="as a later paper (2605.21981) reports it"),
        Published("DDT-XL/2", 400 * EPOCH, 1.26, "classifier-free, scale 2, t up to 0.7"),
    ),
    "rae": (
        Published("DiT-DH-XL", 80 * EPOCH, 2.16, labels="balanced"),
        Published("DiT-DH-XL", 800 * EPOCH, 1.51, labels="balanced"),
        Published("DiT-DH-XL", 800 * EPOCH, 1.13, "autoguidance, scale 1.42", "balanced"),
    ),
}  # fmt: skip

# FID on MS-COCO 2014 at 256 pixels, 40,192 samples of validation captions in order: the text-to-image table of REPA's later version
COCO: tuple[Published, ...] = (
    Published("MMDiT", 150_000, 6.05, "classifier-free, scale 2, ODE with 50 steps", note="without alignment"),
    Published("MMDiT", 150_000, 5.30, "classifier-free, scale 2, SDE with 250 steps", note="without alignment"),
    Published("MMDiT", 150_000, 4.73, "classifier-free, scale 2, ODE with 50 steps", note="with alignment"),
    Published("MMDiT", 150_000, 4.14, "classifier-free, scale 2, SDE with 250 steps", note="with alignment"),
)


def headline(figures: tuple[Published, ...], model: str, *, guided: bool = False) -> str:
    """'FID 5.0 at 200K, 1.8 at 4M': the first and the last of the same network, with guidance or without."""
    own = [f for f in figures if f.model == model and (f.guidance != "none") == guided and "baseline" not in f.note]
    if not own:
        return f"no {'guided' if guided else 'unguided'} figure known"
    ends = dict.fromkeys([min(own, key=lambda f: f.step), max(own, key=lambda f: f.step)])
    return "FID " + ", ".join(f"{printed(f.fid)} at {steps_text(f.step)}" for f in ends)


def figures_table(figures: tuple[Published, ...]) -> list[str]:
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
