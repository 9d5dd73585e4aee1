"""What torch.onnx made of a layer without its weights, kept on this machine: making it takes seconds in every process that publishes.

A graph is kept under a hash of all it depends on, the sources of munet that shape it among that. A file that is damaged, or a folder that
cannot be read or written, costs no more than the time.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import google.protobuf.message
import onnx

from evolve.export.settings import exporter_version
from evolve.user_cache import cache_folder
from munet.files import write_atomically

_log = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size


def cached_model(what: Mapping[str, Any], sources: Iterable[ModuleType], make: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
    """Returns what `make` returned when it was asked for the same before, on this machine; or asks it.

    Args:
        what: all that the model depends on beside versions and sources, as JSON values.
        sources: modules of munet whose code shapes the model.
        make: makes the model. What it raises is raised here.
    """
    try:
        file = cache_folder() / "graphs" / f"{_key(what, sources)}.onnx"
    except (RuntimeError, OSError) as error:
        # No home, or no sources: nothing says where, or what it depends on.
        _log.debug("graphs are not kept: %s", error)
        return make()
    model = _read(file)
    if model is None:
        model = make()
        _write(file, model)
    return model


def _key(what: Mapping[str, Any], sources: Iterable[ModuleType]) -> str:
    depends = {"what": dict(what), "tools": exporter_version(), "sources": [_digest(module) for module in sources]}
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _digest(module: ModuleType) -> str:
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()


def _read(file: pathlib.Path) -> onnx.ModelProto | None:
    """Returns a model that is kept; None if there is none, or not as it was written."""
    try:
        content = file.read_bytes()
        digest, model = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return onnx.ModelProto.FromString(model) if hashlib.sha256(model).digest() == digest else None
    except (OSError, google.protobuf.message.DecodeError):
        return None


def _write(file: pathlib.Path, model: onnx.ModelProto) -> None:
    content = model.SerializeToString(deterministic=True)
    try:
        write_atomically(file, hashlib.sha256(content).digest() + content)
    except OSError as error:
        _log.debug("a graph is not kept: %s", error)
