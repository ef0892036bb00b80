"""Samples as PNG files: in one folder, or in the folders that scorers of prompts read, GenEval's among them.

OUT/00000/metadata.jsonl       the prompt's line of the file of prompts, or {"prompt": ...}
OUT/00000/samples/00000.png    samples of it, in the order of their seeds
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from repa.base import files
from repa.base.arrays import load_npz
from repa.base.errors import UserError
from repa.base.images import save_png
from repa.runs.loading import Prompts

LIMIT = 2**36  # bytes of samples that are held at a time


def write_pngs(parts: Iterable[np.ndarray], out: Path) -> None:
    """Image i of all parts, uint8 (n, H, W, 3), as out/00000i.png; the folder appears when all are there."""
    with files.atomic_folder(out) as temporary:
        for index, image in enumerate(image for part in parts for image in part):
            save_png(image, temporary / f"{index:06d}.png")


def require_folders(out: Path) -> None:
    """Raises UserError where `write_folders` would not write."""
    if out.exists() and not (out.is_dir() and all(re.fullmatch(r"\d{5,}", path.name) for path in out.iterdir())):
        raise UserError(f"{out} holds other things than folders of samples: choose another --folders.")
    files.require_place(out, out)


def write_folders(samples: Path, prompts: Prompts, prompt_file: str, out: Path) -> None:
    """Lay the images of an .npz by `repa sample` out by prompt; the same call again writes the same.

    Args:
        samples: image i is of prompt i modulo their number.
        prompt_file: where the prompts came from, or "".
        out: a new or empty folder, or one that this function wrote.

    Raises:
        UserError: the folder holds other things.
    """
    require_folders(out)
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in prompts.texts]
    if prompt_file.endswith(".jsonl"):  # scorers find there what they need besides the prompt
        lines = [line for line in Path(prompt_file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    images = load_npz(samples, "samples", ("arr_0",), limit=LIMIT)["arr_0"]
    for index, image in enumerate(images):
        number, place = index % len(prompts.texts), index // len(prompts.texts)
        folder = out / f"{number:05d}"
        save_png(image, folder / "samples" / f"{place:05d}.png")
        if not place:
            files.write_text(folder / "metadata.jsonl", lines[number] + "\n")
