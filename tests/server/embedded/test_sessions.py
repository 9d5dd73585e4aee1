from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys

import onnx
import pytest
from onnx import TensorProto

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


def test_bytes_that_are_no_model_are_refused(segment: Segment) -> None:
    for content in (b"", b"garbage" * 100, segment.model.read_bytes()[:500]):
        segment.model.write_bytes(content)
        with pytest.raises(SegmentLoadError, match=segment.name):
            SegmentSession(segment)


def test_weights_outside_the_file_are_refused(segment: Segment) -> None:
    model = onnx.load(segment.model)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    segment.model.write_bytes(model.SerializeToString())
    with pytest.raises(SegmentLoadError, match="outside the file"):
        SegmentSession(segment)


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
