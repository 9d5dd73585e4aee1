"""Packs trained on a real Ray cluster of several nodes on this machine: the same search, also when workers and nodes are lost."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from evolve import api
from evolve.data.task import TaskData
from evolve.errors import ClusterError, SettingsError
from evolve.lineage import lineage_hash
from evolve.search import SilentObserver
from evolve.store import System
from evolve.training import ray_cluster, ray_trainer
from evolve.training.one_by_one import OneByOneTrainer
from evolve.training.ray_trainer import RayTrainer
from tests.evolve.training.test_workers import DATA, PLAN, SETTINGS, make_system, plan_of
from tests.support.processes import TOP

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose head takes no work, with two nodes that have room for a worker each."""
    from ray.cluster_utils import Cluster

    given = {"PYTHONPATH": str(TOP), "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in given}
    os.environ |= given
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@pytest.fixture
def system(tmp_path: pathlib.Path) -> System:
    return make_system(tmp_path / "system")


def settings_of(cluster: Any, **changes: Any) -> Any:
    return SETTINGS.model_copy(update={"executor": "ray", "address": cluster.address, **changes})


def workers_of(cluster: Any) -> list[int]:
    """Returns the processes of a cluster's workers; others may have theirs on this machine at the same time."""
    raylets = {
        info.process.pid for node in cluster.list_all_nodes() for processes in node.all_processes.values() for info in processes
    }
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            is_worker = (process / "cmdline").read_bytes().startswith(b"ray::Gate")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if is_worker and parent in raylets:
            found.append(int(process.name))
    return found


class _AtChild(SilentObserver):
    """Does something when so many children are finished."""

    def __init__(self, number: int, action: Any) -> None:
        self._number, self._action = number, action

    def child_finished(self, plan: Any, record: Any) -> None:
        self._number -= 1
        if self._number == 0:
            self._action()


def test_a_worker_that_is_killed_costs_its_pack_only(cluster: Any, system: System) -> None:
    plan = plan_of()
    plan = dataclasses.replace(plan, length=dataclasses.replace(plan.length, intervals=4, batches_per_interval=60))
    told: list[str] = []
    trainer = RayTrainer(system, DATA, settings_of(cluster), told.append)
    found = []
    for pack in trainer.train(plan):
        found += [child.index for child in pack.children]
        if len(found) == 1:
            os.kill(workers_of(cluster)[0], signal.SIGKILL)
    assert sorted(found) == list(range(6))
    assert any("died at children" in sentence and sentence.endswith("it runs again") for sentence in told)
    assert trainer.identity == OneByOneTrainer(DATA, system.tensors, SETTINGS).identity


def test_what_a_straggler_is_at_is_done_by_another_and_comes_once(
    cluster: Any, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_trainer, "STRAGGLER_SECONDS", 1.0)
    plan = plan_of(2)
    plan = dataclasses.replace(plan, length=dataclasses.replace(plan.length, intervals=4, batches_per_interval=60))
    told: list[str] = []
    trainer = RayTrainer(system, DATA, settings_of(cluster), told.append)
    # Until both work.
    while sum(worker.node is not None for worker in trainer._workers) < 2:
        assert len(list(trainer.train(plan_of(2)))) == 2
    os.kill(workers_of(cluster)[0], signal.SIGSTOP)
    found = [child.index for pack in trainer.train(plan) for child in pack.children]
    assert sorted(found) == [0, 1]
    assert any("another one does the same" in sentence for sentence in told), told


def test_a_worker_of_another_version_is_refused(cluster: Any, system: System) -> None:
    trainer = RayTrainer(system, DATA, settings_of(cluster))
    trainer._expected = {**trainer._expected, "evolve": "0123456789ab"}
    with pytest.raises(ClusterError, match=r"found evolve [0-9a-f]{12} on node .*expected evolve 0123456789ab.*install the same"):
        list(trainer.train(plan_of(2)))


def test_a_node_that_does_not_see_the_system_says_so(cluster: Any, system: System) -> None:
    trainer = RayTrainer(system, DATA, settings_of(cluster))
    system.folder.rename(system.folder.with_name("elsewhere"))
    with pytest.raises(ClusterError, match=r"found no system in .* on node "):
        list(trainer.train(plan_of(2)))


def test_an_error_of_a_pack_comes_back_as_it_is(cluster: Any, system: System) -> None:
    trainer = RayTrainer(system, DATA, settings_of(cluster))
    with pytest.raises(ValueError, match="'other'"):
        list(trainer.train(dataclasses.replace(plan_of(2), task="other")))


def test_workers_end_with_their_trainer(cluster: Any, system: System) -> None:
    trainer = RayTrainer(system, DATA, settings_of(cluster))
    assert len(list(trainer.train(plan_of(2)))) == 2
    assert workers_of(cluster)
    del trainer
    deadline = time.monotonic() + 20
    while workers_of(cluster):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# The last one that needs the cluster.
def test_a_search_with_a_node_lost_in_its_middle_is_the_search_of_one_process(
    cluster: Any, system: System, tmp_path: pathlib.Path
) -> None:
    # Packs that take long enough for one to be under way.
    plan = dataclasses.replace(PLAN, training=settings_of(cluster, intervals=4, batches_per_interval=60))
    told: list[str] = []
    trainers: list[RayTrainer] = []

    def make(system: System, data: TaskData) -> RayTrainer:
        trainers.append(RayTrainer(system, data, plan.training, told.append))
        return trainers[0]

    def lose() -> None:
        """Takes away the node of a worker that is at something, or else of one that waits."""
        worker = max((worker for worker in trainers[0]._workers if worker.node), key=lambda worker: worker.job is not None)
        node = next(node for node in cluster.list_all_nodes() if node.node_id == worker.node)
        cluster.remove_node(node, allow_graceful=False)

    api.run_tasks(system, [DATA], plan, make_trainer=make, observer=_AtChild(2, lose))
    alone = make_system(tmp_path / "alone")
    single = plan.training.model_copy(update={"executor": "processes", "address": None, "workers": 1})
    api.run_tasks(alone, [DATA], dataclasses.replace(plan, training=single))
    assert lineage_hash(system) == lineage_hash(alone)
    assert any("it runs again" in sentence for sentence in told), told


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("127.0.0.1:1", ClusterError, "found no Ray cluster at 127.0.0.1:1 that can be used"),
        ("http://127.0.0.1:8265", SettingsError, "expected host:port, auto or local"),
        ("127.0.0.1", SettingsError, "expected host:port, auto or local"),
    ],
)
def test_an_address_that_cannot_be_used_is_told_at_once(address: str, kind: type[Exception], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(kind, match=message):
        ray_cluster._reach(address)
    assert time.monotonic() - started < 20


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"found no module 'ray'.*pip install '\.\[ray\]'"):
        ray_cluster.load_ray()
