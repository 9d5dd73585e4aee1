"""What a node of a Ray cluster runs first: it says what is installed there before anything of muNet is needed.

Ray carries this file to workers as it is here (pickled by value), so that it answers also where muNet is missing or of another version. It
therefore imports nothing but Python's own, and muNet only once a worker has proven to have the same.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pathlib
import platform
import socket
from typing import Any

_PACKAGES = ("munet", "evolve", "torch", "numpy")
_OWN = ("munet", "evolve")


def installed() -> dict[str, str]:
    """Returns the versions of all that results depend on; of muNet a hash of its source, 12 hex digits; `none` of what is missing."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            package = importlib.import_module(name)
        except ImportError as error:
            found[name] = f"none ({error})"
            continue
        found[name] = _source_hash(pathlib.Path(package.__path__[0])) if name in _OWN else str(package.__version__)
    return found


def _source_hash(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Gate:
    """A worker on a node, made a Ray actor."""

    def __init__(self) -> None:
        """Nothing is done before `greet` and `begin`."""
        self._system: Any = None
        self._trainer: Any = None

    def greet(self) -> dict[str, Any]:
        """Says at once that this worker has its place: `node`, its id; `host`, its name; `process`, this one's id."""
        import ray

        return {"node": ray.get_runtime_context().get_node_id(), "host": socket.gethostname(), "process": os.getpid()}

    def begin(self, expected: dict[str, str], arguments: list[Any]) -> dict[str, Any]:
        """Prepares to work, if this worker is of the same version as its driver.

        Args:
            expected: what `installed` says where the search runs.
            arguments: one reference to what evolve.training.ray_trainer.begin takes; within a list, as Ray looks into no list: nothing is
                fetched, and nothing of muNet needed, before versions have been compared.

        Returns:
            What `installed` says of it; and if that was as expected either `error`, what kept it from working, or `processor`, what it
            computes on.
        """
        import ray

        # Read when torch loads, as evolve.cli has it.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        answer: dict[str, Any] = {"installed": installed()}
        if answer["installed"] == expected:
            from evolve.training import ray_trainer

            begun = ray_trainer.begin(*ray.get(arguments[0]))
            if isinstance(begun, Exception):
                answer["error"] = begun
            else:
                self._system, self._trainer, answer["processor"] = begun
        return answer

    def carry_out(self, order: Any, layers: list[Any]) -> Any:
        """Trains a pack or examines a path; see evolve.training.spread.carry_out.

        Args:
            order: what to do.
            layers: kind and weights of those it needs that are not to be had where the system is.
        """
        from evolve.training.spread import carry_out

        for spec, tensors in layers:
            self._system.put_layer(spec, tensors)
        return carry_out(self._trainer, order)
