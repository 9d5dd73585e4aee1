"""A canary beside the stable generation, over real gRPC and in both protocols."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from server.client import AdminClient, Client
from server.errors import CallRefusedError
from tests.support.repository import DIGITS, GREEK, HEBREW, LARGE, RepositoryBuilder, answer, random_images
from tests.support.serving import serving, wait_until

IMAGE = random_images(1, 8)[0]


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish({"digits": DIGITS, "greek": GREEK})
    # Of another size: whoever prepares an image for the one generation must not ask the other.
    builder.publish({"digits": LARGE, "greek": GREEK}, current=False)
    return builder


def test_a_canary_is_asked_by_label(builder: RepositoryBuilder) -> None:
    with serving(builder.root) as server, Client(server.address) as client, AdminClient(server.admin_address) as admin:
        with pytest.raises(CallRefusedError, match="generation 1 serves alone"):
            client.classify("digits", IMAGE, label="canary")
        builder.set_canary(2, 25)
        wait_until(lambda: admin.status().canary is not None)
        assert client.classify("digits", IMAGE, label="canary").generation == 2
        assert client.classify_tasks(IMAGE, label="canary").generation == 2
        numbers = [client.classify("digits", IMAGE).generation for _ in range(8)]
        assert (numbers.count(1), numbers.count(2)) == (6, 2)
        assert {client.classify("greek", IMAGE).generation for _ in range(8)} == {1}
        assert {client.classify("digits", IMAGE, label="stable").generation for _ in range(8)} == {1}
        canary = admin.status().canary
        assert canary is not None
        assert (canary.generation, canary.percent, canary.refusal, canary.num_requests) == (2, 25, "", 4)
        # An answer is whole, of whichever generation it is.
        answer = client.classify("digits", IMAGE, label="canary")
        assert answer.path_id != client.get_task("digits").path_id


def test_the_open_inference_protocol_gives_a_canary_its_part_too(builder: RepositoryBuilder) -> None:
    pixels = {"1": random_images(2, 8), "2": random_images(2, 16)}

    def infer(version: str, size: str) -> tuple[str, np.ndarray]:
        image = triton.InferInput("image", list(pixels[size].shape), "UINT8")
        image.set_data_from_numpy(pixels[size])
        found = client.infer("digits", [image], model_version=version)
        return found.get_response().model_version, found.as_numpy("logits")

    builder.set_canary(2, 50)
    with serving(builder.root) as server, triton.InferenceServerClient(server.address) as client:
        for version, plan in (("1", DIGITS), ("2", LARGE)):
            number, logits = infer(version, version)
            assert number == version
            np.testing.assert_allclose(logits, answer(plan, pixels[version]), atol=1e-4)
        assert client.get_model_metadata("digits", "2", as_json=True)["inputs"][0]["shape"][1] == "16"
        assert [client.is_model_ready("digits", version) for version in ("", "1", "2", "3")] == [True, True, True, False]
        # Nothing of this is a request that the canary answers.
        assert client.get_model_config("digits", "2", as_json=True)["config"]["input"][0]["dims"] == ["16", "16", "3"]
        canary = server.server.reloader.canary
        assert canary is not None
        assert canary.num_requests == 1
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            infer("3", "1")
        # The canary takes other pixels than whoever asks without a version knows of.
        assert [infer("", "1")[0] for _ in range(4)] == ["1"] * 4
        builder.publish({"digits": HEBREW, "greek": GREEK}, current=False)
        builder.set_canary(3, 50)
        wait_until(lambda: {infer("", "1")[0] for _ in range(2)} == {"1", "3"})
        assert sorted(infer("", "1")[0] for _ in range(4)) == ["1", "1", "3", "3"]


def test_a_canary_that_answers_wrongly_is_refused_in_words(builder: RepositoryBuilder) -> None:
    builder.edit(2, lambda message: message.tasks[0].golden.logits.__setitem__(0, 99.0))
    builder.set_canary(2, 100)
    with serving(builder.root) as server, Client(server.address) as client, AdminClient(server.admin_address) as admin:
        canary = admin.status().canary
        assert canary is not None
        assert canary.refusal.startswith("generation 2 is refused: task 'digits': golden answer")
        assert {client.classify("digits", IMAGE).generation for _ in range(4)} == {1}
        # What is wrong with it is no business of whoever asks questions.
        with pytest.raises(CallRefusedError, match="generation 1 serves alone") as caught:
            client.classify("digits", IMAGE, label="canary")
        assert "golden" not in str(caught.value)
