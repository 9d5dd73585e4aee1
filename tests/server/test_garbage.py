"""In a process of its own: how Python looks for garbage is set for good."""

from __future__ import annotations

import subprocess
import sys

from tests.support.processes import environment

CODE = """
import gc, weakref
from server.garbage import OLDEST_EVERY, prepare_collector

class Node:
    pass

kept = [Node() for _ in range(1000)]
before = gc.get_threshold()
prepare_collector()
assert gc.get_freeze_count() > 1000
assert gc.get_threshold() == (*before[:2], OLDEST_EVERY), gc.get_threshold()
full = []
gc.callbacks.append(lambda phase, info: full.append(info["generation"]) if phase == "start" else None)
young = Node()
young.itself = young
found = weakref.ref(young)
del young
open_requests = [[number] for number in range(12 * before[0] * before[1])]
assert found() is None, "a cycle among young objects was not found"
assert full and 2 not in full, full
print("sound")
"""


def test_the_old_are_left_alone_and_young_cycles_are_found() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment(), timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "sound\n"), done.stderr
