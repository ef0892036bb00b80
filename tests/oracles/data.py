"""Slow literal transcriptions of the data package's formulas."""

import numpy as np
from PIL import Image


def adm_crop_geometry(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """ADM's crop in integers: width and height after all resizing, then the corner (left, top) of the crop."""
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    return width, height, (width - size) // 2, (height - size) // 2


def halve(pixels: np.ndarray) -> np.ndarray:
    """The mean of every 2 x 2 block of (H, W, C) with even H and W, in float64."""
    height, width, channels = pixels.shape
    out = np.zeros((height // 2, width // 2, channels))
    for y in range(height // 2):
        for x in range(width // 2):
            for c in range(channels):
                block = [float(pixels[2 * y + dy, 2 * x + dx, c]) for dy in (0, 1) for dx in (0, 1)]
                out[y, x, c] = sum(block) / 4
    return out


def over_white(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 4) on white: colour * alpha + 255 * (1 - alpha), in float64."""
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def endless_order(permutations: list[np.ndarray], start: int, count: int) -> list[int]:
    """Positions start .. start + count - 1 of the concatenated epochs, one by one."""
    num = len(permutations[0])
    return [int(permutations[p // num][p % num]) for p in range(start, start + count)]


def noise_image(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """Random RGB pixels."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
