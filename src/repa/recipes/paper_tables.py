"""What the paper (arXiv 2410.06940) reports, as data: one entry a row of its tables. Free of torch.

The recipes are made from these rows, and the report shows them next to a run that trains as one of them does. Figures are
of 50,000 samples of the average of the weights, against ImageNet in Inception features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

FACTOR = 8  # pixels per latent, along each side
CLASSES = 1000
IMAGES = 1_281_167  # of ImageNet's training set
SAMPLES = 50_000
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"  # ADM's statistics


class Figures(NamedTuple):
    """One line of a table; None where the paper gives no figure."""

    step: int
    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    accuracy: float | None = None  # of a linear probe, in per cent
    sampling: str = "sde"  # a name of SAMPLINGS; empty where how is not known


@dataclass(frozen=True)
class Row:
    """A training run of the paper, and what it gave. Whatever is not named here is the same in all of them."""

    table: str
    model: str
    figures: tuple[Figures, ...] = ()
    target: str = ""  # the encoder that it is aligned to; empty trains without alignment
    depth: int = 8
    loss: str = "cosine"
    weight: float = 0.5
    resolution: int = 256
    steps_per_second: float | None = None  # on 8 H100, where the paper says
    note: str = ""

    @property
    def alignment(self) -> dict[str, Any] | None:
        """The settings of its alignment term."""
        if not self.target:
            return None
        return {"target": self.target, "depth": self.depth, "loss": self.loss, "weight": self.weight}

    @property
    def objective(self) -> str:
        """SiT is trained by flow matching, DiT as an improved DDPM."""
        return "ddpm" if self.model.startswith("DiT") else "flow"

    @property
    def unguided(self) -> list[Figures]:
        """Those sampled without guidance."""
        return [figures for figures in self.figures if figures.sampling in ("sde", "ddpm")]

    @property
    def guided(self) -> list[Figures]:
        """Those sampled with guidance."""
        return [figures for figures in self.figures if "guidance" in SAMPLINGS.get(figures.sampling, {})]

    @property
    def num_steps(self) -> int:
        """The steps of its first result: 400K, or where its figures begin later."""
        return max(400_000, min((figures.step for figures in self.figures), default=0))


def _guided(scale: float, high: float = 1.0) -> str:
    return f"sde-guided-{scale:g}" + (f"-to-{high:g}" if high < 1 else "")


# FID by guidance: 4M steps of SiT-XL/2, all of [0, 1] and the interval [0, high]
_GUIDED = {
    (1.30, 1.0): 1.80, (1.325, 1.0): 1.79, (1.35, 1.0): 1.80, (1.375, 1.0): 1.84, (1.40, 1.0): 1.90,
    (2.0, 0.8): 2.23, (2.0, 0.75): 1.78, (2.0, 0.7): 1.48, (2.0, 0.65): 1.44, (2.0, 0.6): 1.56,
    (1.9, 0.7): 1.45, (1.8, 0.7): 1.42,
}  # fmt: skip
_BEST = (1.8, 0.7)  # the one of which the other figures are known; another table prints recall 0.64

# How samples were made: the settings of `repa sample` by name.
SAMPLINGS: dict[str, dict[str, Any]] = {
    "sde": {"sampler": "euler_maruyama", "steps": 250},
    "ddpm": {"sampler": "ddpm", "steps": 250},
} | {
    _guided(scale, high): {
        "sampler": "euler_maruyama",
        "steps": 250,
        "guidance": [f"cfg:scale={scale:g}" + (f",high={high:g}" if high < 1 else "")],
    }
    for scale, high in _GUIDED
}

_XL_GUIDED = tuple(
    Figures(4_000_000, fid, *((4.70, 305.7, 0.80, 0.65) if key == _BEST else ()))._replace(sampling=_guided(*key))
    for key, fid in _GUIDED.items()
)
_SWAPPED = "Table 6 of the paper swaps the columns of the depths: 4 belongs to B, as in appendix G, and 8 to L and XL."
_NEGATIVES = (
    "The paper names neither the temperature nor the negatives of NT-Xent: docs/methods.md says which are taken."
)
_512 = "Figures of the paper's final version, printed by epochs (80 are 400K steps); how they were sampled is not known here."


def _encoder(target: str, fid: float | None, note: str = "") -> Row:
    """Table 2: SiT-L/2 aligned after block 8 by NT-Xent."""
    figures = () if fid is None else (Figures(400_000, fid),)
    return Row("Table 2", "SiT-L/2", figures, target, loss="nt_xent", note=f"{note} {_NEGATIVES}".strip())


def _depth(depth: int, fid: float) -> Row:
    """Table 2: the depth, with DINOv2-L and NT-Xent."""
    figures = (Figures(400_000, fid),)
    return Row("Table 2", "SiT-L/2", figures, "dinov2-l", depth, loss="nt_xent", note=_NEGATIVES)


def _lambda(weight: float, fid: float) -> Row:
    """The ablation of lambda."""
    figures = (Figures(400_000, fid),)
    return Row("the ablation of lambda", "SiT-XL/2", figures, "dinov2-b", weight=weight, steps_per_second=5.4)


ROWS: dict[str, Row] = {
    "sit-b2": Row("Table 3", "SiT-B/2", (Figures(400_000, 33.0, 6.46, 43.7, 0.53, 0.63),)),
    "sit-b2-repa": Row(
        "Table 3, appendix G",
        "SiT-B/2",
        (
            Figures(50_000, 78.2, 11.71, 17.1, 0.33, 0.48, 43.2),
            Figures(100_000, 49.5, 7.00, 27.5, 0.46, 0.59, 50.9),
            Figures(200_000, 33.2, 6.68, 43.7, 0.54, 0.63, 50.9),
            Figures(400_000, 24.4, 6.40, 59.9, 0.59, 0.65, 61.2),
        ),
        "dinov2-b",
        depth=4,
        note=_SWAPPED,
    ),
    "sit-l2": Row("Table 3", "SiT-L/2", (Figures(400_000, 18.8, 5.29, 72.0, 0.64, 0.64),)),
    "sit-l2-repa": Row(
        "Table 7, appendix G",
        "SiT-L/2",
        (
            Figures(50_000, 55.4, 24.0, 23.0, 0.43, 0.53, 55.3),
            Figures(100_000, 24.1, 6.25, 55.7, 0.62, 0.60, 61.8),
            Figures(200_000, 14.0, 5.18, 86.5, 0.67, 0.64, 66.3),
            Figures(400_000, 10.0, 5.20, 109.2, 0.69, 0.65, 69.4),
        ),
        "dinov2-b",
        note="Table 3 prints 9.7 for SiT-L/2, which is NT-Xent's figure: sit-l2-repa-dinov2-b-ntxent.",
    ),
    "sit-xl2": Row(
        "Table 3",
        "SiT-XL/2",
        (Figures(400_000, 17.2), Figures(7_000_000, 8.3, 6.32, 131.7, 0.68, 0.67)),
    ),
    "sit-xl2-repa": Row(
        "Table 3, Table 4, appendix G",
        "SiT-XL/2",
        (
            Figures(50_000, 52.3, 31.24, 24.3, 0.45, 0.53, 56.1),
            Figures(100_000, 19.4, 6.06, 67.4, 0.64, 0.61, 62.9),
            Figures(150_000, 13.6),
            Figures(200_000, 11.1, 5.05, 100.4, 0.69, 0.64, 67.3),
            Figures(400_000, 7.9, 5.06, 122.6, 0.70, 0.65, 70.3),
            Figures(1_000_000, 6.4),
            Figures(4_000_000, 5.9, 5.73, 157.8, 0.70, 0.69, 74.6),
            *_XL_GUIDED,
        ),
        "dinov2-b",
        steps_per_second=5.4,
        note="Guidance is on for t in [0, 0.7] of this time, in which t = 0 is data.",
    ),
    "dit-l2": Row("Table 3", "DiT-L/2", (Figures(400_000, 23.3, sampling="ddpm"),)),
    "dit-l2-repa": Row("Table 3", "DiT-L/2", (Figures(400_000, 15.6, sampling="ddpm"),), "dinov2-b"),
    "dit-xl2": Row("Table 3", "DiT-XL/2", (Figures(400_000, 19.5, sampling="ddpm"),)),
    "dit-xl2-repa": Row(
        "Table 3",
        "DiT-XL/2",
        (Figures(400_000, 12.3, sampling="ddpm"), Figures(850_000, 9.6, sampling="ddpm")),
        "dinov2-b",
    ),
    "sit-l2-repa-mae-l-ntxent": _encoder("mae-l", 12.5),
    "sit-l2-repa-dino-b-ntxent": _encoder("dino-b", 11.9),
    "sit-l2-repa-mocov3-l-ntxent": _encoder("mocov3-l", 11.9),
    "sit-l2-repa-ijepa-h-ntxent": _encoder("ijepa-h", 11.6),
    "sit-l2-repa-clip-l-ntxent": _encoder("clip-l", 11.0),
    "sit-l2-repa-siglip-b-ntxent": _encoder(
        "siglip-b", None, "SigLIP is in the final version's table only; its size and its figures are not known here."
    ),
    "sit-l2-repa-dinov2-b-ntxent": _encoder("dinov2-b", 9.7, "Table 3 prints this figure for SiT-L/2 too."),
    "sit-l2-repa-dinov2-l-ntxent": _encoder("dinov2-l", 10.0),
    "sit-l2-repa-dinov2-g-ntxent": _encoder("dinov2-g", 9.8),
    "sit-l2-repa-dinov2-l": Row("Table 2", "SiT-L/2", (Figures(400_000, 9.9),), "dinov2-l"),
    "sit-l2-repa-depth6": _depth(6, 10.3),
    "sit-l2-repa-depth8": _depth(8, 10.0),
    "sit-l2-repa-depth10": _depth(10, 10.5),
    "sit-l2-repa-depth12": _depth(12, 11.2),
    "sit-l2-repa-depth14": _depth(14, 11.6),
    "sit-l2-repa-depth16": _depth(16, 12.1),
    "sit-xl2-repa-lambda0.25": _lambda(0.25, 8.6),
    "sit-xl2-repa-lambda0.5": _lambda(0.5, 7.9),
    "sit-xl2-repa-lambda0.75": _lambda(0.75, 7.8),
    "sit-xl2-repa-lambda1": _lambda(1.0, 7.8),
    "sit-xl2-512": Row(
        "the results at 512 pixels", "SiT-XL/2", (Figures(3_000_000, 2.62, sampling=""),), resolution=512, note=_512
    ),
    "sit-xl2-repa-512": Row(
        "the results at 512 pixels",
        "SiT-XL/2",
        (
            Figures(400_000, 2.44, sampling=""),
            Figures(500_000, 2.32, sampling=""),
            Figures(1_000_000, 2.08, sampling=""),
        ),
        "dinov2-b",
        resolution=512,
        note=_512,
    ),
}


def printed(value: float | None) -> str:
    """A figure with as many decimals as the paper prints: 10.0, 1.42, 0.70."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 1 and round(value, 1) == value else f"{value:.2f}"


def steps_text(number: int) -> str:
    """'400K', '4M'."""
    return f"{number / 1e6:g}M" if number >= 1_000_000 else f"{number // 1000}K"
