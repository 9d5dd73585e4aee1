import argparse
import json
import os
import pathlib
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import timm
import torch
from torch import nn

from evolve import root as root_module
from evolve.config import RootSettings
from evolve.errors import CheckpointError
from evolve.layer import NORM, PATCH_EMBED, POS_EMBED, LayerKind, LayerSpec, block_position
from evolve.root import load_root, save_root
from evolve.timm_models import decompose
from evolve.vit import build_module, scale_image

MODEL = "test_vit"  # timm's own small model: width 64, 6 blocks, patches of 16 pixels, images of 160


def random_model(**options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(MODEL, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def from_file(file: pathlib.Path, model: str | None = MODEL, blocks: int | None = None) -> Any:
    return load_root(RootSettings(source="file", file=file, model=model, blocks=blocks))


def assert_same(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for position, (spec, tensors) in expected.items():
        assert found[position][0] == spec
        assert found[position][1].keys() == tensors.keys()
        assert all(np.array_equal(found[position][1][name], tensors[name]) for name in tensors)
        assert all(tensor.dtype == np.float32 for tensor in found[position][1].values())


def save(state: dict[str, torch.Tensor], file: pathlib.Path) -> None:
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(state, file)
    else:
        torch.save(state, file)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_loads_a_timm_checkpoint_and_ignores_its_head(tmp_path: pathlib.Path, suffix: str) -> None:
    model = random_model(num_classes=11)
    save(model.state_dict(), tmp_path / f"model{suffix}")
    root = from_file(tmp_path / f"model{suffix}")
    assert root.image_size == 160
    assert_same(root.layers, decompose(model, 160))


@pytest.mark.parametrize("nest", ["model", "state_dict", "module", "both"])
def test_loads_nested_and_prefixed_checkpoints(tmp_path: pathlib.Path, nest: str) -> None:
    model = random_model()
    state: dict[str, Any] = model.state_dict()
    if nest in ("module", "both"):
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if nest != "module":
        state = {"model" if nest == "both" else nest: state, "epoch": 3}
    torch.save(state, tmp_path / "model.pth")
    assert_same(from_file(tmp_path / "model.pth").layers, decompose(model, 160))


def test_keeps_the_native_grid_of_the_file(tmp_path: pathlib.Path) -> None:
    model = random_model(img_size=48)
    save(model.state_dict(), tmp_path / "model.safetensors")
    root = from_file(tmp_path / "model.safetensors")
    assert root.image_size == 48
    assert root.layers[POS_EMBED][0].config == {"grid_height": 3, "grid_width": 3, "width": 64}


def test_keeps_the_first_blocks(tmp_path: pathlib.Path) -> None:
    model = random_model()
    save(model.state_dict(), tmp_path / "model.safetensors")
    root = from_file(tmp_path / "model.safetensors", blocks=2)
    expected = decompose(model, 160)
    kept = {p: layer for p, layer in expected.items() if p.block is None or p.block < 2}
    assert block_position(1) in kept
    assert_same(root.layers, kept)
    with pytest.raises(CheckpointError, match="found root.blocks = 7; expected 1 to 6, as many as this root has; ask for fewer"):
        from_file(tmp_path / "model.safetensors", blocks=7)


@pytest.mark.parametrize(
    ("name", "image_size", "grid"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", 224, 14),
        ("vit_small_patch16_384.augreg_in21k_ft_in1k", 384, 24),
        ("vit_base_patch16_224.augreg_in21k", 224, 14),
        ("deit3_small_patch16_224.fb_in22k_ft_in1k", 224, 14),
    ],
)
def test_whole_models_of_timm_come_from_their_checkpoint_and_answer_alike(
    tmp_path: pathlib.Path, name: str, image_size: int, grid: int
) -> None:
    # As published: all blocks, the native grid, a head of thousands of classes, the model's own scaling of images.
    with torch.device("meta"):
        model = timm.create_model(name)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        scales = parameter_name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight"))
        nn.init.normal_(parameter, mean=float(scales), std=0.05, generator=generator)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    root = from_file(tmp_path / "model.safetensors", name)
    assert (root.image_size, root.layers[POS_EMBED][0].integer("grid_height")) == (image_size, grid)
    pixels = torch.randint(0, 256, (2, image_size, image_size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(((pixels / 255 - mean) / std).permute(0, 3, 1, 2)), pre_logits=True)
        found: Any = pixels
        for spec, tensors in root.layers.values():
            found = build_module(spec, tensors)(found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.std(0).mean() > 1e-3, "answers that do not depend on the image would prove nothing"


class Malicious:
    def __init__(self, file: pathlib.Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_pickled_code_is_never_run(tmp_path: pathlib.Path) -> None:
    torch.save({"model": Malicious(tmp_path / "ran")}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="pickled code is never run"):
        from_file(tmp_path / "model.pth")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": random_model().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    with pytest.raises(CheckpointError, match="state_dict"):
        from_file(tmp_path / "args.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 broken archive"])
def test_garbage_is_refused(tmp_path: pathlib.Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"model{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match="model"):
        from_file(tmp_path / f"model{suffix}")


def test_truncated_files_are_refused(tmp_path: pathlib.Path) -> None:
    for suffix in (".safetensors", ".pth"):
        file = tmp_path / f"model{suffix}"
        save(random_model().state_dict(), file)
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match="could not read"):
            from_file(file)


def test_another_architecture_is_refused_naming_tensors(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.safetensors"
    save(random_model(embed_dim=32).state_dict(), file)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.proj\.bias: \[32\] in the file, \[64\] in the model; .* more"):
        from_file(file)
    save(random_model(depth=5).state_dict(), file)
    with pytest.raises(CheckpointError, match=r"blocks\.5\.attn\.proj\.bias: nothing in the file"):
        from_file(file)
    with pytest.raises(CheckpointError, match="resnet18"):
        from_file(file, model="resnet18")
    save({"some": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="another architecture"):
        from_file(file)


def test_missing_files_and_names_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="found no file"):
        from_file(tmp_path / "none.pth")
    save(random_model().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="set model"):
        from_file(tmp_path / "model.safetensors", model=None)
    with pytest.raises(CheckpointError, match="did you mean 'vit_tiny_patch16_224'"):
        from_file(tmp_path / "model.safetensors", model="vit_tinny_patch16_224")
    with pytest.raises(CheckpointError, match="found no bundled root 'nothing'"):
        load_root(RootSettings(source="bundled", model="nothing"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="found list"):
        from_file(tmp_path / "list.pth")


def test_own_format_comes_back(tmp_path: pathlib.Path) -> None:
    layers = decompose(random_model(depth=2), 160)
    save_root(tmp_path / "root.safetensors", layers, 160, info={"recipe": "by hand"})
    root = from_file(tmp_path / "root.safetensors", model=None, blocks=1)
    assert root.image_size == 160
    assert_same(root.layers, {p: layer for p, layer in layers.items() if p.block != 1})
    save_root(tmp_path / "half.safetensors", layers, 160, float16=True)
    half = from_file(tmp_path / "half.safetensors", model=None).layers
    rounded = {
        p: (spec, {name: t.astype(np.float16).astype(np.float32) for name, t in tensors.items()})
        for p, (spec, tensors) in layers.items()
    }
    assert_same(half, rounded)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "root.safetensors").stat().st_size


@pytest.mark.parametrize(
    "change", [{"format": "munet-root-2"}, {"layers": "[]["}, {"layers": '[["norm", "block", {}]]'}, {"image_size": "x"}]
)
def test_damaged_own_files_are_refused(tmp_path: pathlib.Path, change: dict[str, str]) -> None:
    file = tmp_path / "root.safetensors"
    save_root(file, decompose(random_model(depth=1), 160), 160)
    with safetensors.safe_open(file, framework="numpy") as content:
        metadata = content.metadata()
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, {**metadata, **change})
    with pytest.raises(CheckpointError, match=r"root\.safetensors"):
        from_file(file, model=None)


def test_own_files_without_a_layer_or_with_another_grid_are_refused(tmp_path: pathlib.Path) -> None:
    layers = decompose(random_model(depth=1), 160)
    save_root(tmp_path / "root.safetensors", {p: layer for p, layer in layers.items() if p != NORM}, 160)
    with pytest.raises(CheckpointError, match="layers at"):
        from_file(tmp_path / "root.safetensors", model=None)
    save_root(tmp_path / "root.safetensors", layers, 96)
    with pytest.raises(CheckpointError, match="images of 96 pixels"):
        from_file(tmp_path / "root.safetensors", model=None)


def test_weights_that_are_not_finite_are_refused(tmp_path: pathlib.Path) -> None:
    model = random_model(depth=1)
    model.norm.bias.data[3] = float("nan")
    save_root(tmp_path / "root.safetensors", decompose(model, 160), 160)
    with pytest.raises(CheckpointError, match="norm/bias"):
        from_file(tmp_path / "root.safetensors", model=None)


def test_own_file_without_a_tensor_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "root.safetensors"
    save_root(file, decompose(random_model(depth=1), 160), 160)
    with safetensors.safe_open(file, framework="numpy") as content:
        metadata = content.metadata()
    tensors = safetensors.numpy.load_file(file)
    del tensors["block.0/mlp.fc1.bias"]
    safetensors.numpy.save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=r"mlp\.fc1\.bias"):
        from_file(file, model=None)


def test_bundled_roots_are_found_by_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = decompose(random_model(depth=1), 160)
    save_root(tmp_path / "small.safetensors", layers, 160)
    monkeypatch.setattr(root_module.importlib.resources, "files", lambda package: tmp_path)
    assert_same(load_root(RootSettings(model="small")).layers, layers)
    with pytest.raises(CheckpointError, match=r"one of \['small'\]"):
        load_root(RootSettings())


def test_other_scaling_of_images_is_folded_into_the_patch_embedding(tmp_path: pathlib.Path) -> None:
    # vit_base_patch32_clip and DeiT subtract ImageNet's mean; deit_tiny is a plain ViT that does.
    model: Any = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=12, num_classes=0)
    save(model.state_dict(), tmp_path / "deit.safetensors")
    root = from_file(tmp_path / "deit.safetensors", model="deit_tiny_patch16_224", blocks=1)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    assert not torch.allclose(mean, torch.tensor(0.5))
    with torch.no_grad():
        expected = model.patch_embed(((images / 255 - mean) / std).permute(0, 3, 1, 2))
        found = build_module(*root.layers[PATCH_EMBED])(scale_image(images))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def hub_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The hub's folder of downloaded files, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_loads_weights_that_timm_has_downloaded(hub_cache: pathlib.Path) -> None:
    model = random_model()
    revision = "0" * 40
    repository = hub_cache / "models--timm--test_vit.r160_in1k"
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    save(model.state_dict(), repository / "snapshots" / revision / "model.safetensors")
    root = load_root(RootSettings(source="timm", model="test_vit.r160_in1k", blocks=3))
    assert sum(position.kind is LayerKind.BLOCK for position in root.layers) == 3
    assert_same({PATCH_EMBED: root.layers[PATCH_EMBED]}, {PATCH_EMBED: decompose(model, 160)[PATCH_EMBED]})


def test_without_a_network_says_what_to_do(hub_cache: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="use source = 'file'"):
        load_root(RootSettings(source="timm", model="test_vit.r160_in1k"))
    with pytest.raises(CheckpointError, match="tag"):
        load_root(RootSettings(source="timm", model="test_vit.nonsense"))


def test_specs_survive_json(tmp_path: pathlib.Path) -> None:
    layers = decompose(random_model(depth=1), 160)
    save_root(tmp_path / "root.safetensors", layers, 160)
    spec = from_file(tmp_path / "root.safetensors", model=None).layers[block_position(0)][0]
    assert isinstance(spec, LayerSpec)
    assert {name: type(value) for name, value in spec.items} == {
        name: type(value) for name, value in layers[block_position(0)][0].items
    }
    assert json.dumps(spec.config) == json.dumps(layers[block_position(0)][0].config)
