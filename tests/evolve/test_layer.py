"""Layers are named by their content."""

import numpy as np
import pytest

from evolve.layer import HEAD, Layer, LayerKind, LayerSpec, Position, adapter_position, block_position, layer_id

SPEC = LayerSpec.of(LayerKind.NORM, width=2, eps=1e-6)
WEIGHTS = {"weight": np.ones(2, dtype=np.float32), "bias": np.zeros(2, dtype=np.float32)}


def test_the_id_depends_on_kind_configuration_names_types_shapes_and_bytes():
    one = layer_id(SPEC, WEIGHTS)
    assert one == layer_id(SPEC, dict(reversed(WEIGHTS.items())))
    assert len(one) == 32
    others = [
        layer_id(LayerSpec.of(LayerKind.HEAD, width=2, eps=1e-6), WEIGHTS),
        layer_id(LayerSpec.of(LayerKind.NORM, width=2, eps=1e-5), WEIGHTS),
        layer_id(SPEC, {"weight": WEIGHTS["weight"]}),
        layer_id(SPEC, {**WEIGHTS, "weight": WEIGHTS["weight"].astype(np.float64)}),
        layer_id(SPEC, {**WEIGHTS, "weight": WEIGHTS["weight"].reshape(1, 2)}),
        layer_id(SPEC, {**WEIGHTS, "bias": np.array([0, 1e-30], dtype=np.float32)}),
    ]
    assert len({one, *others}) == len(others) + 1


def test_parameters_are_counted():
    assert Layer.of(SPEC, WEIGHTS).num_parameters == 4


def test_specs_compare_by_configuration_in_any_order():
    assert LayerSpec.of(LayerKind.NORM, eps=1e-6, width=2) == SPEC


@pytest.mark.parametrize("position", [HEAD, block_position(3), adapter_position(0)])
def test_positions_round_trip_through_text(position):
    assert Position.parse(str(position)) == position


@pytest.mark.parametrize(("kind", "block"), [(LayerKind.BLOCK, None), (LayerKind.HEAD, 1)])
def test_only_blocks_and_adapters_have_an_index(kind, block):
    with pytest.raises(ValueError, match="only blocks and adapters"):
        Position(kind, block)
