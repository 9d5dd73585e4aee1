"""Runs the recorded search, and records it: `python -m tests.golden.record_search`, on purpose, with a decision record that says why.

The search is real: a tiny root of random weights, two tasks of real digits, two rounds, trained one by one with torch on one thread of
the CPU. Floating point differs between CPUs, as libraries choose other kernels for other instructions; here every library is held
to what all x86-64 CPUs have:

- `ATEN_CPU_CAPABILITY=default`: torch's own kernels without AVX2 and AVX512;
- `MKL_CBWR=COMPATIBLE`: matrix products with the same sums everywhere, on CPUs of other makers too;
- `ONEDNN_MAX_CPU_ISA=SSE41`: convolutions without AVX.

Seen on an AMD EPYC: leaving out any one of the three changes layers, holding the C library and MKL to fewer instructions yet
(`GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2,-FMA`, `MKL_ENABLE_INSTRUCTIONS=SSE4_2`) changes nothing, and no quality moved in any case.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from evolve.journal import Record, read_journal
from evolve.store import System

FOLDER = pathlib.Path(__file__).parent / "search"
RECORDED = FOLDER / "recorded.json"
TOP = pathlib.Path(__file__).parents[2]

HELD = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""What holds every library to the same arithmetic on every x86-64 CPU; to be set before the process starts."""

LIBRARIES = ("torch", "numpy", "pillow", "scikit-learn")
"""Whose versions the bits depend on."""

QUALITY_TOLERANCE = 0.009
"""With other libraries, a quality may be this far from the recorded one: two of 320 validation images."""

NARROWEST = 3 * QUALITY_TOLERANCE
"""No recorded decision hangs on a smaller difference between two scores, so that none may be another with other libraries."""

PLANNED = ("parent_id", "mutations", "hyperparameters", "origins", "seed")
GAINED = ("quality", "interval_qualities", "score", "parent_score")
EXACT = ("path_id", "best_interval", "accounted_parameters", "layers", "num_trained_images", "flops")


def versions() -> dict[str, str]:
    """Returns what the bits depend on: versions of libraries without their build tags, and the kind of machine."""
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES}
    return {**found, "machine": f"{platform.system()} {platform.machine()}"}


def search(
    folder: pathlib.Path, environment: Mapping[str, str] = HELD, experiment: pathlib.Path = FOLDER / "experiment.toml"
) -> dict[str, Any]:
    """Runs the search in a process of its own and returns what its journals say and where it ended.

    Args:
        folder: of the system, to be made.
        environment: what the process gets beside everything else.
        experiment: what to run.
    """
    command = [sys.executable, "-m", "evolve.cli", "run", str(experiment), "--system", str(folder)]
    surroundings = {**os.environ, "PYTHONPATH": str(TOP), **environment}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the recorded search ended with status {done.returncode}: {done.stderr}")
    system = System.open(folder)
    tasks = {name: dataclasses.asdict(record) for name, record in system.tasks().items()}
    for record in tasks.values():
        del record["settings"]
    searches = {file.stem: list(_kept(read_journal(file))) for file in sorted((folder / "journal").glob("*.jsonl"))}
    return json.loads(json.dumps({"versions": versions(), "root": system.root.id, "tasks": tasks, "searches": searches}))


def _kept(records: list[Record]) -> Iterator[Record]:
    """Yields generations with the results of their children, then the end; fields that later versions add are left out."""
    results = {
        (record["generation"], child["index"]): child
        for record in records
        if record["type"] == "pack"
        for child in record["children"]
    }
    for record in records:
        if record["type"] == "generation":
            children = []
            for planned in record["children"]:
                result = results[record["index"], planned["index"]]
                fields = {name: planned[name] for name in PLANNED} | {
                    name: result[name] for name in (*GAINED, *EXACT, "survived")
                }
                children.append(fields)
            yield {
                "data": record["data"],
                "data_seed": record["data_seed"],
                "num_steps": record["num_steps"],
                "children": children,
            }
        elif record["type"] == "close":
            yield {name: record[name] for name in ("path_id", "quality", "score", "num_children", "test_accuracy", "examples")}


def differences(recorded: Any, found: Any, *, exact: bool, where: str = "") -> list[str]:
    """Returns in words what differs; nothing if nothing does.

    Args:
        recorded: of RECORDED.
        found: what `search` gave.
        exact: whether everything must be equal to the last bit. Otherwise all decisions must be: parents, mutations, hyperparameters
            and who survived; qualities and scores only up to QUALITY_TOLERANCE, and ids of trained layers and paths not at all.
        where: of these values in the whole.
    """
    if isinstance(recorded, dict) and isinstance(found, dict):
        return [
            line
            for key in sorted(recorded.keys() | found.keys())
            if key != "versions"
            for line in differences(recorded.get(key), found.get(key), exact=exact, where=f"{where}.{key}" if where else key)
        ]
    if isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        pairs = enumerate(zip(recorded, found, strict=True))
        return [line for number, (old, new) in pairs for line in differences(old, new, exact=exact, where=f"{where}[{number}]")]
    if recorded == found or (not exact and _may_differ(recorded, found, where.rpartition(".")[2].partition("[")[0])):
        return []
    return [f"{where}: {recorded!r} was recorded, {found!r} was found"]


def _may_differ(recorded: Any, found: Any, name: str) -> bool:
    if name in ("path_id", "parent_id", "layers", "best_interval"):
        return True
    if name in ("quality", "interval_qualities", "score", "parent_score", "test_accuracy"):
        return isinstance(recorded, float) and isinstance(found, float) and abs(recorded - found) <= QUALITY_TOLERANCE
    return False


def margins(found: Mapping[str, Any]) -> list[float]:
    """Returns by how much each decision between two scores was made: survival, and the best of a population."""
    narrow = []
    for records in found["searches"].values():
        *generations, closed = records
        children = [child for generation in generations for child in generation["children"]]
        narrow += [abs(child["score"] - child["parent_score"]) for child in children if child["parent_score"] is not None]
        scores = sorted({child["score"] for child in children if child["survived"]} | {closed["score"]})
        narrow += [scores[-1] - scores[-2]] if len(scores) > 1 else []
    return narrow


def main() -> None:
    """Records the search anew."""
    with tempfile.TemporaryDirectory() as folder:
        found = search(pathlib.Path(folder) / "system")
    narrowest = min(margins(found))
    if narrowest < NARROWEST:
        raise SystemExit(f"found a decision by {narrowest:.4f}; expected {NARROWEST} at least: choose another seed")
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")
    print(f"recorded in {RECORDED.relative_to(TOP)}; narrowest decision {narrowest:.4f}")


if __name__ == "__main__":
    main()
