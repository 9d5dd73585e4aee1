from __future__ import annotations

import contextlib
import pathlib
import threading
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from evolve.export.triton import RoutedTask, multi_task_ensemble, segment_config, task_ensemble
from munet.v1 import generation_pb2
from server.repository import Repository
from server.triton.plans import HeldGeneration
from server.triton.process import TritonProcess
from server.triton.supervisor import Supervisor, read_generation
from tests.evolve.export.conftest import Published
from tests.support.triton import Caller, environment


def parsed(data: bytes) -> Any:
    return text_format.Parse(data.decode(), model_config_pb2.ModelConfig())


def tensor(name: str, *shape: int) -> generation_pb2.TensorSpec:
    kind = generation_pb2.DATA_TYPE_UINT8 if name == "image" else generation_pb2.DATA_TYPE_FLOAT32
    return generation_pb2.TensorSpec(name=name, data_type=kind, shape=shape)


def segment(name: str, source: generation_pb2.TensorSpec, target: generation_pb2.TensorSpec) -> generation_pb2.Segment:
    return generation_pb2.Segment(name=name, input=source, output=target, max_batch_size=32)


STEM = segment("seg-stem", tensor("image", 16, 16, 3), tensor("next_hidden", 5, 8))
MIDDLE = segment("seg-middle", tensor("hidden", -1, 8), tensor("next_hidden", -1, 8))
HEAD_A = segment("seg-a", tensor("hidden", -1, 8), tensor("logits", 2))
HEAD_B = segment("seg-b", tensor("hidden", -1, 8), tensor("logits", 3))
A = RoutedTask("a", (STEM, MIDDLE, HEAD_A), ("x", "y"))
B = RoutedTask("b", (STEM, HEAD_B), ("x", "y", "z"))


@pytest.mark.parametrize(("target", "kind"), [("cpu", "KIND_CPU"), ("gpu", "KIND_GPU")])
def test_a_segment_is_a_batching_onnxruntime_model(target: Any, kind: str) -> None:
    config = parsed(segment_config(MIDDLE, target))
    assert (config.name, config.backend, config.max_batch_size) == ("seg-middle", "onnxruntime", 32)
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.Kind.Value(kind)]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("hidden", model_config_pb2.TYPE_FP32, [-1, 8])]
    assert [(t.name, list(t.dims)) for t in config.output] == [("next_hidden", [-1, 8])]


def test_on_a_gpu_float32_stays_float32() -> None:
    accelerators = parsed(segment_config(MIDDLE, "gpu")).optimization.execution_accelerators.gpu_execution_accelerator
    assert [(each.name, dict(each.parameters)) for each in accelerators] == [("cuda", {"use_tf32": "0"})]
    assert not parsed(segment_config(MIDDLE, "cpu")).HasField("optimization")


