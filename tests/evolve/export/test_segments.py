from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.export.segments import Segmentation, find_segments, published_cuts, segment_of, units_of
from evolve.export.settings import ExportSettings, exporter_version
from evolve.hyperparameters import Hyperparameters
from evolve.layer import HEAD, NORM, Layer, LayerKind, LayerSpec, adapter_position
from evolve.path import Path, PlacedLayer, ordered_positions
from munet.v1 import generation_pb2

SETTINGS = ExportSettings()
WIDTH = 4


def layer(kind: LayerKind, name: str) -> Layer:
    return Layer(f"{kind}-{name}", LayerSpec.of(kind, width=WIDTH, adapter_width=2), 1)


def path(task: str, *, blocks: int = 3, adapters: dict[int, str] | None = None, **own: str) -> Path:
    """A path of the root's layers but for those of its own, by position with _ for the dot."""
    adapters = adapters or {}
    names = {HEAD: task, **{adapter_position(block): name for block, name in adapters.items()}}
    placed = []
    for position in ordered_positions(blocks, adapters):
        name = names.get(position, own.get(str(position).replace(".", "_"), f"root{position.block}"))
        placed.append(PlacedLayer(position, layer(position.kind, name)))
    return Path.of(task=task, layers=placed, hyperparameters=Hyperparameters(num_blocks=blocks), parent_id=None, quality=0.5)


def described(segmentation: Segmentation) -> generation_pb2.Generation:
    """What a generation remembers of it."""
    return generation_pb2.Generation(
        segments=[
            generation_pb2.Segment(name=s.name, units=[generation_pb2.Unit(layer_ids=u.layer_ids) for u in s.units])
            for s in segmentation.segments.values()
        ],
        tasks=[generation_pb2.Task(name=name, route=route) for name, route in segmentation.routes.items()],
    )


@st.composite
def systems(draw: st.DrawFn) -> dict[str, Path]:
    """Paths that share by chance: own or shared blocks, adapters, stems, norms and heads, other numbers of blocks."""
    variants = st.sampled_from(["root", "root", "root", "a", "b"])
    paths = {}
    for task in draw(st.lists(st.sampled_from("tuvwxyz"), min_size=1, max_size=6, unique=True)):
        blocks = draw(st.integers(1, 5))
        own = {f"block_{block}": draw(variants) + str(block) for block in range(blocks)}
        own |= {"pos_embed": draw(variants), "norm": draw(variants)}
        adapters = draw(st.dictionaries(st.integers(0, blocks - 1), st.sampled_from("ab"), max_size=2))
        paths[task] = path(task, blocks=blocks, adapters=adapters, **own)
    return paths


def test_units_keep_the_stem_an_adapter_with_its_block_and_the_norm_with_the_head() -> None:
    units = units_of(path("t", adapters={1: "a"}))
    assert [[each.kind.value for each in unit.layers] for unit in units] == [
        ["patch_embed", "class_token", "pos_embed"],
        ["block"],
        ["adapter", "block"],
        ["block"],
        ["norm", "head"],
    ]


def test_one_task_is_a_trunk_and_a_head() -> None:
    found = find_segments({"t": path("t")}, (), SETTINGS)
    assert [len(found.segments[name].units) for name in found.routes["t"]] == [4, 1]


def test_a_cloned_block_splits_the_trunk_around_it_and_the_rest_is_shared_again() -> None:
    found = find_segments({"plain": path("plain"), "cloned": path("cloned", block_1="own")}, (), SETTINGS)
    plain, cloned = found.routes["plain"], found.routes["cloned"]
    assert len(plain) == len(cloned) == 4
    assert [a == b for a, b in zip(plain, cloned, strict=True)] == [True, False, True, False]


def test_fewer_blocks_leave_a_trunk_early() -> None:
    found = find_segments({"long": path("long"), "short": path("short", blocks=2)}, (), SETTINGS)
    assert len(found.routes["long"]) == 3
    assert len(found.routes["short"]) == 2
    assert found.routes["long"][0] == found.routes["short"][0]


def test_a_block_that_stands_twice_in_a_path_is_one_segment_run_twice() -> None:
    twice = path("t", block_0="same", block_1="same")
    found = find_segments({"t": twice}, (), SETTINGS)
    assert found.routes["t"][1] == found.routes["t"][2]


def test_the_name_covers_layers_their_grouping_and_the_settings() -> None:
    units = units_of(path("t", adapters={1: "a"}))
    names = {
        segment_of(units, SETTINGS).name,
        segment_of(units[:-1], SETTINGS).name,
        segment_of(units, dataclasses.replace(SETTINGS, max_batch_size=8)).name,
        segment_of(units, dataclasses.replace(SETTINGS, target="gpu")).name,
    }
    assert len(names) == 4
    assert all(len(name) == 16 and name.startswith("seg-") for name in names)


