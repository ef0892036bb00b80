import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from repa.base import images
from repa.base.errors import UserError
from repa.base.images import adm_centre_crop, decode_image, encode_png, grid, save_png, to_tensor
from tests.oracles.data import adm_crop_geometry, halve, noise_image, over_white


def encoded(image, format="PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **settings)
    return buffer.getvalue()


def pixels(image) -> np.ndarray:
    return np.asarray(image)


def test_a_typical_imagenet_image_is_cropped_like_adm():
    """500 x 375 -> 341 x 256, cut from x = 42 (SPEC 1.10)."""
    image = noise_image(0, 500, 375)
    expected = pixels(image.resize((341, 256), Image.Resampling.BICUBIC))[:, 42 : 42 + 256]
    np.testing.assert_array_equal(pixels(adm_centre_crop(image, 256)), expected)


def test_adm_crop_halves_by_box_before_the_bicubic():
    image = noise_image(1, 68, 64)  # 64 = 4 * 16: halved twice, then cropped
    expected = halve(halve(pixels(image)))
    cropped = pixels(adm_centre_crop(image, 16)).astype(float)
    assert cropped.shape == (16, 16, 3)
    left = adm_crop_geometry(68, 64, 16)[2]
    assert left == 0  # 17 wide
    # Pillow rounds after each pass; bicubic would be off by 50
    assert abs(cropped - expected[:, left : left + 16]).max() <= 2


@pytest.mark.parametrize("size", [(31, 200), (200, 31), (32, 32), (33, 47), (32, 47), (47, 32), (640, 100), (99, 63)])
def test_adm_crop_is_a_window_of_the_resized_image(size):
    image = noise_image(2, *size)
    width, height, left, top = adm_crop_geometry(*size, 32)
    small = image
    while min(small.size) >= 64:
        small = small.resize((small.width // 2, small.height // 2), Image.Resampling.BOX)
    expected = pixels(small.resize((width, height), Image.Resampling.BICUBIC))[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(pixels(adm_centre_crop(image, 32)), expected)


def test_an_extreme_aspect_ratio_is_refused():
    with pytest.raises(UserError, match="1 x 60000 pixels are too narrow"):
        adm_centre_crop(Image.new("RGB", (1, 60000)), 256)


def test_grey_becomes_three_equal_channels():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(
        pixels(decode_image(encoded(Image.fromarray(grey)), "g.png")), np.stack([grey] * 3, -1)
    )


def test_16_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 255, 256, 0x8000, 0xABCD, 65535]], np.uint16)
    decoded = pixels(decode_image(encoded(Image.fromarray(grey)), "deep.png"))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 0, 1, 0x80, 0xAB, 255])
    tiff = pixels(decode_image(encoded(Image.fromarray(grey), "TIFF"), "deep.tif"))
    np.testing.assert_array_equal(tiff, decoded)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_12_bit_images_stored_in_16_bits_are_scaled(form):
    grey = np.array([[0, 15, 16, 2048, 4095]], np.uint16)
    assert pixels(decode_image(encoded(Image.fromarray(grey), form), "x"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    grey[0, 0] = 4096  # more than 12 bits: all 16 are used
    assert pixels(decode_image(encoded(Image.fromarray(grey), form), "x"))[0, :, 0].tolist() == [16, 0, 0, 8, 15]


def test_32_bit_pixels_of_unknown_range_are_refused():
    with pytest.raises(UserError, match=r"float.tif is not a readable image.*unknown range"):
        decode_image(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "float.tif")


def test_transparency_is_laid_on_white():
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    decoded = pixels(decode_image(encoded(Image.fromarray(rgba)), "a.png")).astype(float)
    assert abs(decoded - over_white(rgba)).max() <= 1
    clear = Image.new("LA", (4, 4), (0, 0))
    assert (pixels(decode_image(encoded(clear), "clear.png")) == 255).all()


def test_palettes_are_converted_with_and_without_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    np.testing.assert_array_equal(pixels(decode_image(encoded(palette), "p.png")), [[[10, 20, 30], [200, 100, 50]]])
    holed = encoded(palette, transparency=0)
    np.testing.assert_array_equal(pixels(decode_image(holed, "p.png")), [[[255, 255, 255], [200, 100, 50]]])


def test_cmyk_becomes_rgb():
    decoded = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "c.jpg")
    assert decoded.mode == "RGB"
    assert pixels(decoded)[0, 0, 0] > 200 > 50 > pixels(decoded)[0, 0, 1]  # red


def test_exif_rotation_is_applied():
    image = noise_image(3, 6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated clockwise
    decoded = pixels(decode_image(encoded(image, exif=exif), "turned.png"))
    np.testing.assert_array_equal(decoded, np.rot90(pixels(image), -1))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    decoded = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "moving.gif")
    assert decoded.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused_and_named(format):
    data = encoded(noise_image(4, 40, 40), format)
    with pytest.raises(UserError, match=r"cats/half\.x is not a readable image"):
        decode_image(data[: len(data) // 2], "cats/half.x")


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_files_that_are_not_images_are_refused_and_named(data):
    with pytest.raises(UserError, match=r"x\.png is not a readable image: its format is unknown"):
        decode_image(data, "x.png")


def test_absurd_sizes_are_refused_before_decoding(monkeypatch):
    data = encoded(noise_image(5, 40, 40))
    monkeypatch.setattr(images, "MAX_PIXELS", 1599)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"big\.png is refused: it has more than 1,599 pixels"):
        decode_image(data, "big.png")


def test_a_decompression_bomb_is_refused_by_its_header():
    header = bytearray(encoded(Image.new("1", (8, 8))))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match="more than 178,956,970 pixels"):
        decode_image(bytes(header), "bomb.png")


def test_tensors_keep_rows_columns_and_channels():
    image = noise_image(6, 5, 3)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 3, 5)
    assert tuple(int(v) for v in tensor[:, 2, 4]) == image.getpixel((4, 2))
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), pixels(image))


