"""Packs trained on a real Ray cluster of several nodes on this machine: the same search, also when workers and nodes are lost."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from evolve import api
from evolve.baseline import BaselinePlan, Method, baseline_file
from evolve.data.task import TaskData
from evolve.errors import ClusterError, SettingsError
from evolve.generation import GenerationPlan
from evolve.journal import read_journal
from evolve.lineage import lineage_hash
from evolve.search import SilentObserver
from evolve.store import System
from evolve.training import ray_cluster, ray_trainer
from evolve.training.one_by_one import OneByOneTrainer
from evolve.training.ray_trainer import RayTrainer
from evolve.verification import verify
from tests.evolve.training.test_workers import DATA, PLAN, SETTINGS, make_system, plan_of
from tests.support.processes import TOP, environment, lives
from tests.support.stores import BUCKET, CREDENTIALS, machine, s3_server, use_s3

SLOW_SECONDS = 240.0
"""How long a cluster may take to start, and to take a process in."""


@dataclasses.dataclass(frozen=True)
class Store:
    """What nodes share.

    Attributes:
        address: of an S3-compatible server.
        caches: folder of each node for working copies.
        is_full: whether the disk of the second has no room.
    """

    address: str
    caches: tuple[pathlib.Path, pathlib.Path]
    is_full: bool


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("caches")
    caches = (folder / "roomy", folder / "full")
    caches[1].mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(caches[1])]
    # Where mounting is not permitted, all that is left out is the full disk.
    is_full = shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True, check=False).returncode
    try:
        if is_full:
            (caches[1] / "filler").write_bytes(bytes(4096))
        with s3_server() as address:
            yield Store(address, caches, is_full)
    finally:
        if is_full:
            subprocess.run(["umount", "--lazy", str(caches[1])], check=True)


@pytest.fixture(scope="module")
def cluster(store: Store) -> Iterator[Any]:
    """A cluster whose head takes no work, with two nodes that have room for a worker each, and nothing but the store between them."""
    import ray
    from ray.cluster_utils import Cluster

    # Not below tmp_path: names of sockets are short.
    folder = tempfile.mkdtemp(prefix="ray-")
    given = {"PYTHONPATH": str(TOP), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder}
    before = {name: os.environ.get(name) for name in given}
    os.environ |= given
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 10}
    # All of it takes many times as long on a machine that does much else.
    patch = pytest.MonkeyPatch()
    patch.setattr(ray_cluster, "CONNECT_SECONDS", SLOW_SECONDS)
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args={"wait": False, **head})
    try:
        cluster.wait_for_nodes(SLOW_SECONDS)
        for cache in store.caches:
            asks = {**CREDENTIALS, "AWS_ENDPOINT_URL": store.address, "MUNET_CACHE": str(cache)}
            cluster.add_node(wait=False, num_cpus=1, env_vars=asks)
            cluster.wait_for_nodes(SLOW_SECONDS)
        yield cluster
    finally:
        patch.undo()
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@pytest.fixture
def system(tmp_path: pathlib.Path) -> System:
    return make_system(tmp_path / "system")


def settings_of(cluster: Any, **changes: Any) -> Any:
    return SETTINGS.model_copy(update={"executor": "ray", "address": cluster.address, **changes})


def worker_at_work(trainer: RayTrainer) -> Any:
    """Returns a worker that is at something, or else one that waits."""
    return max((worker for worker in trainer._workers if worker.is_ready), key=lambda worker: worker.job is not None)


def lose_node(cluster: Any, trainer: RayTrainer) -> bool:
    """Ends the node of a worker as a machine ends, all its processes at once; does nothing, and says so, if it has just done its work."""
    lost = worker_at_work(trainer)
    if lost.job is not None:
        os.kill(lost.process, signal.SIGSTOP)
        # Time for an answer that is on its way.
        time.sleep(0.5)
        if lost.future.done():
            os.kill(lost.process, signal.SIGCONT)
            return False
    node = next(node for node in cluster.list_all_nodes() if node.node_id == lost.node)
    for worker in trainer._workers:
        if worker.node == lost.node:
            os.kill(worker.process, signal.SIGSTOP)
    cluster.remove_node(node, allow_graceful=False)
    for worker in trainer._workers:
        if worker.node == lost.node:
            os.kill(worker.process, signal.SIGKILL)
    return True


def long_plan(size: int) -> GenerationPlan:
    """Returns a plan whose packs take long enough for one to be under way."""
    plan = plan_of(size)
    return dataclasses.replace(plan, length=dataclasses.replace(plan.length, intervals=4, batches_per_interval=60))


class _FromChild(SilentObserver):
    """Does something when so many children are finished, and again after each that is not its generation's last, until that worked."""

    def __init__(self, number: int, action: Any) -> None:
        self._least, self._action = number, action
        self._number, self._is_done = 0, False

    def child_finished(self, plan: Any, record: Any) -> None:
        self._number += 1
        if not self._is_done and self._number >= self._least and self._number % PLAN.search.generation_size:
            self._is_done = self._action()


