"""Augmentation of training images: batched tensor operations on the device.

The random numbers come from the caller (evolve.training.batches), always as many an image, whichever operations are on: the same
numbers give the same images, and turning one operation off moves no other.

Crop, flip and resize are one bilinear sampling of the image; the colours are changed after it, in this order: brightness, contrast,
saturation, hue. All but contrast work pixel by pixel, so this is the published order up to the rounding of the sampling. (Contrast
turns about the mean of the resized crop, not of the crop.)

Crops follow tf.image.sample_distorted_bounding_box over the whole image: aspect (width / height, in pixels of the original image)
uniform between its bounds, then the height uniform between the least that reaches the least area and the greatest that fits, then the
place uniform. Boxes are not rounded to whole pixels. An aspect that cannot fit is drawn again, CROP_ATTEMPTS times at most; then the
whole image is taken.

Source: muNet, arXiv 2205.10937, appendix; ranges as in tf.image.random_brightness, _contrast, _saturation and _hue.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from evolve.hyperparameters import Hyperparameters
from evolve.training.device import upload

CROP_ATTEMPTS = 10
"""Aspects drawn for each image."""

NUM_DRAWS = CROP_ATTEMPTS + 8
"""Random numbers an image takes: aspects, height, top, left, flip, brightness, contrast, saturation, hue."""


@dataclasses.dataclass(frozen=True)
class _Draws:
    """Columns of the random numbers of a batch, each [batch] but the aspects [batch, CROP_ATTEMPTS]."""

    aspects: torch.Tensor
    height: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    flip: torch.Tensor
    brightness: torch.Tensor
    contrast: torch.Tensor
    saturation: torch.Tensor
    hue: torch.Tensor

    @staticmethod
    def of(draws: torch.Tensor) -> _Draws:
        return _Draws(draws[:, :CROP_ATTEMPTS], *draws[:, CROP_ATTEMPTS:].unbind(1))


def augment(images: torch.Tensor, sizes: torch.Tensor, draws: torch.Tensor, hyperparameters: Hyperparameters) -> torch.Tensor:
    """Returns training images as a path takes them.

    Args:
        images: [batch, height, width, 3] uint8 on the device, all of one size whatever the originals had.
        sizes: height and width of the original images, [batch, 2], in pixels, on the CPU.
        draws: [batch, NUM_DRAWS] float32, uniform in [0, 1), on the CPU.
        hyperparameters: those of data matter.

    Returns:
        [batch, image_size, image_size, 3] float32 in [-1, 1], on the device.
    """
    wanted = hyperparameters
    drawn = _Draws.of(draws)
    pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
    resizes = pixels.shape[2:] != (wanted.image_size, wanted.image_size)
    if wanted.crop_area_min < 1 or wanted.flip or resizes:
        boxes = _boxes(sizes, drawn, wanted.crop_area_min, wanted.crop_aspect_min)
        mirrored = drawn.flip < 0.5 if wanted.flip else torch.zeros_like(drawn.flip, dtype=torch.bool)
        pixels = _sample(pixels, boxes, mirrored, wanted.image_size)
    for change, draw, delta in (
        (_shift_brightness, drawn.brightness, wanted.brightness),
        (_change_contrast, drawn.contrast, wanted.contrast),
        (_change_saturation, drawn.saturation, wanted.saturation),
        (_shift_hue, drawn.hue, wanted.hue),
    ):
        if delta > 0:
            amount = upload((2 * draw - 1) * delta, pixels.device)
            pixels = change(pixels, amount[:, None, None, None])
    return pixels.mul_(2).sub_(1).clamp_(-1, 1).permute(0, 2, 3, 1)


def draws_nothing(hyperparameters: Hyperparameters) -> bool:
    """Tells whether an image always comes out the same: nothing that is drawn changes it."""
    wanted = hyperparameters
    colours = (wanted.brightness, wanted.contrast, wanted.saturation, wanted.hue)
    return wanted.crop_area_min >= 1 and not wanted.flip and not any(colours)


def crop_boxes(sizes: torch.Tensor, draws: torch.Tensor, area_min: float, aspect_min: float) -> torch.Tensor:
    """Draws the box of each image's crop.

    Args:
        sizes: height and width of the images, [batch, 2], in pixels.
        draws: [batch, NUM_DRAWS], uniform in [0, 1).
        area_min: least share of the image that a crop keeps; 1 takes the whole image.
        aspect_min: least width / height of a crop, in pixels; the greatest is its inverse.

    Returns:
        Top, left, height and width as shares of the image, [batch, 4].
    """
    return _boxes(sizes, _Draws.of(draws), area_min, aspect_min)


def _boxes(sizes: torch.Tensor, drawn: _Draws, area_min: float, aspect_min: float) -> torch.Tensor:
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(len(sizes), 4)
    if area_min >= 1:
        return whole
    height, width = sizes.to(torch.float32).unbind(1)
    aspects = aspect_min + drawn.aspects * (1 / aspect_min - aspect_min)
    least = _root(area_min * (height * width)[:, None] / aspects)
    greatest = torch.minimum(height[:, None], width[:, None] / aspects)
    fits = least <= greatest
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    aspect, low, high = (values.gather(1, first)[:, 0] for values in (aspects, least, greatest))
    crop_height = low + drawn.height * (high - low)
    crop_width = crop_height * aspect
    top, left = drawn.top * (height - crop_height), drawn.left * (width - crop_width)
    boxes = torch.stack([top / height, left / width, crop_height / height, crop_width / width], dim=1)
    return torch.where(fits.any(1, keepdim=True), boxes, whole)


def _root(values: torch.Tensor) -> torch.Tensor:
    """Returns float32 square roots, rounded to the nearest: torch's own are off by a bit here and there, on each kind of CPU elsewhere."""
    return values.to(torch.float64).sqrt().to(torch.float32)


