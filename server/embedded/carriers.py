"""Carriers: how rows get from segment to segment, on the host as numpy arrays or on a device as ONNX Runtime's own values.

The engine holds `Values` and never looks into them; a carrier gathers those of a batch and runs a segment on them. On a device only images
go up and only logits come down: what stands between is gathered there, from slices bound by address, by small concatenations.

Why no reader can be early: a run ends with a synchronisation of its session's streams (ONNX Runtime's default, which nothing here
switches off), so hidden states are complete before any other thread learns of them; images that go up are waited for before the run that
reads them; and whoever runs holds on to what it reads until the run is over.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from onnx import OperatorSetIdProto, helper

from server.embedded.sessions import SegmentSession, open_session

ALIGNMENT_BYTES = 16
"""What a segment reads begins at a multiple of this: kernels may load 16 bytes at a time. Slices of the models in use all do."""

_CONCATENATED = "all"


@dataclasses.dataclass(frozen=True, slots=True)
class Transfers:
    """What has crossed between host and device since the engine was made; nothing on a CPU.

    Attributes:
        copies_up: copies from the host to the device.
        bytes_up: what they came to.
        copies_down: copies from the device to the host.
        bytes_down: what they came to.
    """

    copies_up: int = 0
    bytes_up: int = 0
    copies_down: int = 0
    bytes_down: int = 0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DeviceRows:
    """Consecutive rows of a value on a device. Slices share the value's memory and keep it.

    Attributes:
        value: the OrtValue, [rows, ...].
        data_type: of its elements.
        shape: of these rows, [rows, ...].
        first: index of the first of them within the value.
    """

    value: Any
    data_type: np.dtype[Any]
    shape: tuple[int, ...]
    first: int = 0

    @property
    def nbytes(self) -> int:
        """Their size, in bytes, as numpy's arrays give theirs."""
        return self.data_type.itemsize * int(np.prod(self.shape, dtype=np.int64))

    @property
    def address(self) -> int:
        """Where the first row begins, on the device."""
        row_bytes = self.data_type.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        return int(self.value.data_ptr()) + self.first * row_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceRows:
        """Returns some of the rows; the step must be 1."""
        start, stop, _ = rows.indices(len(self))
        return DeviceRows(self.value, self.data_type, (max(0, stop - start), *self.shape[1:]), self.first + start)


Values = npt.NDArray[Any] | DeviceRows
"""Rows, [rows, ...]: images, hidden states or logits."""


class Carrier(Protocol):
    """Runs segments on rows. `run` and `transfers` may be called from several threads at once.

    Attributes:
        device: what the sessions it runs must be on, a key of `server.embedded.sessions.PROVIDERS`.
    """

    device: str

    def run(self, session: SegmentSession, pieces: Sequence[Values], to_host: bool) -> Values:
        """Gathers a batch and runs a segment on it.

        Args:
            session: the segment.
            pieces: one or more [rows, ...] of one type and row shape, in the order of the answer.
            to_host: whether the answer is wanted as an array.

        Returns:
            [rows, ...], as the segment's output says.

        Raises:
            Exception: whatever ONNX Runtime raises; its errors share no other class.
            ValueError: the answer is not what the segment's output says.
        """
        ...

    def transfers(self) -> Transfers:
        """Returns what has crossed between host and device."""
        ...

    def close(self) -> None:
        """Frees what it holds; nothing runs any more."""
        ...


class HostCarrier:
    """Numpy arrays, which ONNX Runtime's CPU provider reads where they are."""

    device = "cpu"

    def run(self, session: SegmentSession, pieces: Sequence[Values], to_host: bool) -> Values:
        """Gathers a batch and runs a segment on it. See `Carrier.run`."""
        rows: Any = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)  # type: ignore[arg-type]
        return session.run(rows)

    def transfers(self) -> Transfers:
        """Returns zeros: nothing ever leaves the host."""
        return Transfers()

    def close(self) -> None:
        """Does nothing: it holds nothing."""


