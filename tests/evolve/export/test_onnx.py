from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from evolve.errors import ExportError
from evolve.export.onnx import export_segment
from evolve.export.segments import Segment, Unit, find_segments, segment_of, units_of
from evolve.export.settings import ExportSettings
from evolve.layer import LayerKind
from evolve.store import System
from evolve.vit import PathModel, build_module
from munet.runtime import onnxruntime
from tests.evolve.export.conftest import Published

SETTINGS = ExportSettings()


def units(system: System, task: str) -> tuple[Unit, ...]:
    return units_of(system.path(system.tasks()[task].path_id))


def session(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model: Any, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    result: npt.NDArray[Any] = model.run(None, {model.get_inputs()[0].name: value})[0]
    return result


def torch_run(system: System, run_of_units: tuple[Unit, ...]) -> PathModel:
    layers = [each for unit in run_of_units for each in unit.layers]
    return PathModel((None, build_module(each.spec, system.tensors(each.id), fused_attention=False)) for each in layers).eval()


def images(count: int, size: int = 16) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def hidden(count: int, tokens: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, tokens, 16)).astype(np.float32)


@pytest.mark.parametrize(
    ("task", "start", "stop"),
    [("plain", 0, 1), ("plain", 0, 4), ("plain", 1, 2), ("plain", 1, 4), ("adapted", 2, 3), ("adapted", 0, 4), ("adapted", 1, 4)],
)
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_runs_of_units_compute_what_torch_computes(pristine: Published, task: str, start: int, stop: int, batch: int) -> None:
    chosen = units(pristine.system, task)[start:stop]
    model = session(export_segment(segment_of(chosen, SETTINGS), pristine.system.tensors, SETTINGS))
    value = images(batch) if start == 0 else hidden(batch, tokens=11)
    with torch.inference_mode():
        expected = torch_run(pristine.system, chosen)(torch.from_numpy(value)).numpy()
    np.testing.assert_allclose(run(model, value), expected, rtol=0, atol=1e-5)


def test_one_token_and_many_go_through_a_middle_segment(pristine: Published) -> None:
    chosen = units(pristine.system, "adapted")[1:4]
    model = session(export_segment(segment_of(chosen, SETTINGS), pristine.system.tensors, SETTINGS))
    for tokens in (1, 2, 7, 197):
        assert run(model, hidden(2, tokens)).shape == (2, tokens, 16)


def test_a_chain_of_graphs_gives_the_bits_of_one_export_of_all_layers_with_their_weights(pristine: Published) -> None:
    chosen = units(pristine.system, "adapted")[1:4]
    module = torch_run(pristine.system, chosen)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        module, (torch.zeros(3, 7, 16),), dynamo=True, dynamic_shapes=(free,), opset_version=SETTINGS.opset, verbose=False
    )
    assert program is not None
    direct = session(program.model_proto.SerializeToString())
    composed = session(export_segment(segment_of(chosen, SETTINGS), pristine.system.tensors, SETTINGS))
    for batch in (1, 5):
        np.testing.assert_array_equal(run(composed, hidden(batch, 5)), run(direct, hidden(batch, 5)))


def test_cutting_between_blocks_changes_no_bit(pristine: Published) -> None:
    chosen = units(pristine.system, "adapted")[:4]
    whole = session(export_segment(segment_of(chosen, SETTINGS), pristine.system.tensors, SETTINGS))
    value: npt.NDArray[Any] = images(5)
    expected = run(whole, value)
    for unit in chosen:
        value = run(session(export_segment(segment_of([unit], SETTINGS), pristine.system.tensors, SETTINGS)), value)
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("task", ["cloned", "adapted", "large"])
def test_a_row_has_the_same_bits_in_every_batch(pristine: Published, task: str) -> None:
    path = pristine.system.path(pristine.system.tasks()[task].path_id)
    found = find_segments({task: path}, (), SETTINGS)
    models = [session(export_segment(found.segments[name], pristine.system.tensors, SETTINGS)) for name in found.routes[task]]

    def answer(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        for model in models:
            batch = run(model, batch)
        return batch

    given = images(32, path.hyperparameters.image_size)
    expected = answer(given)
    for chosen in ([0], [31], [4, 3], [7, 9, 11], list(range(31, 14, -1))):
        np.testing.assert_array_equal(answer(given[chosen]), expected[chosen])


def test_files_are_valid_and_say_nothing_about_the_machine(pristine: Published) -> None:
    for file in sorted(pristine.repository.glob("seg-*/1/model.onnx")):
        data = file.read_bytes()
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model, full_check=True)
        assert not [word for word in (b"site-packages", b".py", b"stack_trace", b"/work", b"torch.fx") if word in data]
        assert not model.metadata_props
        assert not model.graph.metadata_props
        assert not model.graph.value_info
        assert not model.functions
        assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (10, [("", 20)])
        for node in model.graph.node:
            assert not node.metadata_props
            assert not node.doc_string


def test_inputs_and_outputs_are_those_of_the_contract(pristine: Published) -> None:
    of = {
        (0, 4): ([("image", ["batch", 16, 16, 3])], [("next_hidden", ["batch", 5, 16])]),
        (1, 4): ([("hidden", ["batch", "tokens", 16])], [("next_hidden", ["batch", "tokens", 16])]),
        (4, 5): ([("hidden", ["batch", "tokens", 16])], [("logits", ["batch", 3])]),
    }
    for (start, stop), expected in of.items():
        segment = segment_of(units(pristine.system, "plain")[start:stop], SETTINGS)
        model = session(export_segment(segment, pristine.system.tensors, SETTINGS))
        found = [[(value.name, value.shape) for value in values] for values in (model.get_inputs(), model.get_outputs())]
        assert found == list(expected)


def test_another_process_elsewhere_that_starts_with_other_layers_writes_the_same_bytes(
    pristine: Published, second_process: pathlib.Path
) -> None:
    files = {str(file.relative_to(pristine.repository)) for file in pristine.repository.rglob("*") if file.is_file()}
    again = second_process / "repository"
    assert files == {str(file.relative_to(again)) for file in again.rglob("*") if file.is_file()}
    for name in sorted(files - {"generation-1.json"}):
        assert (again / name).read_bytes() == (pristine.repository / name).read_bytes(), name


def test_weights_beyond_one_file_are_refused(pristine: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = segment_of(units(pristine.system, "plain")[:1], SETTINGS)
    monkeypatch.setattr("evolve.export.onnx.MAX_FILE_BYTES", 100)
    with pytest.raises(ExportError, match="found 12736 bytes of weights in one segment"):
        export_segment(segment, pristine.system.tensors, SETTINGS)


def test_nothing_of_torch_is_named_foreign(pristine: Published) -> None:
    segment: Segment = segment_of(units(pristine.system, "adapted")[2:3], SETTINGS)
    assert [each.kind for each in segment.layers] == [LayerKind.ADAPTER, LayerKind.BLOCK]
    model = onnx.load_from_string(export_segment(segment, pristine.system.tensors, SETTINGS))
    assert {node.domain for node in model.graph.node} == {""}
    assert "1.block.attn.qkv.weight" in {tensor.name for tensor in model.graph.initializer}