def test_a_worker_that_is_killed_costs_its_pack_only(cluster: Any, system: System) -> None:
    told: list[str] = []
    trainer = RayTrainer(system, DATA, settings_of(cluster), told.append)
    found = []
    for pack in trainer.train(long_plan(6)):
        found += [child.index for child in pack.children]
        if len(found) == 1:
            os.kill(worker_at_work(trainer).process, signal.SIGKILL)
    assert sorted(found) == list(range(6))
    assert any("died at children" in sentence and sentence.endswith("it runs again") for sentence in told)
    assert trainer.identity == OneByOneTrainer(DATA, system.tensors, SETTINGS).identity


def test_what_a_straggler_is_at_is_done_by_another_and_comes_once(
    cluster: Any, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_trainer, "STRAGGLER_SECONDS", 1.0)
    told: list[str] = []
    trainer = RayTrainer(system, DATA, settings_of(cluster), told.append)
    # Until both work.
    while sum(worker.is_ready for worker in trainer._workers) < 2:
        assert len(list(trainer.train(plan_of(2)))) == 2
    stopped = trainer._workers[0].process
    os.kill(stopped, signal.SIGSTOP)
    found = [child.index for pack in trainer.train(long_plan(2)) for child in pack.children]
    assert sorted(found) == [0, 1]
    assert any("another one does the same" in sentence for sentence in told), told
    assert_gone([stopped])


def test_a_worker_that_is_sick_is_replaced_and_what_it_was_at_is_done_elsewhere(
    cluster: Any, system: System, tmp_path: pathlib.Path
) -> None:
    told: list[str] = []
    data = dataclasses.replace(DATA, train=dataclasses.replace(DATA.train, images=_FullDisk(DATA.train.images, tmp_path / "was")))
    trainer = RayTrainer(system, data, settings_of(cluster, workers=1), told.append)
    found = [one for pack in trainer.train(plan_of(2)) for one in pack.children]
    assert [child.index for child in found] == [0, 1]
    expected = [one for pack in OneByOneTrainer(DATA, system.tensors, SETTINGS).train(plan_of(2)) for one in pack.children]
    for one, other in zip(found, expected, strict=True):
        for position, tensors in one.trained.items():
            assert all(np.array_equal(tensor, other.trained[position][name]) for name, tensor in tensors.items())
    assert any("failed at children [0] of 'easy' (OSError: [Errno 28]" in sentence for sentence in told), told


class _FullDisk(list):
    """Images that the first other process to look at them cannot have."""

    def __init__(self, images: Any, file: pathlib.Path) -> None:
        super().__init__(images)
        self.file, self.owner = file, os.getpid()

    def __iter__(self) -> Iterator[Any]:
        if os.getpid() != self.owner and not self.file.exists():
            self.file.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().__iter__()


def test_a_worker_of_another_version_is_refused(cluster: Any, system: System) -> None:
    trainer = RayTrainer(system, DATA, settings_of(cluster, workers=1))
    trainer._expected = {**trainer._expected, "evolve": "0123456789ab"}
    with pytest.raises(ClusterError, match=r"found evolve [0-9a-f]{12} on node .*expected evolve 0123456789ab.*install the same"):
        list(trainer.train(plan_of(2)))


def test_a_node_that_does_not_see_the_system_says_so(cluster: Any, system: System) -> None:
    trainer = RayTrainer(system, DATA, settings_of(cluster, workers=1))
    system.folder.rename(system.folder.with_name("elsewhere"))
    with pytest.raises(ClusterError, match=r"found no system in .* on node "):
        list(trainer.train(plan_of(2)))


def test_a_search_that_finds_no_room_says_that_it_waits_and_ends(
    cluster: Any, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_trainer, "QUIET_SECONDS", 0.5)
    monkeypatch.setattr(ray_trainer, "PATIENCE_SECONDS", 2.5)
    told: list[str] = []
    trainer = RayTrainer(system, DATA, settings_of(cluster, gpus_per_worker=0.5), told.append)
    with pytest.raises(
        ClusterError, match=r"found no room for a worker .*GPU 0.* expected a node with num_cpus = 1, num_gpus = 0.5"
    ):
        list(trainer.train(plan_of(2)))
    assert [sentence.partition(";")[0] for sentence in told] == ["waiting for a node with num_cpus = 1, num_gpus = 0.5 to spare"]


