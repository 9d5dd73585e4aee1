"""Whether a model repository is whole: everything a server verifies, and what only other readers of it would notice."""

from __future__ import annotations

import dataclasses

from server.embedded.sessions import SegmentSession
from server.engine import Engine
from server.errors import Finding, RepositoryError, SegmentLoadError
from server.generation import Generation
from server.rehearsal import rehearse
from server.repository import CANARY, Repository
from server.strays import find_strays
from server.triton.container import check_versions
from server.verification import check_alias


def check(repository: Repository, engine: Engine, device: str = "cpu") -> tuple[Generation | None, list[Finding]]:
    """Checks a repository's current generation, and the canary beside it if there is one.

    Everything that a server verifies before it serves (files and checksums, routes, configs, segments, golden answers), and what only a
    Triton would notice: the aliases, what nobody published in the models' folders, and ONNX files that are too new for its container.

    Args:
        repository: what to check.
        engine: what loads it; nothing stays loaded.
        device: what the engine computes on.

    Returns:
        The current generation, if its own file makes sense, and every fault.

    Raises:
        RepositoryError: nothing was published there, or in a newer format.
    """
    generation, findings = repository.inspect()
    if generation is None:
        return None, findings
    for task in generation.tasks.values():
        findings += check_alias(repository.root, task)
    findings += find_strays(repository.root, generation)
    findings += check_versions(generation)
    findings += _check_answers(generation, engine, device)
    return generation, findings + _check_canary(repository, generation, engine, device)


def _check_canary(repository: Repository, current: Generation, engine: Engine, device: str) -> list[Finding]:
    try:
        canary = repository.canary()
    except RepositoryError as error:
        return [Finding(CANARY, str(error), "what `munet-evolve canary` writes", "end it with `munet-evolve canary --end`")]
    if canary is None or canary.number <= current.number:
        return []
    generation, findings = repository.inspect(canary.number)
    if generation is not None and not findings:
        findings = _check_answers(generation, engine, device)
    return [dataclasses.replace(finding, where=f"canary {canary.number}: {finding.where}") for finding in findings]


def _check_answers(generation: Generation, engine: Engine, device: str) -> list[Finding]:
    try:
        engine.load(generation)
    except SegmentLoadError:
        return _check_segments(generation, device)
    try:
        return rehearse(engine, generation, list(generation.tasks.values()))
    finally:
        engine.unload(generation)


def _check_segments(generation: Generation, device: str) -> list[Finding]:
    findings = []
    for segment in generation.segments.values():
        try:
            SegmentSession(segment, device)
        except SegmentLoadError as error:
            findings.append(Finding(f"segment {segment.name!r}", error.reason, error.expected, "export it again"))
    return findings
