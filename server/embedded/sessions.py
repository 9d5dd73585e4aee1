"""ONNX Runtime sessions: one for each segment, all on one thread pool and one memory arena."""

from __future__ import annotations

import pathlib
import threading
from typing import Any

import numpy.typing as npt
import onnx
import onnxruntime

from server.errors import SegmentLoadError, SettingsError
from server.generation import Segment, TensorSpec, shapes_agree

PROVIDERS = {"cpu": "CPUExecutionProvider"}
"""ONNX Runtime's name for each device."""

_NUMPY_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(float16)": "float16"}


class _Process:
    """What ONNX Runtime has once in a process: set by the first engine that wants it, then for good."""

    lock = threading.Lock()
    pool_threads: int | None = None
    has_arena = False


def prepare_process(threads: int) -> None:
    """Sets up what all sessions of this process share.

    With one thread, sessions compute on the thread that calls them and need no pool. (ONNX Runtime refuses sessions with pools of
    their own once a global pool is there, so a process that makes both kinds stays at one thread.)

    Args:
        threads: of the one thread pool, the calling thread included; at least 1.

    Raises:
        SettingsError: the process has a pool of another size already.
    """
    with _Process.lock:
        if not _Process.has_arena:
            memory = onnxruntime.OrtMemoryInfo(
                "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
            )
            # Its arguments: no limit, and ONNX Runtime's own choice of how to extend it, of its first and its largest unused chunk.
            onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(0, -1, -1, -1))
            _Process.has_arena = True
        if _Process.pool_threads is None and threads > 1:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            _Process.pool_threads = threads
        elif _Process.pool_threads is not None and threads > 1 and threads != _Process.pool_threads:
            raise SettingsError("engine.threads", threads, f"{_Process.pool_threads}, which this process has already")


class SegmentSession:
    """A loaded segment.

    `run` may be called from several threads at once.

    Args:
        segment: what to load.
        device: a key of `PROVIDERS`.

    Raises:
        SegmentLoadError: ONNX Runtime refuses the model, it is not what the generation says, keeps weights outside its file, or did
            not get the device.
    """

    def __init__(self, segment: Segment, device: str = "cpu") -> None:
        self.segment = segment
        # ONNX Runtime would read whatever file the model names, inside the repository or not.
        _refuse_external_data(segment.name, segment.model)
        provider = PROVIDERS[device]
        try:
            session = onnxruntime.InferenceSession(str(segment.model), _session_options(), providers=[provider])
        except Exception as error:
            # The edge to ONNX Runtime, whose errors share no class but Exception.
            raise SegmentLoadError(segment.name, str(error)[:500]) from error
        if session.get_providers()[0] != provider:
            raise SegmentLoadError(segment.name, f"providers {session.get_providers()}", f"{provider}, for device {device!r}")
        _check_tensors(segment.name, "input", session.get_inputs(), segment.input)
        _check_tensors(segment.name, "output", session.get_outputs(), segment.output)
        self._session = session
        self._outputs = [segment.output.name]

    def run(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Runs a batch.

        Args:
            rows: [rows, ...], as the segment's input says.

        Returns:
            [rows, ...], as the segment's output says.

        Raises:
            Exception: whatever ONNX Runtime raises; its errors share no other class.
            ValueError: the answer is not what the segment's output says.
        """
        answer: npt.NDArray[Any] = self._session.run(self._outputs, {self.segment.input.name: rows})[0]
        if not shapes_agree(answer.shape, (len(rows), *self.segment.output.shape)):
            raise ValueError(f"found output {list(answer.shape)}, expected {len(rows)} rows of {self.segment.output}")
        return answer


def _session_options() -> Any:
    options = onnxruntime.SessionOptions()
    if _Process.pool_threads is None:
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
    else:
        options.use_per_session_threads = False
    options.log_severity_level = 3
    # One arena for all sessions: a hundred segments would otherwise hold a hundred arenas. Weights stay outside it, so that unloading a
    # segment gives their memory back.
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


def _refuse_external_data(name: str, path: pathlib.Path) -> None:
    expected = "an ONNX model with its weights inside"
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        # The edge to a parser of untrusted bytes, whose errors share no class but Exception.
        raise SegmentLoadError(name, str(error)[:500]) from error
    outside = [tensor.name for tensor in _tensors(model.graph) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise SegmentLoadError(name, f"{len(outside)} tensors outside the file, such as {outside[0]!r}", expected)


def _tensors(graph: Any) -> list[Any]:
    tensors = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        tensors += [sparse.values, sparse.indices]
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    tensors += _tensors(inner)
    return tensors


def _check_tensors(name: str, kind: str, found: Any, expected: TensorSpec) -> None:
    tensors = [(tensor.name, _NUMPY_TYPES.get(tensor.type, tensor.type), _shape(tensor.shape)) for tensor in found]
    if (
        len(tensors) != 1
        or tensors[0][:2] != (expected.name, expected.data_type)
        or len(tensors[0][2]) < 1
        or tensors[0][2][0] != -1
        or not shapes_agree(tensors[0][2][1:], expected.shape)
    ):
        raise SegmentLoadError(name, f"{kind} {tensors!r}", f"{expected.name!r}, {expected}, after a batch of any size")


def _shape(dims: Any) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else -1 for dim in dims)
