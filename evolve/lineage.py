"""The lineage hash: one value that says whether two searches decided, trained and ended alike.

It is taken over what a system is (root, tasks, current paths, the bytes of their layers) and how it came about (every journal: who was
sampled from whom, with which mutations, hyperparameters and seeds, every score, who survived). Two runs of one experiment have the same
one, whether they ran in one go, were killed and resumed, or trained children in other packs, on one device type and library version.

What is no part of it: timings; the system's own random id, and with it every `system` field; settings and versions of libraries, whose
effects are in it; how children were packed; what an estimate says (FLOPs); journals that were set aside; baselines; whether garbage was
collected. Fields are named here one by one, so that a journal of an earlier version has the lineage that it had.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from evolve.journal import Record, read_journal
from evolve.store import System

VERSION = 1
"""Goes up when the same search gets another hash."""

_OPENED = ("root", "task", "round", "data_fingerprint", "labels", "private")
_SEEN = ("name", "path_id", "parent_id", "num_children", "rounds", "order", "private", "quality")
_GENERATION = ("index", "data", "data_seed", "num_steps")
_PLANNED = ("index", "parent_id", "mutations", "hyperparameters", "origins", "seed")
_TRAINED = (
    *("index", "path_id", "parent_id", "quality", "interval_qualities", "best_interval", "score", "parent_score", "survived"),
    *("accounted_parameters", "layers", "num_trained_images"),
)
_STOPPED = tuple(name for name in _TRAINED if name not in ("path_id", "layers", "num_trained_images"))
"""Of a child that stopped early: what a trainer that did not stop it goes on to compute changes nothing, see decision 10."""
_CLOSED = ("path_id", "quality", "score", "num_children", "test_accuracy", "examples")


def lineage_hash(system: System) -> str:
    """Returns the lineage hash of a system as it is now: 32 hex digits of SHA-256.

    Every layer of the root and of current paths is read and hashed.

    Raises:
        DamagedError: a path, layer or journal is missing or altered.
        SystemFolderError: a journal is of a newer format.
    """
    with system.locks.reading():
        records = system.tasks()
        paths = [system.root, *(system.path(record.path_id) for record in records.values())]
        journals = [(journal, read_journal(journal.file)) for journal in system.journals()]
        content = {
            "version": VERSION,
            "root": system.root.id,
            "tasks": [_without_settings(dataclasses.asdict(record)) for record in records.values()],
            # A path's id stands for all that it is, a layer's for its bytes: both are checked against what is on disk.
            "paths": sorted(path.id for path in paths),
            "layers": sorted({system.check_layer(layer_id).id for path in paths for layer_id in path.layer_ids}),
            # A search that was killed before its first line has decided nothing.
            "journals": [[journal.task, journal.round, lineage_of(told)] for journal, told in journals if told],
        }
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def lineage_of(records: Sequence[Record]) -> list[Any]:
    """Returns what counts of a search's journal, as JSON values.

    Args:
        records: as evolve.journal.read_journal gives them.
    """
    lineage: list[Any] = []
    trained: list[Any] = []
    for record in records:
        if record["type"] == "open":
            lineage.append(_chosen(record, _OPENED) | {"snapshot": [_chosen(row, _SEEN) for row in record["snapshot"]]})
        elif record["type"] == "generation":
            lineage.append(
                _chosen(record, _GENERATION) | {"children": [_chosen(child, _PLANNED) for child in record["children"]]}
            )
        elif record["type"] == "pack":
            for child in record["children"]:
                names = _STOPPED if "stopped_after" in child else _TRAINED
                trained.append([record["generation"], child["index"], _chosen(child, names)])
        elif record["type"] == "close":
            lineage.append(_chosen(record, _CLOSED))
    return [*lineage, sorted(trained, key=lambda row: row[:2])]


def _without_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "settings"}


def _chosen(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values.get(name) for name in names}
