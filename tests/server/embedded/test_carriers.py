from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from munet.runtime import onnxruntime
from server.embedded.carriers import ALIGNMENT_BYTES, DeviceCarrier, DeviceRows, HostCarrier, Transfers, join_neighbours
from server.embedded.engine import EmbeddedEngine
from server.embedded.sessions import SegmentSession, open_session
from server.engine import Question
from server.generation import Generation
from server.repository import Repository
from tests.support.repository import WIDTH, RepositoryBuilder, random_images
from tests.support.serving import ENGINE


@pytest.fixture
def generation(tmp_path: pathlib.Path) -> Generation:
    RepositoryBuilder(tmp_path).publish()
    return Repository(tmp_path).read()


@pytest.fixture
def block(generation: Generation) -> SegmentSession:
    return SegmentSession(generation.segments[generation.tasks["digits"].route[1]])


class RecordingSession:
    """Stands for a segment: keeps what it is given."""

    given: Any = None

    def run(self, rows: Any) -> Any:
        self.given = rows
        return rows


def device_rows(array: np.ndarray) -> DeviceRows:
    return DeviceRows(onnxruntime.OrtValue.ortvalue_from_numpy(array, "cpu", 0), array.dtype, array.shape)


def hidden(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4, WIDTH)).astype(np.float32)


def test_on_the_host_what_lies_together_is_not_copied() -> None:
    session: Any = RecordingSession()
    values = np.arange(12).reshape(4, 3)
    HostCarrier().run(session, [values[1:3]], False)
    assert np.shares_memory(session.given, values)
    HostCarrier().run(session, [values[3:], values[1:3]], False)
    assert session.given.tolist() == [[9, 10, 11], [3, 4, 5], [6, 7, 8]]


def test_slices_of_device_rows_are_at_their_rows_addresses() -> None:
    rows = device_rows(hidden(5, 0))
    part = rows[1:4][1:]
    assert (len(part), part.shape, part.first) == (2, (2, 4, WIDTH), 2)
    assert part.address - rows.address == 2 * 4 * WIDTH * 4
    assert len(rows[3:9]) == 2
    assert len(rows[4:2]) == 0


def test_neighbours_become_one_slice_and_nothing_else_does() -> None:
    one, other = device_rows(hidden(6, 0)), device_rows(hidden(6, 1))
    pieces = [one[0:1], one[1:3], one[4:5], other[5:6], one[5:6], one[3:4]]
    joined = join_neighbours(pieces)
    assert [(rows.value is one.value, rows.first, len(rows)) for rows in joined if isinstance(rows, DeviceRows)] == [
        (True, 0, 3),
        (True, 4, 1),
        (False, 5, 1),
        (True, 5, 1),
        (True, 3, 1),
    ]


def test_rows_of_several_histories_are_gathered_in_order(block: SegmentSession) -> None:
    carrier = DeviceCarrier("cpu")
    first, second = hidden(4, 0), hidden(3, 1)
    values = device_rows(first), device_rows(second)
    for _ in range(2):
        answer = carrier.run(block, [values[1][2:3], values[0][0:2], values[1][0:1]], True)
        expected = block.run(np.concatenate([second[2:3], first[0:2], second[0:1]]))
        assert isinstance(answer, np.ndarray)
        np.testing.assert_array_equal(answer, expected)
    # Nothing but the two answers came down, and nothing went up.
    assert carrier.transfers() == Transfers(0, 0, 2, 2 * 4 * 4 * WIDTH * 4)


def test_what_stays_on_the_device_is_not_counted_and_can_be_read_on(block: SegmentSession) -> None:
    carrier = DeviceCarrier("cpu")
    rows = hidden(4, 0)
    once = carrier.run(block, [device_rows(rows)], False)
    assert isinstance(once, DeviceRows)
    assert carrier.transfers() == Transfers()
    twice = carrier.run(block, [once[1:3]], True)
    assert isinstance(twice, np.ndarray)
    np.testing.assert_array_equal(twice, block.run(block.run(rows)[1:3]))


def test_arrays_beside_device_values_go_up_one_by_one(block: SegmentSession) -> None:
    carrier = DeviceCarrier("cpu")
    rows = hidden(3, 0)
    answer = carrier.run(block, [device_rows(rows)[0:1], rows[1:3]], True)
    assert isinstance(answer, np.ndarray)
    np.testing.assert_array_equal(answer, block.run(rows))
    assert carrier.transfers().copies_up == 1
    assert carrier.transfers().bytes_up == rows[1:3].nbytes


@pytest.mark.parametrize("data_type", [np.float16, np.float32, np.uint8])
def test_misaligned_rows_are_moved_to_where_kernels_may_read(data_type: type) -> None:
    carrier = DeviceCarrier("cpu")
    rows = device_rows(np.arange(30).reshape(10, 3).astype(data_type))
    moved = carrier._gather([rows[1:5]])
    assert isinstance(moved, DeviceRows)
    assert rows[1:5].address % ALIGNMENT_BYTES
    assert moved.address % ALIGNMENT_BYTES == 0
    assert moved.value is not rows.value
    np.testing.assert_array_equal(moved.value.numpy(), np.arange(3, 15).reshape(4, 3).astype(data_type))
    assert moved.data_type == np.dtype(data_type)


def test_an_output_of_another_shape_fails_the_run(block: SegmentSession) -> None:
    block.segment = dataclasses.replace(block.segment, output=dataclasses.replace(block.segment.output, shape=(5, WIDTH)))
    with pytest.raises(ValueError, match="found output"):
        DeviceCarrier("cpu").run(block, [device_rows(hidden(2, 0))], True)


def test_only_images_go_up_and_only_logits_come_down(generation: Generation) -> None:
    carrier = DeviceCarrier("cpu")
    engine = EmbeddedEngine(ENGINE, carrier=carrier)
    engine.load(generation)
    assert set(engine.providers().values()) == {"CPUExecutionProvider"}
    assert engine.providers().keys() == generation.segments.keys()
    tasks = ("digits", "greek", "hebrew", "short")
    images = random_images(3, 8)
    futures = [engine.answer(Question(generation, images, tasks)) for _ in range(40)]
    num_bytes = sum(sum(logits.nbytes for logits in future.result().values()) for future in futures)
    crossed = engine.transfers()
    assert crossed.bytes_up == 40 * images.nbytes
    assert crossed.bytes_down == num_bytes
    executions = {segment.name: segment.executions for segment in engine.statistics()}
    assert crossed.copies_up == executions[generation.tasks["digits"].route[0]]
    assert crossed.copies_down == sum(executions[generation.tasks[task].route[-1]] for task in tasks)
    engine.close()


def test_on_the_host_nothing_crosses(generation: Generation) -> None:
    engine = EmbeddedEngine(ENGINE)
    engine.load(generation)
    engine.answer(Question(generation, random_images(3, 8), ("digits",))).result()
    assert engine.transfers() == Transfers()
    engine.close()


def test_concatenations_are_made_once(block: SegmentSession, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr("server.embedded.carriers.open_session", lambda *args: opened.append(args) or open_session(*args))
    carrier = DeviceCarrier("cpu")
    rows = device_rows(hidden(9, 0))
    for count in (2, 3, 2, 3, 3):
        carrier.run(block, [rows[2 * index : 2 * index + 1] for index in range(count)], False)
    assert len(opened) == 2