def test_float16_is_stated_and_its_norms_add_up_in_float32_on_a_gpu() -> None:
    half = generation_pb2.DATA_TYPE_FLOAT16
    head = segment("seg-half", generation_pb2.TensorSpec(name="hidden", data_type=half, shape=(-1, 8)), tensor("logits", 2))
    config = parsed(segment_config(head, "gpu"))
    assert [(t.name, t.data_type) for t in config.input] == [("hidden", model_config_pb2.TYPE_FP16)]
    assert [(t.name, t.data_type) for t in config.output] == [("logits", model_config_pb2.TYPE_FP32)]
    (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert dict(cuda.parameters) == {"use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1"}


def test_a_cache_is_for_what_takes_the_image_and_never_for_ensembles() -> None:
    assert parsed(segment_config(STEM, "cpu", response_cache=True)).response_cache.enable
    assert not parsed(segment_config(MIDDLE, "cpu", response_cache=True)).HasField("response_cache")
    assert not parsed(segment_config(STEM, "cpu")).HasField("response_cache")
    for ensemble in (task_ensemble(A), task_ensemble(A).renamed("a"), multi_task_ensemble(16, [A, B])):
        assert not parsed(ensemble.files["config.pbtxt"]).HasField("response_cache")


def test_a_task_is_an_ensemble_of_its_route() -> None:
    ensemble = task_ensemble(A)
    config = parsed(ensemble.files["config.pbtxt"])
    assert ensemble.name.startswith("a.")
    assert (config.name, config.platform, config.max_batch_size) == (ensemble.name, "ensemble", 32)
    steps = [(s.model_name, dict(s.input_map), dict(s.output_map)) for s in config.ensemble_scheduling.step]
    assert steps == [
        ("seg-stem", {"image": "image"}, {"next_hidden": "hidden_0"}),
        ("seg-middle", {"hidden": "hidden_0"}, {"next_hidden": "hidden_1"}),
        ("seg-a", {"hidden": "hidden_1"}, {"logits": "logits"}),
    ]
    assert [(t.name, list(t.dims), t.label_filename) for t in config.output] == [("logits", [2], "labels.txt")]
    assert ensemble.files["labels.txt"] == b"x\ny\n"


def test_an_ensemble_of_all_tasks_runs_a_common_prefix_once() -> None:
    config = parsed(multi_task_ensemble(16, [A, B]).files["config.pbtxt"])
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["seg-stem", "seg-middle", "seg-a", "seg-b"]
    assert dict(config.ensemble_scheduling.step[3].input_map) == {"hidden": "hidden_0"}
    assert [(t.name, t.label_filename) for t in config.output] == [("logits_a", "labels_a.txt"), ("logits_b", "labels_b.txt")]


def test_two_tasks_of_one_head_have_an_output_each() -> None:
    twin = RoutedTask("twin", A.route, ("p", "q"))
    config = parsed(multi_task_ensemble(16, [A, twin]).files["config.pbtxt"])
    produced = [name for step in config.ensemble_scheduling.step for name in step.output_map.values()]
    assert produced == ["hidden_0", "hidden_1", "logits_a", "logits_twin"]


def test_a_segment_behind_different_prefixes_is_a_step_for_each() -> None:
    other = RoutedTask("other", (STEM, HEAD_B), ("x", "y", "z"))
    apart = RoutedTask("apart", (STEM, MIDDLE, HEAD_B), ("x", "y", "z"))
    config = parsed(multi_task_ensemble(16, [apart, other]).files["config.pbtxt"])
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["seg-stem", "seg-middle", "seg-b", "seg-b"]


def test_the_name_covers_route_and_labels_and_the_alias_neither() -> None:
    names = {
        task_ensemble(A).name,
        task_ensemble(RoutedTask("a", (STEM, HEAD_A), ("x", "y"))).name,
        task_ensemble(RoutedTask("a", A.route, ("x", "z"))).name,
    }
    assert len(names) == 3
    alias = task_ensemble(A).renamed("a")
    assert parsed(alias.files["config.pbtxt"]).name == "a"
    assert task_ensemble(A) == task_ensemble(A)


def test_a_line_break_in_a_label_shifts_no_other() -> None:
    ensemble = task_ensemble(RoutedTask("a", A.route, ("one\r\nline", "é")))
    assert ensemble.files["labels.txt"].decode() == "one line\né\n"


def test_every_configuration_of_a_repository_parses_and_its_maps_meet(pristine: Published) -> None:
    """What Triton checks when it loads them."""
    configs = {file.parent.name: parsed(file.read_bytes()) for file in pristine.repository.glob("*/config.pbtxt")}
    assert {"plain", "cloned", "adapted", "short", "large"} < configs.keys()
    for folder, config in configs.items():
        assert config.name == folder
        assert (pristine.repository / folder / "1").is_dir()
        known = {t.name: (t.data_type, list(t.dims)) for t in config.input}
        for step in config.ensemble_scheduling.step:
            model = configs[step.model_name]
            assert model.max_batch_size == config.max_batch_size
            assert set(step.input_map) == {t.name for t in model.input}
            assert set(step.output_map) <= {t.name for t in model.output}
            for source in model.input:
                kind, dims = known[step.input_map[source.name]]
                assert kind == source.data_type
                assert len(dims) == len(source.dims)
                assert all(a == b or -1 in (a, b) for a, b in zip(dims, source.dims, strict=True))
            for target in model.output:
                assert step.output_map[target.name] not in known
                known[step.output_map[target.name]] = (target.data_type, list(target.dims))
        for output in config.output:
            if config.platform == "ensemble":
                assert known[output.name] == (output.data_type, list(output.dims))
                assert len((pristine.repository / folder / output.label_filename).read_text().splitlines()) == output.dims[0]
        if config.platform != "ensemble":
            assert (pristine.repository / folder / "1" / "model.onnx").is_file()


def test_the_generation_names_an_ensemble_for_each_image_size(pristine: Published) -> None:
    file = pathlib.Path(pristine.repository / "generation-1.json")
    generation = json_format.Parse(file.read_text(), generation_pb2.Generation())
    assert [(e.image_size, list(e.tasks)) for e in generation.multi_task_ensembles] == [
        (16, ["adapted", "cloned", "plain", "short"]),
        (24, ["large"]),
    ]


def test_a_real_triton_loads_it_and_answers_as_torch_does(pristine: Published) -> None:
    generation = read_generation(Repository(pristine.repository))
    with (
        TritonProcess(environment(), pristine.repository) as triton,
        contextlib.closing(Supervisor(triton, Repository(pristine.repository))) as supervisor,
        Caller(triton.addresses.grpc) as caller,
    ):
        # Asks every task its golden images, whose logits torch computed.
        supervisor.load(generation, threading.Event())
        assert caller.ready() == {*HeldGeneration(generation).models, *generation.tasks}
        images = generation.tasks["plain"].golden.read_images()
        answers = caller.infer(generation.ensembles[16], images)
        for task in ("adapted", "cloned", "plain", "short"):
            assert answers[f"logits_{task}"] == pytest.approx(generation.tasks[task].golden.logits, abs=1e-4)