def test_the_grid_contains_every_image_and_nothing_else():
    tiles = torch.randint(0, 255, (5, 3, 4, 6), dtype=torch.uint8)
    sheet = grid(tiles, columns=3, padding=2)
    assert sheet.shape == (4 * 2 + 2, 6 * 3 + 4, 3)
    assert sheet.dtype == np.uint8
    free = np.ones(sheet.shape[:2], bool)
    for index, (top, left) in enumerate([(0, 0), (0, 8), (0, 16), (6, 0), (6, 8)]):
        np.testing.assert_array_equal(sheet[top : top + 4, left : left + 6], tiles[index].permute(1, 2, 0))
        free[top : top + 4, left : left + 6] = False
    assert (sheet[free] == 255).all()
    assert grid(tiles).shape == sheet.shape  # nearly square: 3 columns
    assert grid(tiles[:1], columns=8).shape == (4, 6, 3)


def test_png_files_round_trip(tmp_path):
    sheet = pixels(noise_image(7))
    save_png(sheet, tmp_path / "deep" / "a.png")
    assert (tmp_path / "deep" / "a.png").read_bytes() == encode_png(sheet)
    np.testing.assert_array_equal(pixels(Image.open(tmp_path / "deep" / "a.png")), sheet)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_unreadable_exif_data_does_not_stop_decoding(form):
    """Pillow writes EXIF data of PNG and WebP without the prefix by which it finds that of JPEG."""
    out = io.BytesIO()
    Image.new("RGB", (4, 2), "red").save(out, form, exif=b"Exif\0\0garbage" if form == "JPEG" else b"garbage")
    assert decode_image(out.getvalue(), "x").size == (4, 2)


@pytest.mark.parametrize(("most", "bytes_of_white"), [(65535, b"\xff\xff"), (1023, b"\x03\xff")])
def test_16_bit_pgm_has_a_known_range(most, bytes_of_white):
    image = decode_image(b"P5 2 1 %d\n" % most + bytes_of_white + b"\0\0", "x")
    assert np.asarray(image)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_the_colour_profile_of_a_palette_image_is_applied(mode):
    """Under a profile whose red and blue primaries are swapped, red is blue, even if the profile is called sRGB."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"xXYZ").replace(b"bXYZ", b"rXYZ").replace(b"xXYZ", b"bXYZ")
    out = io.BytesIO()
    Image.new("RGB", (2, 2), "red").convert(mode).save(out, "PNG", icc_profile=profile)
    red, green, blue = np.asarray(decode_image(out.getvalue(), "x"))[0, 0].tolist()
    assert blue > 250
    assert max(red, green) < 5
