"""The recorded search comes out again: bit by bit with the recorded libraries, decision by decision with others."""

from __future__ import annotations

import copy
import json
import pathlib
import platform
import subprocess
import sys
from typing import Any

import pytest

from tests.golden.record_search import (
    FOLDER,
    HELD,
    LIBRARIES,
    NARROWEST,
    QUALITY_TOLERANCE,
    RECORDED,
    differences,
    margins,
    search,
    versions,
)
from tests.support.processes import TOP, environment


@pytest.fixture(scope="module")
def recorded() -> Any:
    return json.loads(RECORDED.read_text())


def test_the_recorded_search_comes_out_again(tmp_path: pathlib.Path, recorded: Any) -> None:
    found = search(tmp_path / "system")
    exact = found["versions"] == recorded["versions"]
    differing = differences(recorded, found, exact=exact)
    how = "to the last bit, with the libraries it was recorded with" if exact else f"in its decisions, with {found['versions']}"
    assert not differing, (
        f"the recorded search came out otherwise in {len(differing)} places, expected the same {how}. A change that alters results on "
        "purpose needs a decision record; then record anew: python -m tests.golden.record_search\n" + "\n".join(differing[:20])
    )


def test_children_trained_together_come_to_the_same_decisions(tmp_path: pathlib.Path, recorded: Any) -> None:
    experiment = tmp_path / "experiment.toml"
    text = (FOLDER / "experiment.toml").read_text()
    packed = text.replace("[training]\n", "[training]\npack_size = 4\n")
    assert packed != text
    experiment.write_text(packed.replace('"root.safetensors"', f'"{FOLDER / "root.safetensors"}"'))
    assert differences(recorded, search(tmp_path / "system", experiment=experiment), exact=False) == []


def test_it_was_recorded_with_the_pinned_libraries(recorded: Any) -> None:
    """So that the exact comparison is the one that `make test` makes."""
    pinned = dict(line.split("==") for line in (TOP / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pinned[name].partition("+")[0] for name in LIBRARIES} == {
        name: recorded["versions"][name] for name in LIBRARIES
    }
    assert recorded["versions"]["machine"] == "Linux x86_64"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names are those of x86-64")
def test_every_library_is_held(tmp_path: pathlib.Path) -> None:
    """The names in HELD are read: a misspelt one would hold nothing."""
    script = (
        "import torch; print(torch.backends.cpu.get_cpu_capability()); x = torch.rand(64, 64); "
        "torch.nn.functional.conv2d(x.view(1, 1, 64, 64), torch.rand(4, 1, 4, 4)); print(x @ x is None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment(), **HELD, "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "DEFAULT" in done.stdout
    assert "isa:Intel AVX" not in done.stdout
    assert "CNR:COMPATIBLE" in done.stdout
    assert "isa:Intel SSE4.1" in done.stdout


def test_decisions_hang_on_differences_that_other_libraries_do_not_make(recorded: Any) -> None:
    assert min(margins(recorded)) >= NARROWEST
    children = [c for records in recorded["searches"].values() for g in records[:-1] for c in g["children"]]
    assert len(children) == 24
    # It holds what a search decides: who survives, whose layers are borrowed, what mutates.
    assert sum(not child["survived"] for child in children) >= 5
    assert any("clone" in mutation for child in children for mutation in child["mutations"])
    assert any("adapter" in mutation for child in children for mutation in child["mutations"])
    assert {origin for child in children for _, origin in child["origins"]} == {"shared", "cloned", "continued", "new"}


def _first_children(found: Any) -> list[Any]:
    return found["searches"]["other-digits-0001"][0]["children"]


@pytest.mark.parametrize("exact", [True, False])
def test_an_altered_decision_is_found(recorded: Any, exact: bool) -> None:
    assert differences(recorded, copy.deepcopy(recorded), exact=exact) == []
    for name, value in (
        ("survived", False),
        ("mutations", ["learning_rate: 0.05 -> 0.1"]),
        ("seed", 1),
        ("quality", _first_children(recorded)[0]["quality"] + 1.01 * QUALITY_TOLERANCE),
        ("accounted_parameters", 1.0),
        ("num_trained_images", 0),
    ):
        altered = copy.deepcopy(recorded)
        _first_children(altered)[0][name] = value
        (line,) = differences(recorded, altered, exact=exact)
        assert line.startswith(f"searches.other-digits-0001[0].children[0].{name}")
    altered = copy.deepcopy(recorded)
    altered["searches"]["digits-0001"].pop()
    assert len(differences(recorded, altered, exact=exact)) == 1
    del altered["searches"]["digits-0001"]
    assert len(differences(recorded, altered, exact=exact)) == 1


def test_a_single_bit_is_found_where_all_bits_must_be_equal(recorded: Any) -> None:
    altered = copy.deepcopy(recorded)
    layers = _first_children(altered)[0]["layers"]
    layers[-1][1] = layers[-1][1][:-1] + ("0" if layers[-1][1][-1] != "0" else "1")
    assert len(differences(recorded, altered, exact=True)) == 1
    assert differences(recorded, altered, exact=False) == []
    altered = copy.deepcopy(recorded)
    _first_children(altered)[0]["quality"] += 1e-15
    assert len(differences(recorded, altered, exact=True)) == 1


def test_versions_are_those_of_this_environment() -> None:
    assert set(versions()) == {*LIBRARIES, "machine"}
