from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import subprocess
import sys
import tracemalloc
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from munet.runtime import onnxruntime
from server.embedded.sessions import SegmentSession, open_session, prepare_device, probe_model
from server.errors import DeviceError, SegmentLoadError
from server.generation import Segment
from server.repository import Repository
from tests.support.repository import DIGITS, RepositoryBuilder, random_images


@pytest.fixture
def segment(tmp_path: pathlib.Path) -> Segment:
    RepositoryBuilder(tmp_path).publish({"digits": DIGITS})
    generation = Repository(tmp_path).read()
    return generation.segments[generation.tasks["digits"].route[0]]


def test_a_segment_runs(segment: Segment) -> None:
    assert SegmentSession(segment).run(random_images(3, 8)).shape == (3, 4, 8)


def rewritten(segment: Segment, content: bytes) -> Segment:
    """Returns the segment with another file, as if that had been published."""
    segment.model.write_bytes(content)
    return dataclasses.replace(segment, sha256=hashlib.sha256(content).hexdigest())


def test_the_file_is_not_kept_beside_the_weights(segment: Segment) -> None:
    model = onnx.load(segment.model)
    model.doc_string = "x" * 20_000_000
    large = rewritten(segment, model.SerializeToString())
    del model
    tracemalloc.start()
    try:
        session = SegmentSession(large)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert session.run(random_images(1, 8)).shape == (1, 4, 8)
    assert most > 20_000_000, "it was read"
    assert kept < 5_000_000


def test_bytes_that_are_no_model_are_refused(segment: Segment) -> None:
    for content in (b"", b"garbage" * 100, segment.model.read_bytes()[:500]):
        with pytest.raises(SegmentLoadError, match=segment.name):
            SegmentSession(rewritten(segment, content))


def test_a_file_that_is_no_longer_what_was_published_is_refused(segment: Segment) -> None:
    """Between the generation's checks and the loading of a segment its file may be replaced."""
    model = onnx.load(segment.model)
    model.doc_string = "as good as the other"
    segment.model.write_bytes(model.SerializeToString())
    with pytest.raises(SegmentLoadError, match=r"found sha256 .* expected sha256 .*, as published"):
        SegmentSession(segment)
    segment.model.unlink()
    with pytest.raises(SegmentLoadError, match="No such file"):
        SegmentSession(segment)


