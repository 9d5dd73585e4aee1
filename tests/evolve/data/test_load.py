"""What is checked of every task, and the choosing of images."""

import dataclasses
import hashlib

import numpy as np
import pytest

from evolve.data.load import FEW_VALIDATION_IMAGES, check, doubts_about_quality, oddities
from evolve.data.splits import hashed_order, limited, pinned, shuffled, stratified
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
        ({"labels": ("a", "")}, "found class name '' in here"),
        ({"labels": ("a", "b\udce9")}, "found class name 'b\\udce9' in here; expected text that UTF-8 can hold"),
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


def contents(count: int, start: int = 0) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in range(start, start + count)]


def test_pinned_takes_five_percent_each() -> None:
    labels = np.array([0, 1] * 5000, dtype=np.int64)
    divided = pinned(labels, contents(10_000), ("test", "validation"))
    assert sorted(index for indices in divided.splits.values() for index in indices) == list(range(10_000))
    assert len(divided.splits["test"]) == pytest.approx(500, abs=70)
    assert len(divided.splits["validation"]) == pytest.approx(500, abs=70)
    assert divided.moved == 0
    # Recorded: a change would move images between splits of people's tasks.
    assert divided.splits["test"][:5] == [39, 51, 55, 146, 149]
    assert divided.splits["validation"][:5] == [9, 49, 65, 101, 105]


def test_pinned_images_stay_where_they_are_when_others_come() -> None:
    few, many = contents(300), contents(300, 1000) + contents(300) + contents(400, 2000)
    before = pinned(np.array([0, 1] * 150), few, ("test", "validation"))
    after = pinned(np.array([0, 1] * 500), many, ("test", "validation"))
    assert before.moved == after.moved == 0
    for split, indices in before.splits.items():
        assert {few[index] for index in indices} == {many[index] for index in after.splits[split]} & set(few)


def test_pinned_leaves_the_share_of_a_split_that_is_there_in_train() -> None:
    labels = np.array([0, 1] * 500, dtype=np.int64)
    both = pinned(labels, contents(1000), ("test", "validation")).splits
    assert pinned(labels, contents(1000), ("test",)).splits["test"] == both["test"]
    assert pinned(labels, contents(1000), ("validation",)).splits["validation"] == both["validation"]


def test_pinned_puts_equal_contents_together() -> None:
    labels = np.array([0, 1] * 500, dtype=np.int64)
    divided = pinned(labels, contents(500) * 2, ("test", "validation"))
    owners = [{index % 500 for index in indices} for indices in divided.splits.values()]
    assert sum(map(len, owners)) == 500


def test_pinned_leaves_one_of_each_class_and_fills_each_split() -> None:
    # Places 0.004, 0.008 ... : all below 0.05 but the last.
    near_zero = [bytes([number]) + bytes(7) for number in range(1, 11)] + [b"\xff" + bytes(7)]
    labels = np.array([0] * 9 + [1, 1], dtype=np.int64)
    divided = pinned(labels, near_zero, ("test", "validation"))
    # Class 0 keeps its last; nothing lies between 0.05 and 0.1 and nothing more can be spared.
    assert divided.splits == {"train": [8, 10], "test": [0, 1, 2, 3, 4, 5, 6, 7, 9], "validation": []}
    assert divided.moved == 1
    divided = pinned(
        np.array([0, 0, 0, 1], dtype=np.int64), [b"\xf0" + bytes([n]) + bytes(6) for n in range(4)], ("test", "validation")
    )
    assert divided.splits == {"train": [2, 3], "test": [0], "validation": [1]}
    assert divided.moved == 2


def test_splits_that_overlap_are_counted() -> None:
    data = dataclasses.replace(GOOD, train=images(0, 1, 0), validation=images(1, 1), test=images(0, 0, 0, 1))
    assert oddities(data, "here") == (
        "2 of 2 validation images of here are also training images, pixel by pixel: accuracy on them shows memory, not skill",
        "3 of 4 test images of here are also training images, pixel by pixel: accuracy on them shows memory, not skill",
        "2 of 4 test images of here are also validation images, pixel by pixel: accuracy on them shows memory, not skill",
    )


def test_nothing_odd_is_no_warning() -> None:
    other = ImageSet([np.full((2, 2, 3), 200, dtype=np.uint8)], np.array([0], dtype=np.int64), ["other"])
    assert oddities(dataclasses.replace(GOOD, validation=other), "here") == ()


def test_classes_that_differ_in_case_alone() -> None:
    data = dataclasses.replace(GOOD, labels=("Cat", "cat", "dog"), validation=images(), test=None)
    assert oddities(data, "here") == ("classes 'Cat' and 'cat' of here differ only in case",)


def test_few_validation_images_make_quality_doubtful() -> None:
    (doubt,) = doubts_about_quality(dataclasses.replace(GOOD, validation=images(*[0, 1] * 4)))
    assert doubt.startswith("quality is measured on 8 validation images and moves in steps of 0.125:")
    many = images(*[index % 2 for index in range(FEW_VALIDATION_IMAGES)])
    assert doubts_about_quality(dataclasses.replace(GOOD, validation=many)) == ()


def test_classes_that_validation_does_not_show_make_quality_doubtful() -> None:
    blind = images(*[1] * FEW_VALIDATION_IMAGES)
    expected = "there are no validation images of class 'a': quality says nothing about that"
    assert doubts_about_quality(dataclasses.replace(GOOD, validation=blind)) == (expected,)


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
