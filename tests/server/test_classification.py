from __future__ import annotations

import numpy as np
import pytest

from server.classification import find_task, softmax
from server.errors import UnknownTaskError
from server.repository import Repository
from tests.support.repository import RepositoryBuilder


def test_softmax_of_great_logits() -> None:
    logits = np.array([[1000.0, 1000.0], [-1000.0, 1000.0], [0.0, np.log(3)]], np.float32)
    np.testing.assert_allclose(softmax(logits), [[0.5, 0.5], [0, 1], [0.25, 0.75]], atol=1e-6)
    assert softmax(logits).dtype == np.float64


def test_an_unknown_name_of_any_length_is_told_at_once(tmp_path) -> None:
    RepositoryBuilder(tmp_path).publish()
    generation = Repository(tmp_path).read()
    with pytest.raises(UnknownTaskError) as caught:
        find_task(generation, "digitz" * 1_000_000)
    assert len(str(caught.value)) < 300
    with pytest.raises(UnknownTaskError) as caught:
        find_task(generation, "Hebrew")
    assert caught.value.similar == ("hebrew",)
