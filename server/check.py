"""Whether a model repository is whole: everything a server verifies, and what only other readers of it would notice."""

from __future__ import annotations

from google.protobuf import text_format

from server.embedded.sessions import SegmentSession
from server.engine import Engine
from server.errors import Finding, SegmentLoadError
from server.generation import Generation
from server.reload import rehearse
from server.repository import Repository, config_path
from server.triton.container import check_versions
from server.verification import parse_config


def check(repository: Repository, engine: Engine, device: str = "cpu") -> tuple[Generation | None, list[Finding]]:
    """Checks a repository's current generation.

    Everything that a server verifies before it serves (files and checksums, routes, configs, segments, golden answers), and what only a
    Triton would notice: the aliases, and ONNX files that are too new for its container.

    Args:
        repository: what to check.
        engine: what loads it; nothing stays loaded.
        device: what the engine computes on.

    Returns:
        The generation, if its own file makes sense, and every fault.

    Raises:
        RepositoryError: nothing was published there, or in a newer format.
    """
    generation, findings = repository.inspect()
    if generation is None:
        return None, findings
    findings += check_aliases(repository, generation)
    findings += check_versions(generation)
    try:
        engine.load(generation)
    except SegmentLoadError:
        return generation, findings + _check_segments(generation, device)
    try:
        return generation, findings + rehearse(engine, generation, list(generation.tasks.values()))
    finally:
        engine.unload(generation)


def check_aliases(repository: Repository, generation: Generation) -> list[Finding]:
    """Returns a finding for each task whose alias, `<task>`, is not its ensemble under the task's name."""
    findings = []
    for task in generation.tasks.values():
        path = config_path(task.name)
        advice = "publish again"
        try:
            alias = parse_config(repository.root / path)
            ensemble = parse_config(repository.root / config_path(task.ensemble))
            labels = {
                output.label_filename: (repository.root / task.ensemble / output.label_filename).read_bytes()
                for output in ensemble.output
            }
            altered = [name for name, content in labels.items() if (repository.root / task.name / name).read_bytes() != content]
        except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
            findings.append(Finding(path, str(error)[:300], f"{task.ensemble} under the task's name", advice))
            continue
        findings += [Finding(f"{task.name}/{name}", "other labels", f"those of {task.ensemble}", advice) for name in altered]
        name = alias.name
        alias.name = ensemble.name = ""
        if name not in ("", task.name) or alias != ensemble:
            findings.append(Finding(path, "another config", f"{task.ensemble} under the task's name", advice))
    return findings


def _check_segments(generation: Generation, device: str) -> list[Finding]:
    findings = []
    for segment in generation.segments.values():
        try:
            SegmentSession(segment, device)
        except SegmentLoadError as error:
            findings.append(Finding(f"segment {segment.name!r}", error.reason, error.expected, "export it again"))
    return findings
