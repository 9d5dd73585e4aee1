"""Score, scale control, accounted parameters; published figures of P."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.hyperparameters import Hyperparameters
from evolve.layer import CLASS_TOKEN, HEAD, NORM, PATCH_EMBED, POS_EMBED, Layer, LayerKind, LayerSpec, block_position
from evolve.path import Path, PlacedLayer
from evolve.position_embedding import position_embedding_spec
from evolve.scoring import accounted_parameters, others_of, reference_parameters, score, sharing_counts
from evolve.specs import head_spec


def _layer(kind: LayerKind, count: int, name: int = 0, **config: int) -> Layer:
    return Layer(f"{kind}-{count}-{name}", LayerSpec.of(kind, width=192, **config), count)


def _path(task: str | None, *, block: int = 0, head: int = 0, blocks: int = 3, grid: int = 2) -> Path:
    layers = [
        PlacedLayer(PATCH_EMBED, _layer(LayerKind.PATCH_EMBED, 16 * 16 * 3 * 192 + 192, patch_size=16)),
        PlacedLayer(CLASS_TOKEN, _layer(LayerKind.CLASS_TOKEN, 192)),
        PlacedLayer(POS_EMBED, Layer(f"pos{grid}", position_embedding_spec(192, grid, grid), 192 * (grid * grid + 1))),
        *(PlacedLayer(block_position(i), _layer(LayerKind.BLOCK, 444_864, 100 * i + block)) for i in range(blocks)),
        PlacedLayer(NORM, _layer(LayerKind.NORM, 384)),
    ]
    if task is not None:
        layers.append(PlacedLayer(HEAD, Layer(f"head{head}", head_spec(192, 10), 1930)))
    return Path.of(task=task, layers=layers, hyperparameters=Hyperparameters(num_blocks=blocks), parent_id=None, quality=None)


def test_published_reference_of_the_characters_root():
    root = _path(None, grid=14)
    assert reference_parameters(root, Layer("pos2", position_embedding_spec(192, 2, 2), 192 * 5)) == 1_484_162


def test_a_layer_costs_its_parameters_divided_by_the_tasks_that_use_it():
    one, two, three = _path("one", head=1), _path("two", head=2), _path("three", head=3, block=9)
    sharing = sharing_counts([one, three])
    stem = 147_648 + 192 + 960 + 384
    assert accounted_parameters(two, sharing) == pytest.approx(stem / 3 + 3 * 444_864 / 2 + 1930)
    # The root is no task: a layer used by one task and the root costs that task in full.
    assert accounted_parameters(one, {}) == one.num_parameters


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6))
def test_accounted_parameters_add_up_to_the_distinct_layers(choices):
    paths = [_path(f"task{i}", block=block, head=head) for i, (block, head) in enumerate(choices)]
    total = sum(accounted_parameters(path, sharing_counts(p for p in paths if p is not path)) for path in paths)
    distinct = {layer.id: layer.num_parameters for path in paths for _, layer in path.layers}
    assert total == pytest.approx(sum(distinct.values()))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6))
def test_counts_of_all_tell_those_of_the_others(choices):
    paths = [_path(f"task{i}", block=block, head=head) for i, (block, head) in enumerate(choices)]
    every = sharing_counts(paths)
    for path in paths:
        counted = sharing_counts(other for other in paths if other is not path)
        assert {layer_id: count for layer_id, count in others_of(path, every).items() if count} == {
            layer_id: counted[layer_id] for layer_id in path.layer_ids if layer_id in counted
        }
        assert accounted_parameters(path, others_of(path, every)) == accounted_parameters(path, counted)


def test_score():
    assert score(0.8, 123.0, 456.0, 1.0) == 0.8
    assert score(0.8, 50.0, 100.0, 0.25) == pytest.approx(0.4)
    assert score(0.8, 50.0, 100.0, 0.5) > score(0.8, 60.0, 100.0, 0.5)
    assert isinstance(score(0.8, np.float64(50), 100, 0.5), float)
