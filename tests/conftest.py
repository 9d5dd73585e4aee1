"""What holds for every test."""

from __future__ import annotations

import os

# Read when torch loads, as `munet-evolve` sets it: tests run beside each other, and threads that wait in a busy loop take the others' time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
