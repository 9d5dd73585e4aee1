"""From a file's bytes to the pixels a path sees."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from munet.preprocessing import ImageError, ImageLimits, decode, from_raw, resize, to_rgb

RNG = np.random.default_rng(0)


def _encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(height=6, width=9) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(kind):
    pixels = _noise()
    np.testing.assert_array_equal(decode(_encode(Image.fromarray(pixels), kind)), pixels)


def test_webp_and_jpeg_are_decoded():
    pixels = np.full((16, 16, 3), (200, 30, 90), dtype=np.uint8)
    np.testing.assert_array_equal(decode(_encode(Image.fromarray(pixels), "WEBP", lossless=True)), pixels)
    np.testing.assert_allclose(decode(_encode(Image.fromarray(pixels), "JPEG", quality=95)), pixels, atol=3)


def test_grey_and_palette_become_rgb():
    grey = RNG.integers(0, 256, (5, 4), dtype=np.uint8)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode(_encode(Image.fromarray(grey), "PNG")), expected)
    palette = Image.fromarray(grey).convert("P")
    np.testing.assert_array_equal(decode(_encode(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_one_bit_images_become_black_and_white():
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    assert decode(_encode(bits, "PNG"))[:, :, 0].tolist() == [[0, 255], [255, 0]]


def test_sixteen_bit_grey_keeps_its_high_byte():
    grey = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    decoded = decode(_encode(Image.fromarray(grey), "PNG"))
    assert decoded[:, :, 0].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_cmyk_becomes_rgb():
    image = Image.fromarray(_noise(16, 16)).convert("CMYK")
    decoded = decode(_encode(image, "JPEG", quality=95))
    assert decoded.shape == (16, 16, 3)


def test_transparency_is_laid_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    decoded = decode(_encode(Image.fromarray(rgba), "PNG"))
    assert decoded[0, 0].tolist() == [10, 20, 30]
    assert decoded[0, 1].tolist() == [255, 255, 255]
    assert decoded[0, 2].tolist() == [127, 127, 127]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    # How a camera stores the pixels of each orientation.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = _encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(encoded)[:, :, 0], upright)


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
@pytest.mark.parametrize(
    "entry",
    [
        struct.pack("<HHI4s", 0x0100, 2, 3, b"80"),
        struct.pack("<HHIf", 0x0103, 11, 1, 1.5),
        struct.pack("<HHIi", 0x0101, 9, 1, -1),
    ],
    ids=["text for a width", "a fraction for a kind", "a negative height"],
)
def test_metadata_that_make_no_sense_do_not_matter(image_format, entry):
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    entries = sorted([entry, turned])
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    assert decode(_encode(Image.new("RGB", (8, 16)), image_format, exif=exif)).shape == (8, 16, 3)


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    encoded = _encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(encoded)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "found no bytes"),
        (b"just some text", "start with b'just som'"),
        (b"GIF89a" + bytes(40), "expected a JPEG, PNG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "found"),
        (b"\xff\xd8\xff\xe0" + bytes(30), "found"),
    ],
)
def test_bytes_that_are_no_image(encoded, message):
    with pytest.raises(ImageError, match=message):
        decode(encoded)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_files_wherever_they_end(kind):
    whole = _encode(Image.fromarray(_noise(40, 40)), kind)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(ImageError):
            decode(whole[: int(len(whole) * share)])


def test_a_decompression_bomb_is_refused_by_its_header():
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (9_000, 10_000, 60_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
        with pytest.raises(ImageError, match="expected at most 67108864"):
            decode(bomb)


def test_limits_are_those_given():
    encoded = _encode(Image.fromarray(_noise(10, 10)), "PNG")
    with pytest.raises(ImageError, match=r"found \d+ bytes, expected at most 50"):
        decode(encoded, ImageLimits(max_bytes=50))
    with pytest.raises(ImageError, match="found 10 x 10 pixels, expected at most 99"):
        decode(encoded, ImageLimits(max_pixels=99))
    with pytest.raises(ImageError, match="expected a JPEG file"):
        decode(encoded, ImageLimits(formats=("JPEG",)))


def test_a_strip_of_twenty_thousand_pixels_is_an_image_like_any_other():
    strip = decode(_encode(Image.new("RGB", (20_000, 1), "red"), "PNG"))
    assert resize(strip, 32).shape == (32, 32, 3)


def test_raw_pixels():
    pixels = _noise(3, 5)
    np.testing.assert_array_equal(from_raw(pixels.tobytes(), 3, 5, 3), pixels)
    grey = pixels[:, :, 0]
    np.testing.assert_array_equal(from_raw(grey.tobytes(), 3, 5, 1), np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize(
    ("size", "shape", "message"),
    [
        (45, (3, 5, 4), "found 4 channels"),
        (45, (0, 5, 3), "5 x 0 pixels"),
        (44, (3, 5, 3), r"found 44 bytes .* = 45"),
        (45, (100_000, 100_000, 3), "expected at most 67108864"),
    ],
)
def test_impossible_raw_shapes(size, shape, message):
    with pytest.raises(ImageError, match=message):
        from_raw(bytes(size), *shape)


def test_arrays_of_another_shape_or_type_are_refused():
    with pytest.raises(ImageError, match="float64"):
        to_rgb(np.zeros((2, 2, 3)))
    with pytest.raises(ImageError, match=r"\[2, 2, 4\]"):
        to_rgb(np.zeros((2, 2, 4), dtype=np.uint8))


def test_resize_is_antialiased_and_leaves_the_right_size_alone():
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    pixels = to_rgb(checkers.astype(np.uint8))
    assert resize(pixels, 64) is pixels
    small = resize(pixels, 8)
    assert small.shape == (8, 8, 3)
    # Without antialiasing some pixels would be black or white.
    assert np.abs(small.astype(int) - 127).max() < 8
