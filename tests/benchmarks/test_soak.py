"""A soak, short: every fault at least once, nothing wrong, nothing unexpected, and no growth that would be seen so soon."""

from __future__ import annotations

import pathlib

import pytest

from tests.benchmarks.test_smoke import TIMEOUT_SECONDS, figures_of, smoke


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_a_short_soak(tmp_path: pathlib.Path, warm_python: pathlib.Path) -> None:
    lines = smoke("soak", tmp_path, warm_python)
    assert figures_of(lines).keys() == {"soak"}
    *rounds, verdict, _ = lines
    assert (verdict["wrong"], verdict["unexpected"], verdict["examples"]) == (0, 0, [])
    last = rounds[-1]
    assert last["answers"] > 100
    assert last["reloads"] >= 3
    assert last["faults"].keys() >= {
        "damaged images",
        "no requests",
        "calls left",
        "connections half open",
        "streams never read",
        "callers killed",
        "reload",
    }
    assert last["statuses"].keys() >= {"OK", "INVALID_ARGUMENT", "CANCELLED"}
    # Pools and arenas grow to their size for a while; half a minute shows only what grows by the call.
    first = rounds[0]["at_rest"]
    assert last["at_rest"]["descriptors"] <= first["descriptors"] + 5
    assert last["at_rest"]["threads"] <= first["threads"] + 10
    assert last["at_rest"]["rss_mib"] <= 1.3 * first["rss_mib"]