class DeviceCarrier:
    """OrtValues on a device, bound to sessions by address.

    It also works for device "cpu", where its copies up and down copy nothing: that is how its logic is tested without a device.

    Args:
        device: a key of `server.embedded.sessions.PROVIDERS`.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._transfers = Transfers()
        self._concatenations: dict[tuple[int, np.dtype[Any], int], Any] = {}

    def run(self, session: SegmentSession, pieces: Sequence[Values], to_host: bool) -> Values:
        """Gathers a batch and runs a segment on it. See `Carrier.run`."""
        rows = self._gather(pieces)
        answer = self._run(session.session, {session.segment.input.name: rows}, session.segment.output.name, to_host)
        session.check_answer(answer.shape, len(rows))
        return answer

    def transfers(self) -> Transfers:
        """Returns what has crossed between host and device, or would have if the device is the host."""
        with self._lock:
            return self._transfers

    def close(self) -> None:
        """Frees the sessions that put rows together."""
        with self._opening:
            self._concatenations.clear()

    def _gather(self, pieces: Sequence[Values]) -> Values:
        arrays = [piece for piece in pieces if isinstance(piece, np.ndarray)]
        if len(arrays) == len(pieces):
            # Images: put together on the host, so that they go up in one copy.
            return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        runs = join_neighbours(pieces)
        if len(runs) == 1 and isinstance(runs[0], DeviceRows) and runs[0].address % ALIGNMENT_BYTES == 0:
            return runs[0]
        return self._concatenate(runs)

    def _concatenate(self, pieces: Sequence[Values]) -> Values:
        data_type = next(piece.data_type for piece in pieces if isinstance(piece, DeviceRows))
        key = (len(pieces), data_type, len(pieces[0].shape))
        with self._opening:
            session = self._concatenations.get(key)
            if session is None:
                session = self._concatenations[key] = open_session(concatenation(*key), self.device)
        return self._run(session, {f"piece_{index}": piece for index, piece in enumerate(pieces)}, _CONCATENATED, False)

    def _run(self, session: Any, inputs: Mapping[str, Values], output: str, to_host: bool) -> Values:
        binding = session.io_binding()
        bytes_up = copies_up = 0
        for name, rows in inputs.items():
            if isinstance(rows, DeviceRows):
                # A binding by address keeps nothing alive: `inputs` does, until the run is over.
                binding.bind_input(name, self.device, 0, rows.data_type.type, rows.shape, rows.address)
            else:
                array = np.ascontiguousarray(rows)
                binding.bind_cpu_input(name, array)
                copies_up, bytes_up = copies_up + 1, bytes_up + array.nbytes
        if copies_up:
            # Binding may only have queued the copy.
            binding.synchronize_inputs()
        binding.bind_output(output, "cpu" if to_host else self.device, 0)
        session.run_with_iobinding(binding)
        # The answer keeps the binding, and that would keep the images that went up.
        binding.clear_binding_inputs()
        value = binding.get_outputs()[0]
        answer: Values
        if to_host:
            array = value.numpy()
            answer = array
            self._count(copies_up, bytes_up, 1, array.nbytes)
        else:
            answer = DeviceRows(value, _ELEMENT_TYPES[value.data_type()], tuple(value.shape()))
            self._count(copies_up, bytes_up, 0, 0)
        return answer

    def _count(self, copies_up: int, bytes_up: int, copies_down: int, bytes_down: int) -> None:
        if copies_up or copies_down:
            with self._lock:
                before = self._transfers
                self._transfers = Transfers(
                    before.copies_up + copies_up,
                    before.bytes_up + bytes_up,
                    before.copies_down + copies_down,
                    before.bytes_down + bytes_down,
                )


_ELEMENT_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


def carrier_of(device: str) -> Carrier:
    """Returns the carrier that suits a device: arrays on a CPU, whose memory is the host's, else OrtValues."""
    return HostCarrier() if device == "cpu" else DeviceCarrier(device)


def join_neighbours(pieces: Sequence[Values]) -> list[Values]:
    """Returns the same rows in the same order, slices that follow each other within one value as one slice."""
    joined: list[Values] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            isinstance(piece, DeviceRows)
            and isinstance(last, DeviceRows)
            and last.value is piece.value
            and last.first + len(last) == piece.first
        ):
            joined[-1] = DeviceRows(last.value, last.data_type, (len(last) + len(piece), *last.shape[1:]), last.first)
        else:
            joined.append(piece)
    return joined


def concatenation(num_pieces: int, data_type: np.dtype[Any], rank: int) -> bytes:
    """Returns an ONNX model that puts rows together.

    Args:
        num_pieces: inputs, `piece_0` and so on.
        data_type: of their elements.
        rank: their number of axes, rows included.
    """
    element = helper.np_dtype_to_tensor_dtype(data_type)
    inner = [f"axis_{axis}" for axis in range(1, rank)]
    names = [f"piece_{index}" for index in range(num_pieces)]
    graph = helper.make_graph(
        [helper.make_node("Concat", names, [_CONCATENATED], axis=0)],
        "concatenation",
        [helper.make_tensor_value_info(name, element, [f"rows_of_{name}", *inner]) for name in names],
        [helper.make_tensor_value_info(_CONCATENATED, element, ["rows", *inner])],
    )
    # The versions of the segments themselves, which every ONNX Runtime that serves them knows.
    model = helper.make_model(graph, opset_imports=[OperatorSetIdProto(domain="", version=20)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content
