"""Callers of a soak: they ask in every way that there is, and compare every answer.

    python -m benchmarks.soak_load HOST:PORT TASK IMAGE_SIZE

asks for as long as it lives, says so on a line once it was answered, and waits to be killed.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import io
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from munet.v1 import inference_pb2, inference_pb2_grpc

TOLERANCE = 1e-4
TIMEOUT_SECONDS = 30
NUM_EXAMPLES = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """What may be asked, and what is true.

    Attributes:
        task: whom.
        index: of the image.
        image: [size, size, 3] uint8.
        logits: [classes] float32, by the number of the generation.
    """

    task: str
    index: int
    image: npt.NDArray[np.uint8]
    logits: Mapping[int, npt.NDArray[np.float32]]

    @property
    def raw(self) -> inference_pb2.Image:
        """The image as pixels."""
        height, width, channels = self.image.shape
        return inference_pb2.Image(
            raw=inference_pb2.RawImage(height=height, width=width, channels=channels, data=self.image.tobytes())
        )

    def encoded(self, image_format: str) -> bytes:
        """Returns the image as a file that loses nothing."""
        file = io.BytesIO()
        Image.fromarray(self.image).save(file, image_format)
        return file.getvalue()


class Tally:
    """What came of all calls.

    Attributes:
        num_answers: that were compared.
        num_wrong: that are not what their generation answers, or not bit for bit what was answered before.
        num_unexpected: calls that ended otherwise than they may.
        examples: the first of what was wrong or unexpected, in words.
    """

    def __init__(self) -> None:
        self.num_answers = 0
        self.num_wrong = 0
        self.num_unexpected = 0
        self.examples: list[str] = []
        self._endings: collections.Counter[str] = collections.Counter()
        self._faults: collections.Counter[str] = collections.Counter()
        self._first: dict[tuple[str, int, bytes], bytes] = {}

    def compare(self, question: Question, generation: int, logits: npt.NDArray[np.float32]) -> None:
        """Counts an answer, and whether it is right."""
        self.num_answers += 1
        true = question.logits.get(generation)
        if true is None or true.shape != logits.shape or not np.abs(true - logits).max() <= TOLERANCE:
            self.num_wrong += 1
            self._note(f"wrong: {question.task}, image {question.index}, generation {generation}: {logits[:3]}")
            return
        # What is true is the same array of numbers in every generation that answers alike.
        key = (question.task, question.index, true.tobytes())
        if self._first.setdefault(key, logits.tobytes()) != logits.tobytes():
            self.num_wrong += 1
            self._note(f"other bits: {question.task}, image {question.index}, generation {generation}")

    def ended(self, what: str, status: str, words: str, may: Sequence[str]) -> None:
        """Counts how a call ended.

        Args:
            what: was asked.
            status: of gRPC.
            words: that came with it.
            may: the statuses that it may end with.
        """
        self._endings[status] += 1
        if status not in may:
            self.num_unexpected += 1
            self._note(f"unexpected: {what}: {status} {words[:300]}")

    def did(self, fault: str) -> None:
        """Counts a fault."""
        self._faults[fault] += 1

    def unexpected(self, words: str) -> None:
        """Counts what is no call and should not be."""
        self.num_unexpected += 1
        self._note(f"unexpected: {words[:300]}")

    def shown(self) -> dict[str, Any]:
        """Returns what was counted, as JSON values."""
        return {
            "answers": self.num_answers,
            "wrong": self.num_wrong,
            "unexpected": self.num_unexpected,
            "statuses": dict(self._endings),
            "faults": dict(self._faults),
        }

    def _note(self, words: str) -> None:
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(words)


class Callers:
    """Well-behaved callers.

    Args:
        address: of the server.
        questions: what they may ask.
        tally: where answers are compared and counted.
        chance: what they draw from.
        pause_seconds: between two questions of one of them, at most.
    """

    def __init__(
        self, address: str, questions: Sequence[Question], tally: Tally, chance: random.Random, pause_seconds: float
    ) -> None:
        self._address = address
        self._tally = tally
        self._chance = chance
        self._pause_seconds = pause_seconds
        self._by_task: dict[str, list[Question]] = {}
        for question in questions:
            self._by_task.setdefault(question.task, []).append(question)

    async def ask(self, count: int, stop: asyncio.Event) -> None:
        """Has so many of them ask until they are told to stop."""
        await asyncio.gather(*(self._ask(stop) for _ in range(count)))

    async def _ask(self, stop: asyncio.Event) -> None:
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(self._address, options) as channel:
            while not stop.is_set():
                ask = self._chance.choice([self._one_task, self._one_task, self._all_tasks, self._tensor, self._stream])
                try:
                    await ask(channel)
                    self._tally.ended("a question", "OK", "", ["OK"])
                except grpc.aio.AioRpcError as error:
                    self._tally.ended(ask.__name__, error.code().name, error.details() or "", ["OK"])
                await asyncio.sleep(self._chance.random() * self._pause_seconds)

    async def _one_task(self, channel: grpc.aio.Channel) -> None:
        task = self._chance.choice(list(self._by_task))
        questions = self._chance.choices(self._by_task[task], k=self._chance.choice([1, 1, 2, 5]))
        request = inference_pb2.ClassifyRequest(task=task, images=[self._sent(one) for one in questions], include_logits=True)
        answer = await inference_pb2_grpc.InferenceServiceStub(channel).Classify(request, timeout=TIMEOUT_SECONDS)
        for question, found in zip(questions, answer.classifications, strict=True):
            self._tally.compare(question, answer.generation, np.array(found.logits, np.float32))

    async def _all_tasks(self, channel: grpc.aio.Channel) -> None:
        index = self._chance.randrange(len(self._by_task["steady"]))
        questions = [questions[index] for questions in self._by_task.values()]
        request = inference_pb2.ClassifyTasksRequest(
            image=self._sent(questions[0]), tasks=list(self._by_task), include_logits=True
        )
        answer = await inference_pb2_grpc.InferenceServiceStub(channel).ClassifyTasks(request, timeout=TIMEOUT_SECONDS)
        for question, found in zip(questions, answer.tasks, strict=True):
            self._tally.compare(question, answer.generation, np.array(found.classification.logits, np.float32))

    async def _tensor(self, channel: grpc.aio.Channel) -> None:
        questions = self._chance.choices(self._chance.choice(list(self._by_task.values())), k=2)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._compare_tensor(questions, await stub.ModelInfer(tensor(questions), timeout=TIMEOUT_SECONDS))

    async def _stream(self, channel: grpc.aio.Channel) -> None:
        asked = [self._chance.choices(self._chance.choice(list(self._by_task.values())), k=1) for _ in range(10)]
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answers = [answer async for answer in stub.ModelStreamInfer(map(tensor, asked), timeout=TIMEOUT_SECONDS)]
        for questions, answer in zip(asked, answers, strict=True):
            if answer.error_message:
                self._tally.unexpected(f"a message of a stream: {answer.error_message}")
            else:
                self._compare_tensor(questions, answer.infer_response)

    def _compare_tensor(self, questions: Sequence[Question], answer: Any) -> None:
        rows = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(len(questions), -1)
        for question, logits in zip(questions, rows, strict=True):
            self._tally.compare(question, int(answer.model_version), logits)

    def _sent(self, question: Question) -> inference_pb2.Image:
        image_format = self._chance.choice(["", "PNG", "BMP"])
        return inference_pb2.Image(encoded=question.encoded(image_format)) if image_format else question.raw


def tensor(questions: Sequence[Question]) -> Any:
    """Returns questions to one task as a ModelInferRequest."""
    pixels = np.stack([question.image for question in questions])
    request = service_pb2.ModelInferRequest(model_name=questions[0].task, raw_input_contents=[pixels.tobytes()])
    request.inputs.add(name="image", datatype="UINT8", shape=pixels.shape)
    request.outputs.add(name="logits")
    return request


def main() -> None:
    """Asks until it is killed."""
    address, task, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    question = Question(task, 0, np.zeros((size, size, 3), np.uint8), {})
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while True:
            calls = [stub.ModelInfer.future(tensor([question] * 4), timeout=TIMEOUT_SECONDS) for _ in range(20)]
            streams = [stub.ModelStreamInfer(iter([tensor([question])] * 20), timeout=TIMEOUT_SECONDS) for _ in range(4)]
            calls[0].result()
            print("asking", flush=True)
            for stream in streams:
                collections.deque(stream, maxlen=0)


if __name__ == "__main__":
    main()
