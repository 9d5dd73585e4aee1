"""What is checked of every task, and the choosing of images."""

import dataclasses

import numpy as np
import pytest

from evolve.data.load import check
from evolve.data.splits import hashed_order, limited, set_aside, shuffled, stratified
from evolve.data.task import ImageSet, TaskData
from evolve.errors import DataError


def images(*labels: int, prefix: str = "image") -> ImageSet:
    pixels = [np.full((2, 2, 3), index, dtype=np.uint8) for index in range(len(labels))]
    return ImageSet(pixels, np.array(labels, dtype=np.int64), [f"{prefix} {index}" for index in range(len(labels))])


GOOD = TaskData("t", ("a", "b"), images(0, 1), images(1), None)


def test_good_data_pass() -> None:
    check(GOOD, "here")
    check(dataclasses.replace(GOOD, test=images(0)), "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("a",)}, "found one class only, 'a', in here; expected two or more classes"),
        ({"labels": ()}, "found no class in here; expected two or more classes"),
        ({"validation": images()}, "found no validation images in here; expected one or more"),
        ({"train": images(0, 0)}, "found no training images of class 'b' in here"),
        ({"train": images()}, "found no training images of classes 'a', 'b' in here"),
        ({"train": images(0, 2)}, "found label 2 for 'image 1' among the training images of here; expected 0 to 1"),
        ({"validation": images(-1)}, "found label -1 for 'image 0' among the validation images of here"),
        ({"test": images(0, 9)}, "found label 9 for 'image 1' among the test images of here"),
        (
            {"train": dataclasses.replace(images(0, 1), labels=np.array([0], dtype=np.int64))},
            "found 1 labels for 2 training images of here",
        ),
    ],
)
def test_bad_data(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        check(dataclasses.replace(GOOD, **change), "here")  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_many_missing_classes_are_counted() -> None:
    data = dataclasses.replace(GOOD, labels=tuple(f"c{index}" for index in range(12)), train=images(0, 1))
    with pytest.raises(DataError, match="classes 'c2', 'c3', 'c4', 'c5', 'c6' and 5 more"):
        check(data, "here")


def test_hashed_order_is_fixed_and_follows_the_names() -> None:
    names = [f"n{index}" for index in range(20)]
    order = hashed_order(names, "salt")
    assert sorted(order) == list(range(20))
    assert order != list(range(20))
    assert [names[index] for index in order] == [names[::-1][index] for index in hashed_order(names[::-1], "salt")]
    assert hashed_order(names, "pepper") != order
    # Recorded: a change would move images between splits of people's tasks.
    assert hashed_order(["a", "b", "c", "d", "e"], "split") == [3, 4, 1, 0, 2]


def test_set_aside_leaves_one_of_each() -> None:
    labels = np.array([0] * 10 + [1, 2], dtype=np.int64)
    taken, kept = set_aside(labels, [str(index) for index in range(12)], 100)
    assert len(taken) == 9
    assert set(labels[kept].tolist()) == {0, 1, 2}
    assert kept == sorted(kept)


def test_stratified_uses_every_image_once() -> None:
    labels = np.array([0] * 7 + [1] * 13, dtype=np.int64)
    splits = stratified(labels, [str(index) for index in range(20)], (0.4, 0.2), "salt")
    assert sorted(index for split in splits for index in split) == list(range(20))
    assert [np.bincount(labels[split]).tolist() for split in splits] == [[3, 5], [1, 3], [3, 5]]


def test_limited_without_limit_keeps_all() -> None:
    labels = np.array([1, 0, 1], dtype=np.int64)
    assert limited(labels, ["x", "y", "z"], None) == [0, 1, 2]
    assert len(limited(labels, ["x", "y", "z"], 1)) == 2


def test_shuffled_keeps_labels_with_images() -> None:
    before = images(*range(9))
    after = shuffled(before)
    assert [int(image[0, 0, 0]) for image in after.images] == after.labels.tolist()
    assert list(after.names) != list(before.names)
