"""What torch.onnx made of a layer is made once on a machine, and never believed when it may be wrong."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Iterator

import onnx
import pytest

import evolve.export.onnx
from evolve.export import graph_cache
from evolve.export.onnx import export_segment
from evolve.export.segments import segment_of, units_of
from evolve.export.settings import ExportSettings
from evolve.store import System
from evolve.user_cache import cache_folder
from tests.support.system import TaskSketch, build_system


@pytest.fixture
def system(tmp_path: pathlib.Path) -> System:
    return build_system(tmp_path / "system", {"task": TaskSketch()})


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    monkeypatch.setenv("MUNET_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "graphs"
    evolve.export.onnx._export_layer.cache_clear()


def export(system: System) -> bytes:
    """Exports a whole path as a process does that exported nothing before."""
    evolve.export.onnx._export_layer.cache_clear()
    settings = ExportSettings()
    record = system.tasks()["task"]
    return export_segment(segment_of(units_of(system.path(record.path_id)), settings), system.tensors, settings)


def count_exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    really = evolve.export.onnx._run_exporter
    monkeypatch.setattr(evolve.export.onnx, "_run_exporter", lambda *given: made.append(given[1].kind) or really(*given))
    return made


def test_the_second_time_nothing_is_made_and_the_bytes_are_the_same(
    system: System, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_exports(monkeypatch)
    first = export(system)
    assert len(made) == len(list(cache.iterdir())) > 4
    made.clear()
    assert export(system) == first
    assert made == []


def test_what_is_damaged_is_made_again(system: System, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = export(system)
    files = sorted(cache.iterdir())
    contents = [file.read_bytes() for file in files]
    files[0].write_bytes(b"")
    files[1].write_bytes(contents[1][:-1])
    files[2].write_bytes(contents[2][:100] + bytes([contents[2][100] ^ 1]) + contents[2][101:])
    made = count_exports(monkeypatch)
    assert export(system) == first
    assert len(made) == 3
    made.clear()
    assert export(system) == first
    assert made == []


def test_other_versions_sources_and_settings_make_their_own(monkeypatch: pytest.MonkeyPatch, cache: pathlib.Path) -> None:
    asked = []

    def make() -> onnx.ModelProto:
        asked.append(1)
        return onnx.ModelProto(producer_name="made")

    for _ in range(2):
        graph_cache.cached_model({"layer": 1}, [pathlib], make)
    assert len(asked) == 1
    graph_cache.cached_model({"layer": 2}, [pathlib], make)
    graph_cache.cached_model({"layer": 1}, [onnx], make)
    monkeypatch.setattr(graph_cache, "exporter_version", lambda: "another")
    graph_cache.cached_model({"layer": 1}, [pathlib], make)
    assert len(asked) == 4


def test_where_nothing_can_be_kept_it_is_made_each_time(
    cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def make() -> onnx.ModelProto:
        asked.append(1)
        return onnx.ModelProto(producer_name="made")

    # Of a module without sources nobody knows whether it changed.
    no_sources = types.ModuleType("frozen")
    no_sources.__file__ = str(tmp_path / "nowhere.py")
    for _ in range(2):
        assert graph_cache.cached_model({}, [no_sources], make).producer_name == "made"
    assert len(asked) == 2
    assert not cache.exists()
    (tmp_path / "cache").write_text("a file where the folder should be")
    for _ in range(2):
        assert graph_cache.cached_model({}, [], make).producer_name == "made"
    assert len(asked) == 4
    monkeypatch.delenv("MUNET_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert graph_cache.cached_model({}, [], make).producer_name == "made"


def test_a_failure_keeps_nothing(cache: pathlib.Path) -> None:
    def fail() -> onnx.ModelProto:
        raise ValueError("no graph")

    with pytest.raises(ValueError, match="no graph"):
        graph_cache.cached_model({}, [], fail)
    assert not cache.exists()


def test_the_users_own_folder_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.delenv("MUNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "munet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "munet"
