"""What a second process does, given a system's folder: exports it from scratch, then is killed many times while it publishes.

Writes `repository` (one publication of the system) and `killed` (what the kills left) in the working directory.
"""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import sys
import time

import torch

from evolve.export.onnx import export_segment
from evolve.export.publish import export_system
from evolve.export.segments import segment_of, units_of
from evolve.export.settings import ExportSettings
from evolve.store import System
from tests.evolve.export.whole import check_whole
from tests.support.system import TaskSketch, add_task, block_position

NUM_KILLS = 6


def main() -> None:
    torch.set_num_threads(1)
    system = System.open(pathlib.Path(sys.argv[1]))
    # Backwards, and not the layers that the first process began with.
    for unit in reversed(units_of(system.path(system.tasks()["short"].path_id))):
        export_segment(segment_of([unit], ExportSettings()), system.tensors, ExportSettings())
    export_system(system, pathlib.Path("repository"))
    shutil.copytree("repository", "killed")
    shutil.copytree(system.folder, "system")
    for number in range(NUM_KILLS):
        publish_until_killed(System.open(pathlib.Path("system")), pathlib.Path("killed"), number)
        check_whole(pathlib.Path("killed"))


def publish_until_killed(system: System, repository: pathlib.Path, number: int) -> None:
    child = os.fork()
    if child == 0:
        while True:
            add_task(system, "changing", TaskSketch(cloned=(block_position(1),)))
            export_system(system, repository)
            system.remove_task("changing")
            export_system(system, repository)
    time.sleep(random.Random(number).uniform(0.01, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
