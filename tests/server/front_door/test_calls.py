"""Answers over real gRPC, to both clients."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from munet.preprocessing import resize
from server.client import AdminClient, AsyncClient, Client
from tests.support.images import encode
from tests.support.repository import DIGITS, TASKS, RepositoryBuilder, answer, random_images
from tests.support.serving import ServerThread, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    root = tmp_path_factory.mktemp("repository")
    RepositoryBuilder(root).publish()
    with serving(root) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerThread) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


PIXELS = random_images(1, 30, seed=4)[0][:20]


def reference(task: str, pixels: np.ndarray) -> np.ndarray:
    plan = TASKS[task]
    return answer(plan, resize(pixels, plan.image_size)[None])[0]


def test_one_task_one_image(client: Client) -> None:
    result = client.classify("digits", encode(PIXELS), top_k=3, include_logits=True)
    expected = reference("digits", PIXELS)
    probabilities = np.exp(expected - expected.max()) / np.exp(expected - expected.max()).sum()
    (found,) = result.classifications
    assert (result.task, result.generation) == ("digits", 1)
    assert result.path_id
    np.testing.assert_allclose(found.logits, expected, atol=1e-4)
    assert [label.index for label in found.labels] == np.argsort(-expected)[:3].tolist()
    assert found.top.label == DIGITS.labels[found.top.index]
    np.testing.assert_allclose([label.probability for label in found.labels], np.sort(probabilities)[::-1][:3], atol=1e-4)


def test_every_kind_of_image_is_the_same_image(client: Client, tmp_path: pathlib.Path) -> None:
    (tmp_path / "image.bmp").write_bytes(encode(PIXELS, "BMP"))
    sent = [encode(PIXELS), encode(PIXELS, "WEBP", lossless=True), encode(PIXELS, "BMP"), PIXELS, tmp_path / "image.bmp"]
    result = client.classify("digits", sent, include_logits=True)
    for found in result.classifications[1:]:
        assert np.array_equal(found.logits, result.classifications[0].logits)
    assert client.classify("digits", encode(PIXELS, "JPEG")).classifications


def test_grey_pixels(client: Client) -> None:
    grey = PIXELS[:, :, 0]
    sent = [grey, grey[:, :, None], np.repeat(grey[:, :, None], 3, axis=2), encode(grey)]
    result = client.classify("digits", sent, include_logits=True)
    assert len({found.logits.tobytes() for found in result.classifications}) == 1


def test_several_images_in_their_order(client: Client) -> None:
    images = random_images(40, 8, seed=8)
    result = client.classify("hebrew", list(images), include_logits=True)
    found = np.stack([classification.logits for classification in result.classifications])
    np.testing.assert_allclose(found, answer(TASKS["hebrew"], images), atol=1e-4)
    assert np.array_equal(client.classify("hebrew", images[7], include_logits=True).classifications[0].logits, found[7])


def test_all_tasks_of_all_sizes(client: Client) -> None:
    result = client.classify_tasks(PIXELS, include_logits=True)
    assert [found.task for found in result.tasks] == sorted(TASKS)
    for found in result.tasks:
        np.testing.assert_allclose(found.classification.logits, reference(found.task, PIXELS), atol=1e-4)
        alone = client.classify(found.task, PIXELS, include_logits=True)
        assert np.array_equal(alone.classifications[0].logits, found.classification.logits)
        assert alone.path_id == found.path_id


def test_tasks_in_the_order_asked_for(client: Client) -> None:
    result = client.classify_tasks(PIXELS, ["large", "digits", "large"])
    assert [found.task for found in result.tasks] == ["large", "digits", "large"]
    assert result["digits"].logits is None
    with pytest.raises(KeyError):
        result["greek"]


def test_top_k_is_clamped(client: Client) -> None:
    (found,) = client.classify("digits", PIXELS, top_k=1000).classifications
    assert len(found.labels) == 10
    assert sum(label.probability for label in found.labels) == pytest.approx(1)
    (found,) = client.classify("digits", PIXELS, top_k=0).classifications
    assert len(found.labels) == 1


def test_list_and_get(client: Client) -> None:
    listed = client.list_tasks()
    assert listed.generation == 1
    assert [task.name for task in listed.tasks] == sorted(TASKS)
    task = client.get_task("large")
    assert task == listed.tasks[3]
    assert (task.image_size, task.labels, task.quality, task.test_accuracy) == (16, TASKS["large"].labels, 0.75, 0.5)
    assert len(task.route) == 4


def test_computed_once_is_proven_by_counters(server: ServerThread, client: Client) -> None:
    def counters() -> dict[str, tuple[int, int, int]]:
        with AdminClient(server.admin_address) as admin:
            status = admin.status()
        return {segment.name: (segment.rows_requested, segment.rows_computed, segment.rows_saved) for segment in status.segments}

    before = counters()
    client.classify_tasks(PIXELS, ["digits", "greek", "hebrew", "short"])
    after = counters()
    stem = client.get_task("digits").route[0]
    assert tuple(b - a for a, b in zip(before[stem], after[stem], strict=True)) == (4, 1, 3)
    for requested, computed, saved in after.values():
        assert saved == requested - computed


def test_status_says_which_tasks_use_a_segment(server: ServerThread, client: Client) -> None:
    with AdminClient(server.admin_address) as admin:
        status = admin.status()
    assert (status.generation, status.num_tasks) == (1, 5)
    assert status.uptime_seconds > 0
    assert status.last_reload is not None
    assert status.last_reload.error == ""
    assert status.engine.startswith("embedded")
    by_name = {segment.name: segment for segment in status.segments}
    assert by_name[client.get_task("digits").route[1]].tasks == ("digits", "greek", "large", "short")
    assert by_name[client.get_task("digits").route[1]].num_parameters == 3 * 64 + 2 * 256


def test_the_async_client_answers_alike(server: ServerThread, client: Client) -> None:
    async def ask() -> list[bytes]:
        async with AsyncClient(server.address) as asynchronous:
            assert (await asynchronous.list_tasks()) == client.list_tasks()
            assert (await asynchronous.get_task("digits")) == client.get_task("digits")
            several = [asynchronous.classify("digits", PIXELS, include_logits=True) for _ in range(50)]
            results = await asyncio.gather(*several)
            return [result.classifications[0].logits.tobytes() for result in results]

    found = set(asyncio.run(ask()))
    assert found == {client.classify("digits", PIXELS, include_logits=True).classifications[0].logits.tobytes()}


@pytest.mark.parametrize("address", ["address", "admin_address"])
def test_reflection(server: ServerThread, address: str) -> None:
    with grpc.insecure_channel(getattr(server, address)) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        questions = {"munet.v1.InferenceService", "inference.GRPCInferenceService"}
        own = questions if address == "address" else {"munet.v1.AdminService"}
        assert services == own | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        pool = descriptor_pool.DescriptorPool(database)
        assert all(pool.FindServiceByName(service).methods for service in own)


def test_administration_is_not_on_the_public_address(server: ServerThread) -> None:
    from server.errors import CallRefusedError

    with AdminClient(server.address) as admin, pytest.raises(CallRefusedError, match="UNIMPLEMENTED"):
        admin.reload()
