"""The one way from a file's bytes to the pixels that a path sees: decode, turn upright, RGB, resize. Without torch.

The search validates on what `decode` and `resize` return and the server computes on what they return, so both see the same bytes.
(Training augmentation alone resizes elsewhere, on the device.) `VERSION` is published with every task; a change that moves a
single pixel must raise it.
"""

from __future__ import annotations

import dataclasses
import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, MpoImagePlugin, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

# Else Pillow would load its plugins when the first image needs one: where no file can be opened then, the image would be blamed.
# Those that are imported above without a use, `preinit` leaves out.
Image.preinit()

VERSION = 1
"""Version of what this module computes."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""Image formats that are decoded, as Pillow names them."""

_DAMAGE = (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, KeyError, TypeError, OverflowError)
"""What Pillow's decoders raise for damaged files."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation. (Pillow's exif_transpose also writes the metadata anew, which fails for some.)"""

Pixels = npt.NDArray[np.uint8]
"""[height, width, 3] uint8, RGB."""


class ImageError(ValueError):
    """An image that cannot be used; the message says what was found and what is expected."""


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What is accepted from a stranger.

    Attributes:
        max_bytes: greatest size of an encoded image, in bytes.
        max_pixels: greatest height x width, in pixels, checked before anything is decoded.
        formats: the formats accepted, as Pillow names them.
    """

    max_bytes: int = 16 * 1024 * 1024
    max_pixels: int = 64 * 1024 * 1024
    formats: tuple[str, ...] = FORMATS


DEFAULT_LIMITS = ImageLimits()


def decode(encoded: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Pixels:
    """Decodes an image file's bytes into upright RGB pixels.

    The EXIF orientation is applied; grey, 16-bit, palette and CMYK images become RGB; transparency is laid on white; the first
    frame of an animation counts.

    Args:
        encoded: a whole image file.
        limits: what is accepted.

    Returns:
        [height, width, 3] uint8.

    Raises:
        ImageError: empty, too large, not an image of an accepted format, or damaged.
    """
    if not encoded:
        raise ImageError(f"found no bytes, expected a whole {_or(limits.formats)} file")
    if len(encoded) > limits.max_bytes:
        raise ImageError(f"found {len(encoded)} bytes, expected at most {limits.max_bytes}; send a smaller image")
    try:
        with Image.open(io.BytesIO(encoded), formats=limits.formats) as image:
            if image.width * image.height > limits.max_pixels:
                raise ImageError(
                    f"found {image.width} x {image.height} pixels, expected at most {limits.max_pixels} in all; send a smaller image"
                )
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            return _to_rgb(image if turn is None else image.transpose(turn))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"found {len(encoded)} bytes that start with {encoded[:8]!r}, expected a {_or(limits.formats)} file"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{error}; expected at most {limits.max_pixels} pixels") from None
    except (*_DAMAGE, MemoryError) as error:
        raise ImageError(f"found a damaged image ({error}), expected a whole {_or(limits.formats)} file") from error


def from_raw(data: bytes, height: int, width: int, channels: int, limits: ImageLimits = DEFAULT_LIMITS) -> Pixels:
    """Returns raw bytes as RGB pixels.

    Args:
        data: height * width * channels unsigned bytes, row by row, channels innermost.
        height: in pixels.
        width: in pixels.
        channels: 3 (RGB) or 1 (grey).
        limits: what is accepted; `max_pixels` holds here.

    Returns:
        [height, width, 3] uint8.

    Raises:
        ImageError: an impossible shape, or bytes that do not fill it.
    """
    if channels not in (1, 3):
        raise ImageError(f"found {channels} channels, expected 3 (RGB) or 1 (grey)")
    if height < 1 or width < 1:
        raise ImageError(f"found a raw image of {width} x {height} pixels, expected at least 1 x 1")
    if height * width > limits.max_pixels:
        raise ImageError(f"found {width} x {height} pixels, expected at most {limits.max_pixels} in all")
    if len(data) != height * width * channels:
        raise ImageError(
            f"found {len(data)} bytes of raw data, expected height {height} * width {width} * channels {channels} = "
            f"{height * width * channels}"
        )
    return to_rgb(np.frombuffer(data, dtype=np.uint8).reshape(height, width, channels))


def to_rgb(pixels: npt.NDArray[np.uint8]) -> Pixels:
    """Returns grey or RGB pixels as RGB.

    Args:
        pixels: [height, width], [height, width, 1] or [height, width, 3] uint8.

    Raises:
        ImageError: another shape or type.
    """
    if pixels.dtype != np.uint8:
        raise ImageError(f"found pixels of type {pixels.dtype}, expected uint8")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ImageError(f"found pixels of shape {list(pixels.shape)}, expected [height, width, 3] or [height, width, 1]")
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def resize(pixels: Pixels, size: int) -> Pixels:
    """Resizes to a square with antialiased bilinear sampling.

    Args:
        pixels: [height, width, 3] uint8.
        size: height and width of the result, in pixels.

    Returns:
        [size, size, 3] uint8; the given pixels themselves if they have that size.
    """
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def _orientation(image: Image.Image) -> Any:
    """Returns what EXIF says of how the camera was held; None if it says nothing, or nothing that can be read."""
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGE:
        # Metadata never decide whether an image can be used.
        return None


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        # 16-bit grey arrives as I;16 or I: the high byte is what an 8-bit file would hold.
        grey = np.clip(np.asarray(image, dtype=np.int64) >> 8, 0, 255).astype(np.uint8)
        return to_rgb(grey)
    if image.mode == "F":
        raise ImageError("found floating point pixels, expected 8 or 16 bits a channel")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _or(formats: tuple[str, ...]) -> str:
    return ", ".join(formats[:-1]) + " or " + formats[-1] if len(formats) > 1 else formats[0]
