"""Reading and writing images: any image file to RGB, the ADM crop, tensors, grids, PNG. Imports torch only for tensors."""

import functools
import io
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from repa.base import files
from repa.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# None of these formats runs another program, as EPS runs Ghostscript. The build of Pillow decides which it supports.
FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "PCX", "SGI", "QOI",
)  # fmt: skip
# Image generators write long compressed texts into files; Pillow's limit of 1 MiB would refuse such images.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26, 1 << 27
SRGB = ImageCms.createProfile("sRGB")
WHITE_IS_ZERO = 262  # tag of a TIFF file that is 0 if the lowest level is white
# Pillow's limit against bombs; other libraries disable it in Pillow, so it is checked here too
MAX_PIXELS = 178_956_970
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's, from half of that on


def image_endings() -> tuple[str, ...]:
    """Lower-case file suffixes of the FORMATS that this Pillow can decode."""
    Image.init()
    usual = {ending for ending, name in Image.EXTENSION.items() if name in FORMATS and name in Image.OPEN}
    return tuple(sorted(usual | {".jpe", ".jfif"}))


def decode_image(data: bytes, name: str) -> Image.Image:
    """The bytes of an image file as an upright 8-bit RGB image.

    EXIF rotation is applied. An ICC profile is converted to sRGB. Transparency is composited on white. 16-bit grey
    images are reduced to their high byte, as Pillow does with 16-bit colour; if all values are below 4,096, they count
    as the 12 bits of cameras and microscopes. Only the first frame of an animation is read.

    Raises:
        UserError: not a complete image, or more than MAX_PIXELS; the message has `name`.
    """
    try:
        image = open_image(io.BytesIO(data))
        # The header tells the size before anything is decoded.
        if image.width * image.height <= MAX_PIXELS:
            sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            # Pillow scales grey of 2 and 4 bits, but not the level that is transparent
            tiles = getattr(image, "tile", [])
            if image.mode == "L" and isinstance(level := image.info.get("transparency"), int) and tiles:
                image.info["transparency"] = level * {"L;2": 85, "L;4": 17}.get(str(tiles[0].args), 1)
            inverted = getattr(image, "tag_v2", {}).get(WHITE_IS_ZERO) == 0
            image.load()
            return _to_rgb(_upright(image), sixteen, inverted)
    except Image.DecompressionBombError:
        pass  # refused below
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is not a readable image: its format is unknown.") from None
    # Pillow answers damaged bytes with OSError, SyntaxError, ValueError, struct.error, KeyError, ...
    except Exception as error:
        raise UserError(f"{name} is not a readable image: {error or type(error).__name__}.") from error
    raise UserError(f"{name} is refused: it has more than {MAX_PIXELS:,} pixels. Shrink it or remove it.")


def open_image(file: IO[bytes] | str | Path) -> Image.Image:
    """Open a file in one of FORMATS with Pillow, without decoding it."""
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _upright(image: Image.Image) -> Image.Image:
    """Rotate the image by its EXIF data; unreadable EXIF data are ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises SyntaxError, ValueError, struct.error, ...
        return image


def _to_rgb(image: Image.Image, sixteen: bool, inverted: bool) -> Image.Image:
    if sixteen:
        pixels = np.asarray(image)
        # No file declares 12 bits; read as 16 bits, an image would use only the lowest 16 of 256 levels.
        bits = 12 if pixels.max() < 1 << 12 else 16
        high = (pixels >> bits - 8).astype(np.uint8)
        if inverted:  # Pillow does this only up to 8 bits
            high ^= 255
        if isinstance(level := image.info.get("transparency"), int):
            high[pixels == level] = 255
        return Image.fromarray(high).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers ({image.mode!r}) of unknown range; save it with 8 or 16 bits")
    profile = image.info.get("icc_profile")
    grey = image.mode in ("L", "LA", "La")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L" if grey else "RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    return _to_srgb(image, profile)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert colours from the embedded ICC profile to sRGB; an unusable profile is ignored."""
    if not profile or image.mode not in ("RGB", "CMYK", "L"):
        return image.convert("RGB")
    try:
        return image.convert("RGB") if _is_srgb(profile, image.mode) else _converted(image, profile)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB")


def _converted(image: Image.Image, profile: bytes) -> Image.Image:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
    assert converted is not None  # because it is not in place
    return converted


@functools.lru_cache(8)
def _is_srgb(profile: bytes, mode: str) -> bool:
    """Whether a profile changes colours by rounding only, as that of most cameras: then no grey level should change."""
    if mode == "CMYK":
        return False
    # the name in a profile proves nothing: edited profiles keep the name of the one they were made from
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    cube = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(6, 36, 3)).convert(mode)
    changes = np.asarray(_converted(cube, profile), np.int16) - np.asarray(cube.convert("RGB"), np.int16)
    return int(np.abs(changes).max()) <= 2


def adm_centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop of ADM, DiT, SiT and REPA: halve by box filter, resize the short side bicubically, crop the centre."""
    # ADM's code predates Pillow's reducing_gap. Other steps would give other pixels than those of the published
    # references.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise UserError(f"{image.width} x {image.height} pixels are too narrow to enlarge to {size}: remove the image.")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> "Tensor":
    """RGB image -> uint8 (3, H, W)."""
    import torch

    assert image.mode == "RGB", image.mode
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def grid(images: "Tensor", columns: int | None = None, padding: int = 2, background: int = 255) -> np.ndarray:
    """Lay images row by row on a sheet; returns uint8 (height, width, C).

    Args:
        images: uint8 (N, C, H, W), RGB or RGBA.
        columns: images per row; None makes the grid about square.
        padding: pixels between images, none at the rim.
        background: value of these pixels in every channel: white; 0 is transparent in RGBA.
    """
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (3, 4):
        raise ValueError(f"Images are uint8 (N, 3 or 4, H, W), but got {images.dtype} {tuple(images.shape)}.")
    num, channels, height, width = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(num))), num)
    rows = -(-num // columns)
    sheet = np.full((rows * (height + padding), columns * (width + padding), channels), background, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = index // columns * (height + padding), index % columns * (width + padding)
        sheet[top : top + height, left : left + width] = image
    return sheet[: rows * (height + padding) - padding, : columns * (width + padding) - padding]


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(image: np.ndarray, path: str | Path) -> None:
    """Write uint8 (H, W, 3) as a PNG file, atomically."""
    files.write_bytes(path, encode_png(image))