def _sample(pixels: torch.Tensor, boxes: torch.Tensor, mirrored: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the boxes of [batch, 3, height, width] resized to [batch, 3, size, size]."""
    top, left, height, width = boxes.unbind(1)
    scales = upload(torch.stack([torch.where(mirrored, -width, width), height], dim=1), pixels.device)
    shifts = upload(torch.stack([2 * left + width - 1, 2 * top + height - 1], dim=1), pixels.device)
    # The points of functional.affine_grid to the bit, which multiplies matrices for what is one scale and one shift along each axis.
    centres = torch.linspace(-1, 1, size, device=pixels.device) * (size - 1) / size
    across, down = (centres * scales[:, :, None] + shifts[:, :, None]).unbind(1)
    shape = (len(pixels), size, size)
    grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], dim=-1)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


# Colours: pixels [batch, 3, height, width] in [0, 1] or, after a change, beyond; amounts [batch, 1, 1, 1].


def _shift_brightness(pixels: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return pixels + amount


def _change_contrast(pixels: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return mean + (pixels - mean) * (1 + amount)


def _change_saturation(pixels: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    # In HSV, with hue and value fixed, every channel's distance to the value grows in proportion to the saturation, which ends at 1.
    value, least = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    greatest = (value / (value - least).clamp(min=1e-6)).clamp(min=0)
    return value - (value - pixels) * torch.minimum(1 + amount, greatest)


def _shift_hue(pixels: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    red, green, blue = pixels[:, :1], pixels[:, 1:2], pixels[:, 2:]
    value = pixels.amax(1, keepdim=True)
    chroma = value - pixels.amin(1, keepdim=True)
    divisor = chroma.clamp(min=1e-6)
    # The hue in sixths of a turn: red at 0, green at 2, blue at 4.
    hue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, hue) + 6 * amount
    distance = (hue + torch.tensor([5.0, 3.0, 1.0], device=pixels.device)[None, :, None, None]) % 6
    return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)
