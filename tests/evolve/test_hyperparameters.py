"""Tunables move one step along their lists."""

import pytest

from evolve.hyperparameters import DATA_NAMES, Group, Hyperparameters, tunables

ALL = {tunable.name: tunable for tunable in tunables(max_blocks=12, patch_size=16)}


def test_every_published_list_is_offered():
    assert ALL["learning_rate"].options == (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
    assert ALL["schedule"].options == ("constant", "cosine", "restarts")
    assert ALL["warmup_ratio"].options == (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
    assert ALL["momentum"].options == (None, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    assert ALL["nesterov"].options == (False, True)
    assert ALL["adapter_width"].options == (8, 16, 32, 64, 128)
    assert ALL["num_blocks"].options == tuple(range(1, 13))
    assert ALL["image_size"].options == tuple(range(16, 385, 16))
    assert ALL["crop_area_min"].options == (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    assert ALL["crop_aspect_min"].options == (0.25, 0.5, 0.75, 1.0)
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert ALL[name].options == (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


def test_every_tunable_is_a_hyperparameter_and_the_other_way_round():
    assert set(ALL) == set(Hyperparameters(num_blocks=1).to_dict())


def test_data_names_are_those_of_the_data_group():
    assert set(DATA_NAMES) == {name for name, tunable in ALL.items() if tunable.group is Group.DATA}


@pytest.mark.parametrize(
    ("name", "value", "up", "expected"),
    [
        ("learning_rate", 0.01, True, 0.02),
        ("learning_rate", 0.01, False, 0.005),
        ("learning_rate", 0.1, True, 0.1),
        ("learning_rate", 0.0001, False, 0.0001),
        ("learning_rate", 0.003, True, 0.005),
        ("learning_rate", 0.003, False, 0.002),
        ("learning_rate", 0.5, True, 0.5),
        ("learning_rate", 0.5, False, 0.1),
        ("momentum", None, False, None),
        ("momentum", None, True, 0.2),
        ("momentum", 0.2, False, None),
        ("momentum", 0.1, False, None),
        ("nesterov", False, True, True),
        ("nesterov", True, True, True),
        ("schedule", "cosine", True, "restarts"),
        ("num_blocks", 12, True, 12),
        ("image_size", 32, False, 16),
    ],
)
def test_one_step_clamped_at_the_ends(name, value, up, expected):
    assert ALL[name].step(value, up) == expected


def test_image_sizes_are_multiples_of_the_patch():
    sizes = next(t.options for t in tunables(max_blocks=1, patch_size=32) if t.name == "image_size")
    assert sizes == tuple(range(32, 385, 32))


def test_round_trip():
    values = Hyperparameters(num_blocks=3, momentum=None, schedule="restarts")
    assert Hyperparameters.from_dict(values.to_dict()) == values
