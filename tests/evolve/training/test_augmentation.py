import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from evolve.hyperparameters import Hyperparameters
from evolve.training.augmentation import CROP_ATTEMPTS, NUM_DRAWS, _root, augment, crop_boxes
from evolve.training.batches import draws
from evolve.vit import scale_image

OFF: dict[str, Any] = {"crop_area_min": 1.0, "flip": False}
FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(CROP_ATTEMPTS + 3, NUM_DRAWS)


def hyperparameters(**changes: Any) -> Hyperparameters:
    return Hyperparameters(num_blocks=1, **{"image_size": 16, **OFF, **changes})


def random_images(count: int = 6, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def numbers(count: int = 6, step: int = 0) -> torch.Tensor:
    return torch.from_numpy(draws(1, step, count, NUM_DRAWS))


def same_sizes(count: int, height: float = 16, width: float = 16) -> torch.Tensor:
    return torch.tensor([[height, width]]).expand(count, 2)


def run(images: torch.Tensor, drawn: torch.Tensor, **changes: Any) -> torch.Tensor:
    return augment(images, same_sizes(len(images)), drawn, hyperparameters(**changes))


def test_roots_are_those_of_every_cpu() -> None:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 300
    rounded = np.sqrt(values.numpy())
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(_root(values).numpy(), rounded)


def test_all_off_is_the_scaled_image() -> None:
    images = random_images()
    torch.testing.assert_close(run(images, numbers()), scale_image(images), rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", ["crop", "flip", "brightness", "contrast", "saturation", "hue"])
def test_one_operation_on_changes_images_within_the_range(name: str) -> None:
    change: dict[str, Any] = {"crop": {"crop_area_min": 0.2}, "flip": {"flip": True}}.get(name, {name: 0.2})
    images = random_images()
    changed = run(images, numbers(), **change)
    assert changed.shape == (6, 16, 16, 3)
    assert changed.min() >= -1
    assert changed.max() <= 1
    assert (changed - scale_image(images)).abs().max() > 0.05


def test_the_same_numbers_give_the_same_bits_and_others_do_not() -> None:
    everything: dict[str, Any] = {
        "crop_area_min": 0.1,
        "flip": True,
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0.2,
        "hue": 0.1,
    }
    images = random_images()
    first = run(images, numbers(), **everything)
    assert torch.equal(first, run(images, numbers(), **everything))
    assert not torch.equal(first, run(images, numbers(step=1), **everything))


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    everything: dict[str, Any] = {"crop_area_min": 0.1, "flip": True, "contrast": 0.2, "hue": 0.1}
    images, drawn = random_images(), numbers()
    whole = run(images, drawn, **everything)
    torch.testing.assert_close(run(images[2:3], drawn[2:3], **everything), whole[2:3], rtol=0, atol=1e-6)


def test_flip_mirrors_half_of_the_images() -> None:
    images = random_images(400)
    changed = run(images, numbers(400), flip=True)
    scaled = scale_image(images)
    same = (changed - scaled).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (changed - scaled.flip(2)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all()
    assert 160 < int(mirrored.sum()) < 240


def test_brightness_shifts_by_shares_of_the_range() -> None:
    images = torch.full((500, 16, 16, 3), 128, dtype=torch.uint8)
    shift = (run(images, numbers(500), brightness=0.2) - scale_image(images))[:, 0, 0, 0]
    assert shift.abs().max() <= 0.4 + 1e-6
    assert shift.abs().max() > 0.38
    assert abs(shift.mean()) < 0.03
    assert shift.std() == pytest.approx(0.8 / 12**0.5, rel=0.1)


def test_contrast_stretches_about_each_channel_s_mean() -> None:
    images, drawn = random_images() // 4 + 96, numbers()
    scaled = scale_image(images)
    mean = scaled.mean((1, 2), keepdim=True)
    factor = 1 + (2 * drawn[:, CONTRAST, None, None, None] - 1) * 0.5
    torch.testing.assert_close(run(images, drawn, contrast=0.5), mean + (scaled - mean) * factor, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "column"), [("saturation", SATURATION), ("hue", HUE)])
def test_saturation_and_hue_change_hsv(name: str, column: int) -> None:
    images, drawn = random_images(4), numbers(4)
    images[0, 0, 0] = 0
    images[0, 0, 1] = 77
    changed = run(images, drawn, **{name: 0.2})
    for row, amount in enumerate((2 * drawn[:, column] - 1) * 0.2):
        for pixel, found in zip(images[row].reshape(-1, 3), changed[row].reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255).tolist())
            if name == "hue":
                hue = (hue + float(amount)) % 1
            else:
                saturation = min(saturation * (1 + float(amount)), 1)
            expected = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 2 - 1
            np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_saturation_and_hue_survive_values_beyond_the_range() -> None:
    images = torch.cat(
        [torch.zeros(2, 16, 16, 3, dtype=torch.uint8), torch.full((2, 16, 16, 3), 255, dtype=torch.uint8), random_images(8)]
    )
    changed = run(images, numbers(12), brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    assert changed.isfinite().all()
    assert changed.abs().max() <= 1


def test_resizes_to_the_wanted_size() -> None:
    # A picture that falls off evenly stays so.
    ramp = torch.arange(0, 64, dtype=torch.float32)[None, None, :, None].mul(4).expand(2, 32, 64, 3).to(torch.uint8)
    changed = augment(ramp, same_sizes(2, 32, 64), numbers(2), hyperparameters(image_size=16))
    expected = (torch.arange(16, dtype=torch.float32) * 16 + 6) / 127.5 - 1
    torch.testing.assert_close(changed, expected[None, None, :, None].expand(2, 16, 16, 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (30, 10), (8, 40)])
def test_crops_keep_area_aspect_and_place(height: int, width: int) -> None:
    count = 4000
    boxes = crop_boxes(same_sizes(count, height, width), numbers(count), area_min=0.1, aspect_min=0.5)
    top, left, box_height, box_width = boxes.unbind(1)
    whole = (boxes == torch.tensor([0.0, 0.0, 1.0, 1.0])).all(1)
    assert whole.float().mean() < 0.01
    area = (box_height * box_width)[~whole]
    aspect = (box_width * width / (box_height * height))[~whole]
    assert area.min() >= 0.1 - 1e-5
    assert aspect.min() >= 0.5 - 1e-5
    assert aspect.max() <= 2 + 1e-5
    for start, length in ((top, box_height), (left, box_width)):
        assert start.min() >= -1e-6
        assert (start + length).max() <= 1 + 1e-5
    if height == width:
        assert area.max() > 0.9
        assert (top / (1 - box_height).clamp(min=1e-3)).mean() == pytest.approx(0.5, abs=0.05)


def test_a_crop_that_cannot_fit_is_the_whole_image() -> None:
    boxes = crop_boxes(same_sizes(50, 100, 10), numbers(50), area_min=0.9, aspect_min=1.0)
    assert (boxes == torch.tensor([0.0, 0.0, 1.0, 1.0])).all()


def test_crop_and_flip_sample_the_box_that_was_drawn() -> None:
    # The colour of each pixel is its place: red grows to the right, green downwards.
    place = (torch.arange(32, dtype=torch.float32) + 0.5) / 32
    image = torch.stack([place.expand(32, 32), place[:, None].expand(32, 32), torch.zeros(32, 32)], dim=-1)
    images = (image * 255).round().to(torch.uint8).expand(20, 32, 32, 3)
    drawn = numbers(20)
    changed = augment(images, same_sizes(20, 64, 32), drawn, hyperparameters(crop_area_min=0.3, crop_aspect_min=0.75, flip=True))
    boxes = crop_boxes(same_sizes(20, 64, 32), drawn, 0.3, 0.75)
    middle = (changed[:, 7:9, 7:9].mean((1, 2)) + 1) / 2
    torch.testing.assert_close(middle[:, 0], boxes[:, 1] + boxes[:, 3] / 2, atol=0.01, rtol=0)
    torch.testing.assert_close(middle[:, 1], boxes[:, 0] + boxes[:, 2] / 2, atol=0.01, rtol=0)
    rightwards = changed[:, 8, 14, 0] > changed[:, 8, 1, 0]
    assert torch.equal(rightwards, drawn[:, FLIP] >= 0.5)


@pytest.mark.parametrize("size", [24, 32, 56])
def test_crops_are_sampled_where_affine_grid_has_its_points(size: int) -> None:
    # To the bit: a search that was begun with it goes on as it would have.
    images, sizes, drawn = random_images(16, 40, 40), same_sizes(16, 40, 40), numbers(16)
    found = augment(images, sizes, drawn, hyperparameters(image_size=size, crop_area_min=0.2, flip=True))
    top, left, height, width = crop_boxes(sizes, drawn, 0.2, 0.75).unbind(1)
    across = torch.stack([torch.where(drawn[:, FLIP] < 0.5, -width, width), torch.zeros(16), 2 * left + width - 1], dim=1)
    down = torch.stack([torch.zeros(16), height, 2 * top + height - 1], dim=1)
    grid = functional.affine_grid(torch.stack([across, down], dim=1), [16, 3, size, size], align_corners=False)
    pixels = images.permute(0, 3, 1, 2).float().mul(1 / 255)
    sampled = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    assert torch.equal(found, sampled.mul(2).sub(1).clamp(-1, 1).permute(0, 2, 3, 1))
