"""Names of tasks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from munet.names import check_task_name, similar_names, suggest_task_name


@pytest.mark.parametrize("name", ["a", "0", "digits", "a-b_c", "x" * 64, "sega", "all"])
def test_allowed(name):
    assert check_task_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "_a", "A", "a b", "a.b", "ä", "x" * 65, "a/b", "..", "a\n"])
def test_refused_with_the_rule_and_a_suggestion(name):
    with pytest.raises(ValueError, match="expected 1 to 64 of a-z 0-9 - _, starting with a letter or digit; try '"):
        check_task_name(name)


@pytest.mark.parametrize("name", ["seg-1", "all-32"])
def test_reserved(name):
    with pytest.raises(ValueError, match=f"belong to the model repository; try 'task-{name}'"):
        check_task_name(name)


@given(st.text(max_size=100))
def test_suggestions_are_allowed(name):
    assert check_task_name(suggest_task_name(name))


def test_similar_names():
    assert similar_names("Digit", ["digits", "greek", "dogs"])[0] == "digits"
    assert similar_names("zzz", ["digits"]) == []