def refer(tensor: Any, location: str) -> None:
    """Has a tensor's values lie in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def outside(name: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    refer(tensor, "/etc/passwd")
    return tensor


def in_a_branch(model: Any) -> None:
    branch = onnx.helper.make_graph([], "branch", [], [], [outside("hidden")])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch))


def in_a_sparse_tensor_of_a_branch(model: Any) -> None:
    branch = onnx.GraphProto(name="branch")
    branch.sparse_initializer.add().values.CopyFrom(outside("hidden"))
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["d"], then_branch=branch))


def in_a_function(model: Any) -> None:
    node = onnx.helper.make_node("Constant", [], ["y"], value=outside("hidden"))
    model.functions.append(onnx.helper.make_function("own", "f", [], ["y"], [node], [onnx.helper.make_opsetid("", 20)]))


def without_its_mark(model: Any) -> None:
    tensor = outside("hidden")
    tensor.ClearField("data_location")
    model.graph.initializer.append(tensor)


REFERENCES = {
    "absolute": lambda model: refer(model.graph.initializer[0], "/etc/passwd"),
    "above": lambda model: refer(model.graph.initializer[0], "../../../secret"),
    "beside": lambda model: refer(model.graph.initializer[0], "weights.bin"),
    "nowhere": lambda model: refer(model.graph.initializer[0], ""),
    "without its mark": without_its_mark,
    "sparse": lambda model: model.graph.sparse_initializer.add().indices.CopyFrom(outside("hidden")),
    "constant": lambda model: model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=outside("hidden"))),
    "branch": in_a_branch,
    "sparse tensor of a branch": in_a_sparse_tensor_of_a_branch,
    "function": in_a_function,
    "training": lambda model: model.training_info.add().initialization.initializer.append(outside("hidden")),
    "compiled elsewhere": lambda model: model.graph.node.append(
        onnx.helper.make_node("EPContext", [], ["c"], domain="com.microsoft", ep_cache_context="/etc/passwd", embed_mode=0)
    ),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_model_that_names_another_file_is_refused_before_onnx_runtime_sees_it(
    segment: Segment, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(segment.model)
    REFERENCES[kind](model)
    hostile = rewritten(segment, model.SerializeToString())
    monkeypatch.setattr("server.embedded.sessions.open_session", lambda *_: pytest.fail("ONNX Runtime has it"))
    with pytest.raises(SegmentLoadError, match="references to what is outside the file"):
        SegmentSession(hostile)


def test_onnx_runtime_itself_would_read_the_other_file(segment: Segment) -> None:
    """Otherwise the test above would be about nothing."""
    model = onnx.load(segment.model)
    tensor = model.graph.initializer[0]
    (segment.model.parent / "weights.bin").write_bytes(tensor.raw_data)
    refer(tensor, "weights.bin")
    segment.model.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(segment.model, providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": random_images(1, 8)})[0].shape == (1, 4, 8)


@pytest.mark.parametrize("change", [{"name": "picture"}, {"data_type": "float32"}, {"shape": (9, 9, 3)}, {"shape": (8, 8)}])
def test_a_model_that_is_not_what_the_generation_says_is_refused(segment: Segment, change: dict[str, object]) -> None:
    wrong = dataclasses.replace(segment, input=dataclasses.replace(segment.input, **change))
    with pytest.raises(SegmentLoadError, match="input"):
        SegmentSession(wrong)


def test_an_output_of_another_shape_fails_the_run(segment: Segment) -> None:
    session = SegmentSession(segment)
    session.segment = dataclasses.replace(segment, output=dataclasses.replace(segment.output, shape=(5, 8)))
    with pytest.raises(ValueError, match="found output"):
        session.run(random_images(3, 8))


def test_one_thread_pool_for_the_process(segment: Segment) -> None:
    """In a process of its own: the pool is for good."""
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(pathlib.Path.cwd())!r})
from server.embedded.sessions import SegmentSession, prepare_process
from server.errors import SettingsError
from server.repository import Repository

def threads():
    return int(next(line for line in open("/proc/self/status") if line.startswith("Threads:")).split()[1])

prepare_process(3)
prepare_process(3)
prepare_process(1)
generation = Repository(pathlib.Path({str(segment.model.parents[2])!r})).read()
first = [SegmentSession(segment) for segment in generation.segments.values()]
before = threads()
more = [SegmentSession(segment) for _ in range(10) for segment in generation.segments.values()]
assert threads() == before, (before, threads())
try:
    prepare_process(2)
except SettingsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "engine.threads: found 2" in done.stdout


def test_a_device_that_onnx_runtime_cannot_use_is_refused_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is missing, a driver or a library: ONNX Runtime would compute on the CPU without a word."""
    if "CUDAExecutionProvider" in opened_providers("cuda"):
        pytest.skip("this machine can use cuda")
    with pytest.raises(
        DeviceError, match=r"device 'cuda': found .*, expected CUDAExecutionProvider; install 'munet\[server,cuda\]'"
    ):
        prepare_device("cuda")
    # Standard output belongs to the line that says where the server is.
    assert capsys.readouterr().out == ""


def opened_providers(device: str) -> list[str]:
    try:
        return list(open_session(probe_model(), device).get_providers())
    except Exception:
        return []


def test_a_segment_that_did_not_get_its_device_is_refused(segment: Segment) -> None:
    if "CUDAExecutionProvider" in opened_providers("cuda"):
        pytest.skip("this machine can use cuda")
    with pytest.raises(SegmentLoadError, match="CUDAExecutionProvider"):
        SegmentSession(segment, "cuda")


@pytest.mark.gpu
def test_a_gpu_is_ready_and_holds_its_segments(segment: Segment) -> None:
    prepare_device("cuda")
    assert SegmentSession(segment, "cuda").session.get_providers()[0] == "CUDAExecutionProvider"
    options = SegmentSession(segment, "cuda").session.get_provider_options()["CUDAExecutionProvider"]
    assert options["use_tf32"] == "0"
