"""ONNX Runtime sessions: one for each segment, all on one thread pool and one memory arena of the host."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import Message
from onnx import TensorProto, helper

from munet.runtime import onnxruntime
from server.embedded.allocator import prepare_allocator
from server.errors import DeviceError, SegmentLoadError, SettingsError
from server.generation import Segment, TensorSpec, shapes_agree

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's name for each device."""

PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    "cpu": {},
    "cuda": {
        "device_id": "0",
        # TF32 rounds to ten bits: too coarse for float32 logits.
        "use_tf32": "0",
        # Otherwise each new batch size is answered by trying every convolution there is, and the winner may be another next time.
        "cudnn_conv_algo_search": "HEURISTIC",
        # Each session has an arena of its own on the device, and a segment may be small: none grows by doubling.
        "arena_extend_strategy": "kSameAsRequested",
        # Before ONNX Runtime 1.28 a fused norm of float16 added up squares in float16; later ones always add in float32 and pass this over.
        "enable_skip_layer_norm_strict_mode": "1",
    },
}
"""How each device computes. Two runs of a session may share its arena: the default streams of ONNX Runtime keep them apart."""

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
            prepare_allocator()
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
        device: a key of `PROVIDERS`; `prepare_device` comes first.
        is_inspected: whether this very segment was loaded before: then its checksum alone says that nothing is wrong inside.

    Attributes:
        segment: what was loaded.
        session: the onnxruntime.InferenceSession.

    Raises:
        SegmentLoadError: ONNX Runtime refuses the model, it is not what the generation says, names other files, or did not get the
            device.
    """

    def __init__(self, segment: Segment, device: str = "cpu", *, is_inspected: bool = False) -> None:
        self.segment = segment
        content = _read_model(segment)
        if not is_inspected:
            _inspect(segment, content)
        provider = PROVIDERS[device]
        try:
            # Of the bytes that were looked at: the file may be another by now.
            session = open_session(content, device)
        except Exception as error:
            # The edge to ONNX Runtime, whose errors share no class but Exception.
            raise SegmentLoadError(segment.name, str(error)[:500]) from error
        if session.get_providers()[0] != provider:
            raise SegmentLoadError(segment.name, f"providers {session.get_providers()}", f"{provider}, for device {device!r}")
        _check_tensors(segment.name, "input", session.get_inputs(), segment.input)
        _check_tensors(segment.name, "output", session.get_outputs(), segment.output)
        self.session = session
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
        answer: npt.NDArray[Any] = self.session.run(self._outputs, {self.segment.input.name: rows})[0]
        self.check_answer(answer.shape, len(rows))
        return answer

    def check_answer(self, shape: tuple[int, ...], num_rows: int) -> None:
        """Checks the shape of an answer to so many rows.

        Raises:
            ValueError: it is not what the segment's output says.
        """
        if not shapes_agree(shape, (num_rows, *self.segment.output.shape)):
            raise ValueError(f"found output {list(shape)}, expected {num_rows} rows of {self.segment.output}")


def open_session(model: bytes, device: str) -> Any:
    """Returns an onnxruntime.InferenceSession of a model. Whether it got the device is to be asked of it.

    Raises:
        Exception: whatever ONNX Runtime raises; its errors share no other class.
    """
    session = onnxruntime.InferenceSession(
        model, _session_options(), providers=[PROVIDERS[device]], provider_options=[PROVIDER_OPTIONS[device]]
    )
    # It would keep the bytes, beside the weights it made of them, to begin anew on another device when one fails, which nobody wants here.
    session.disable_fallback()
    session._model_bytes = None
    return session


def prepare_device(device: str) -> None:
    """Makes ONNX Runtime ready for a device, before the first session there, and makes sure that it can use it.

    Args:
        device: a key of `PROVIDERS`.

    Raises:
        DeviceError: it cannot. ONNX Runtime by itself would compute on the CPU and say so in its log at most.
    """
    if device == "cpu":
        return
    provider = PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise DeviceError(device, f"{onnxruntime.__name__} {onnxruntime.__version__} built for {_available()}", provider)
    said = io.StringIO()
    # It prints what it misses, and standard output is where scripts look for the server's address.
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    try:
        session = open_session(probe_model(), device)
        found = session.get_providers()
        if found[0] == provider:
            _run_probe(session, device)
            return
        reason = f"sessions on {', '.join(found)}"
    except Exception as error:
        # The edge to ONNX Runtime, whose errors share no class but Exception.
        reason = str(error)[:500]
    missing = "; ".join(said.getvalue().split("\n")[:3]).strip("; ")
    raise DeviceError(device, f"{reason} ({missing})" if missing else reason, provider)


def _available() -> str:
    return ", ".join(onnxruntime.get_available_providers())


def probe_model() -> bytes:
    """Returns the smallest ONNX model that shows whether a device computes: y = x + x, float32 [n]."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "probe", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def _run_probe(session: Any, device: str) -> None:
    """Computes on a device as a carrier does: up, there, down.

    Raises:
        ValueError: the answer is wrong.
        Exception: whatever ONNX Runtime raises.
    """
    given = np.arange(4, dtype=np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input("x", given)
    binding.synchronize_inputs()
    binding.bind_output("y", device, 0)
    session.run_with_iobinding(binding)
    found = binding.copy_outputs_to_cpu()[0]
    if not np.array_equal(found, given * 2):
        raise ValueError(f"a wrong answer of the device, {found}")


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


def _read_model(segment: Segment) -> bytes:
    """Returns a segment's ONNX file, which is as published.

    Raises:
        SegmentLoadError: it is not.
    """
    try:
        content = segment.model.read_bytes()
    except OSError as error:
        raise SegmentLoadError(segment.name, error.strerror or str(error)) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != segment.sha256:
        raise SegmentLoadError(segment.name, f"sha256 {digest}", f"sha256 {segment.sha256}, as published")
    return content


def _inspect(segment: Segment, content: bytes) -> None:
    """Makes sure that an ONNX file names no other file.

    Raises:
        SegmentLoadError: it does, or is none.
    """
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:
        # The edge to a parser of untrusted bytes, whose errors share no class but Exception.
        raise SegmentLoadError(segment.name, str(error)[:500]) from error
    # ONNX Runtime would read whatever file the model names, inside the repository or not.
    outside = list(_references(model))
    if outside:
        found = f"{len(outside)} references to what is outside the file, such as {outside[0][:80]!r}"
        raise SegmentLoadError(segment.name, found, "an ONNX model with its weights inside")


def _references(message: Message) -> Iterator[str]:
    """Yields the name of whatever refers to another file, anywhere in a model: in graphs within graphs, functions, training."""
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            yield message.name
        return
    if isinstance(message, onnx.NodeProto) and message.op_type == "EPContext":
        yield message.name
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if isinstance(value, Message) else value:
                yield from _references(inner)


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