def test_an_error_of_a_pack_comes_back_as_it_is(cluster: Any, system: System) -> None:
    trainer = RayTrainer(system, DATA, settings_of(cluster, workers=1))
    with pytest.raises(ValueError, match="'other'"):
        list(trainer.train(dataclasses.replace(plan_of(2), task="other")))


def test_workers_end_with_their_trainer(cluster: Any, system: System) -> None:
    trainer = RayTrainer(system, DATA, settings_of(cluster, workers=1))
    assert len(list(trainer.train(plan_of(2)))) == 2
    processes = [worker.process for worker in trainer._workers if worker.is_ready]
    assert processes
    del trainer
    assert_gone(processes)


def assert_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 120
    while any(map(lives, processes)):
        assert time.monotonic() < deadline, "workers outlived what they were for"
        time.sleep(0.1)


def test_workers_end_with_a_search_that_is_killed(cluster: Any, system: System, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "starts.py"
    script.write_text(
        "import sys, time\n"
        "from evolve.store import System\n"
        "from evolve.training import ray_cluster\n"
        "from tests.evolve.training.test_ray import DATA, RayTrainer, SETTINGS, SLOW_SECONDS, long_plan\n"
        "ray_cluster.CONNECT_SECONDS = SLOW_SECONDS\n"
        "settings = SETTINGS.model_copy(update={'executor': 'ray', 'address': sys.argv[2], 'workers': 1})\n"
        "trainer = RayTrainer(System.open(sys.argv[1]), DATA, settings)\n"
        "next(trainer.train(long_plan(4)))\n"
        "packs = trainer.train(long_plan(4))\n"
        "next(packs)\n"
        "print(*(worker.process for worker in trainer._workers), flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, str(script), str(system.folder), cluster.address]
    process = subprocess.Popen(command, env=environment(), cwd=TOP, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(workers) == 1
    assert_gone(workers)


def test_machines_with_nothing_but_object_storage_between_them_one_with_a_full_disk(
    cluster: Any, store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search and a baseline come out as in one process with a folder; what fills no disk takes part."""
    use_s3(monkeypatch, store.address)
    alone = make_system(tmp_path / "alone")
    single = dataclasses.replace(PLAN, training=SETTINGS.model_copy(update={"workers": 1}))
    told: list[str] = []
    plan = dataclasses.replace(PLAN, training=settings_of(cluster))
    method = Method.parse("adapters:8")
    with machine(tmp_path / "driver"):
        system = make_system(f"s3://{BUCKET}/ray")
        spread = RayTrainer(system, DATA, plan.training, told.append)
        while store.is_full and not spread._refused:
            list(spread.train(plan_of(2)))
        for one, its, trainer in ((system, plan, spread), (alone, single, OneByOneTrainer(DATA, alone.tensors, SETTINGS))):
            make = functools.partial(lambda trainer, *_: trainer, trainer)
            api.run_tasks(one, [DATA], its, make_trainer=make)
            api.run_baselines(one, [DATA], method, BaselinePlan(its, num_tasks=1, replicas=2), make_trainer=make)
        assert lineage_hash(system) == lineage_hash(alone)
        closes = [read_journal(baseline_file(one, method, "easy"))[-1] for one in (system, alone)]
        assert closes[0]["path_id"] == closes[1]["path_id"]
        assert closes[0]["test_accuracy"] == closes[1]["test_accuracy"]
        # What a baseline trained was carried to whoever examined it, and is no part of the store.
        trained = {file.stem for file in system.folder.glob("layers/*/*")} - {
            name.rpartition("/")[2].partition(".")[0] for name in system._objects.names("layers")
        }
        assert trained
        assert verify(system) == []
    at_roomy = {file.stem for file in store.caches[0].rglob("layers/*/*.safetensors")}
    assert system.root.layer_ids | trained <= at_roomy
    refusals = [sentence for sentence in told if "No space left on device) on node" in sentence]
    assert len(refusals) == store.is_full, told


# The last one that needs the cluster.
def test_a_search_with_a_node_lost_in_its_middle_is_the_search_of_one_process(
    cluster: Any, system: System, tmp_path: pathlib.Path
) -> None:
    plan = dataclasses.replace(PLAN, training=settings_of(cluster, intervals=4, batches_per_interval=60))
    told: list[str] = []
    trainers: list[RayTrainer] = []

    def make(system: System, data: TaskData) -> RayTrainer:
        trainers.append(RayTrainer(system, data, plan.training, told.append))
        return trainers[0]

    api.run_tasks(system, [DATA], plan, make_trainer=make, observer=_FromChild(2, lambda: lose_node(cluster, trainers[0])))
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


def test_who_listens_but_is_no_cluster_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ClusterError, match=r"can be used \(no answer within 2 s\)"):
            ray_cluster._reach(address)


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"found no module 'ray'.*pip install '\.\[ray\]'"):
        ray_cluster.load_ray()