def test_a_cache_renames_what_it_is_for_and_nothing_else() -> None:
    units = units_of(path("t"))
    cached = dataclasses.replace(SETTINGS, response_cache=True)
    assert segment_of(units[:2], cached).name != segment_of(units[:2], SETTINGS).name
    assert segment_of(units[1:], cached).name == segment_of(units[1:], SETTINGS).name
    # What was published before there was a cache keeps its name.
    told = {"target": "cpu", "precision": "float32", "max_batch_size": 32, "opset": 20, "ir_version": 10}
    content = [exporter_version(), told, [unit.layer_ids for unit in units]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert segment_of(units, SETTINGS).name == f"seg-{digest[:12]}"


def test_the_name_covers_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    units = units_of(path("t"))
    before = segment_of(units, SETTINGS)
    monkeypatch.setattr("evolve.export.segments.exporter_version", lambda: "another")
    assert segment_of(units, SETTINGS).name != before.name


@given(systems())
def test_every_route_is_its_path(paths: dict[str, Path]) -> None:
    found = find_segments(paths, (), SETTINGS)
    assert list(found.routes) == sorted(paths)
    for task, route in found.routes.items():
        assert tuple(unit for name in route for unit in found.segments[name].units) == units_of(paths[task])


@given(systems())
def test_no_unit_is_in_two_segments_and_none_is_left_over(paths: dict[str, Path]) -> None:
    found = find_segments(paths, (), SETTINGS)
    units = [unit for segment in found.segments.values() for unit in segment.units]
    assert len(units) == len(set(units))
    assert set(units) == {unit for path in paths.values() for unit in units_of(path)}
    assert {name for route in found.routes.values() for name in route} == set(found.segments)


@given(systems())
def test_norm_and_head_stand_alone(paths: dict[str, Path]) -> None:
    found = find_segments(paths, (), SETTINGS)
    for route in found.routes.values():
        last = found.segments[route[-1]]
        assert [each.kind for each in last.layers] == [NORM.kind, HEAD.kind]


@given(systems())
def test_segments_are_as_long_as_can_be(paths: dict[str, Path]) -> None:
    """Two consecutive segments could be one only if every path that uses either uses both, one after the other."""
    found = find_segments(paths, (), SETTINGS)
    pairs = {pair for route in found.routes.values() for pair in itertools.pairwise(route)}
    for before, after in pairs:
        always_together = all(
            (before in route) == (after in route) and route.count(before) == route.count(after) == 1
            for route in found.routes.values()
            if before in route or after in route
        )
        is_head = found.segments[after].units[0].is_head
        adjacent = all((before, after) in itertools.pairwise(route) for route in found.routes.values() if before in route)
        assert is_head or not (always_together and adjacent)


@given(systems(), st.randoms(use_true_random=False))
def test_the_order_of_tasks_does_not_matter(paths: dict[str, Path], shuffler: random.Random) -> None:
    names = list(paths)
    shuffler.shuffle(names)
    assert find_segments({name: paths[name] for name in names}, (), SETTINGS) == find_segments(paths, (), SETTINGS)


@given(systems(), systems())
def test_published_cuts_stay(before: dict[str, Path], after: dict[str, Path]) -> None:
    cuts = published_cuts([described(find_segments(before, (), SETTINGS))])
    found = find_segments(after, cuts, SETTINGS)
    for segment in found.segments.values():
        assert cuts.isdisjoint((a.layer_ids, b.layer_ids) for a, b in itertools.pairwise(segment.units))
    for task, route in found.routes.items():
        assert tuple(unit for name in route for unit in found.segments[name].units) == units_of(after[task])


@given(systems(), systems())
def test_more_tasks_split_segments_and_never_merge_them(before: dict[str, Path], added: dict[str, Path]) -> None:
    """Every new segment made of old units lies within one old segment."""
    old = find_segments(before, (), SETTINGS)
    new = find_segments(
        {**{f"{name}2": path for name, path in added.items()}, **before}, published_cuts([described(old)]), SETTINGS
    )
    home = {unit: name for name, segment in old.segments.items() for unit in segment.units}
    for task in before:
        for name in new.routes[task]:
            assert len({home[unit] for unit in new.segments[name].units}) == 1


def test_a_cut_stays_when_the_task_that_caused_it_leaves() -> None:
    both = find_segments({"plain": path("plain"), "cloned": path("cloned", block_1="own")}, (), SETTINGS)
    alone = find_segments({"plain": path("plain")}, published_cuts([described(both)]), SETTINGS)
    assert alone.routes["plain"] == both.routes["plain"]
