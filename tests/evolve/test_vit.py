from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from evolve.errors import CheckpointError
from evolve.flops import forward_flops, layer_flops, training_flops
from evolve.hyperparameters import Hyperparameters
from evolve.layer import CLASS_TOKEN, HEAD, NORM, PATCH_EMBED, POS_EMBED, Layer, LayerKind, LayerSpec, block_position
from evolve.path import Path, PlacedLayer
from evolve.specs import adapter_spec, head_spec
from evolve.timm_models import decompose
from evolve.vit import PathModel, build_module, new_tensors, reference_logits, run_layers, scale_image, tensors_of


def timm_model(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    model = timm.create_model(name, **{"img_size": 32, "depth": 2, "num_classes": 7, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def path_model(model: Any, **options: Any) -> PathModel:
    layers = decompose(model, model.patch_embed.img_size[0])
    placed = [(position, build_module(spec, tensors, **options)) for position, (spec, tensors) in layers.items()]
    head = build_module(head_spec(model.embed_dim, 7), tensors_of(model.head))
    return PathModel([*placed, (HEAD, head)]).eval()


def random_images(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"depth": 3}),
        ("vit_tiny_patch16_224", {"img_size": 48, "patch_size": 8}),
        ("vit_small_patch16_224", {"depth": 2}),
        ("vit_tiny_patch16_224", {"init_values": 0.1}),
        ("vit_tiny_patch16_224", {"qkv_bias": False, "act_layer": "gelu_tanh", "mlp_ratio": 2.7}),
        ("vit_tiny_patch16_224", {"no_embed_class": True}),
        ("test_vit", {}),
    ],
)
def test_logits_equal_those_of_timm(name: str, options: dict[str, Any]) -> None:
    model = timm_model(name, **options)
    images = random_images(4, model.patch_embed.img_size[0])
    with torch.no_grad():
        expected = model(scale_image(images).permute(0, 3, 1, 2))
        assert torch.equal(path_model(model)(images), expected)
        unfused = path_model(model, fused_attention=False)(images)
    torch.testing.assert_close(unfused, expected, rtol=1e-4, atol=1e-4)


def test_decompose_carries_every_weight_and_setting() -> None:
    model = timm_model(init_values=0.1)
    layers = decompose(model, 32)
    assert list(layers) == [PATCH_EMBED, CLASS_TOKEN, POS_EMBED, block_position(0), block_position(1), NORM]
    total = sum(tensor.size for _, tensors in layers.values() for tensor in tensors.values())
    head = sum(parameter.numel() for parameter in model.head.parameters())
    assert total == sum(parameter.numel() for parameter in model.parameters()) - head
    assert layers[block_position(0)][0].config == {
        "activation": "gelu",
        "eps": 1e-6,
        "heads": 3,
        "layer_scale": True,
        "mlp_width": 768,
        "qkv_bias": True,
        "width": 192,
    }
    assert layers[PATCH_EMBED][0].config == {"bias": True, "channels": 3, "patch_size": 16, "width": 192}
    assert layers[POS_EMBED][0].config == {"grid_height": 2, "grid_width": 2, "width": 192}


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("deit_tiny_distilled_patch16_224", {}, "VisionTransformerDistilled"),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "register tokens"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "qk_norm"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, "pre_norm"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "fc_norm"),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}, "pooling 'avg'"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "map"}, "no class token"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "no learned position embedding"),
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}, "QuickGELU"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "RmsNorm"),
        ("vit_tiny_patch16_224", {"proj_bias": False}, "without bias"),
        ("vit_tiny_patch16_224", {"final_norm": False}, "a final norm of type Identity"),
        ("vit_tiny_patch16_224", {"in_chans": 1}, "1 image channels"),
        ("vit_tiny_patch16_224", {"img_size": (32, 48)}, "an image size of (32, 48)"),
        ("vit_small_patch16_18x2_224", {}, "ParallelThingsBlock"),
        ("vit_relpos_small_patch16_224", {}, "VisionTransformerRelPos"),
        ("eva02_tiny_patch14_224", {"img_size": 28}, "Eva"),
        ("resnet18", {"img_size": None, "depth": None}, "ResNet"),
    ],
)
def test_unsupported_architectures_are_refused_by_name(name: str, options: dict[str, Any], named: str) -> None:
    settings = {"img_size": 32, "depth": 1, **options}
    model = timm.create_model(name, num_classes=0, **{key: value for key, value in settings.items() if value is not None})
    with pytest.raises(CheckpointError, match="a plain Vision Transformer") as caught:
        decompose(model, 32)
    assert named in str(caught.value)


def test_norm_of_the_class_row_has_the_bits_of_the_norm_of_all_rows() -> None:
    x = torch.randn(9, 5, 192, generator=torch.Generator().manual_seed(0))
    spec = LayerSpec.of(LayerKind.NORM, width=192, eps=1e-6)
    norm = build_module(spec, {"weight": np.linspace(-1, 2, 192), "bias": np.linspace(1, 3, 192)})
    every_row = nn.functional.layer_norm(x, [192], norm.weight, norm.bias, 1e-6)
    assert torch.equal(norm(x), every_row[:, 0])


def test_pieces_after_one_another_are_the_whole() -> None:
    model = path_model(timm_model())
    images = random_images(3, 32)
    with torch.no_grad():
        hidden = run_layers(model.layers[:4], images)
        assert hidden.shape == (3, 5, 192)
        assert torch.equal(run_layers(model.layers[4:], hidden), model(images))
        assert torch.equal(model(scale_image(images)), model(images))
    assert model.layer(NORM) is model.layers[-2]


def test_scaling_reaches_both_ends() -> None:
    assert scale_image(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_new_head_answers_zero_and_other_kinds_are_never_new() -> None:
    head = build_module(head_spec(8, 3), None)
    assert torch.equal(head(torch.ones(2, 8)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="come from a root"):
        new_tensors(LayerSpec.of(LayerKind.NORM, width=8, eps=1e-6), 0)


@pytest.mark.parametrize("tensors", [{"weight": np.zeros((3, 8))}, {"weight": np.zeros((3, 9)), "bias": np.zeros(3)}])
def test_weights_that_do_not_fit_are_refused(tensors: Any) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        build_module(head_spec(8, 3), tensors)


def test_module_keeps_a_copy_of_its_weights() -> None:
    weight = np.ones((3, 8), dtype=np.float32)
    head = build_module(head_spec(8, 3), {"weight": weight, "bias": np.zeros(3, dtype=np.float32)})
    with torch.no_grad():
        head.weight.add_(1)
    assert (weight == 1).all()


def test_reference_logits_depend_on_no_other_image() -> None:
    model: Any = timm_model()
    layers = decompose(model, 32)
    layers[HEAD] = (head_spec(192, 7), tensors_of(model.head))
    placed = [PlacedLayer(position, Layer.of(*layer)) for position, layer in layers.items()]
    stored = {at.layer.id: layers[at.position][1] for at in placed}
    path = Path.of(task="t", layers=placed, hyperparameters=Hyperparameters(num_blocks=2), parent_id="x", quality=0.5)
    images = random_images(7, 32).numpy()
    logits = reference_logits(path, stored.__getitem__, images, batch_size=4)
    assert logits.shape == (7, 7)
    assert logits.dtype == np.float32
    assert np.array_equal(reference_logits(path, stored.__getitem__, images[5:6], batch_size=4)[0], logits[5])
    assert reference_logits(path, stored.__getitem__, images[:0]).shape == (0, 7)
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(scale_image(torch.from_numpy(images)).permute(0, 3, 1, 2)), atol=1e-5)


def test_flops() -> None:
    patch = LayerSpec.of(LayerKind.PATCH_EMBED, width=8, patch_size=16, channels=3, bias=True)
    token = LayerSpec.of(LayerKind.CLASS_TOKEN, width=8)
    block = LayerSpec.of(LayerKind.BLOCK, width=8, mlp_width=32, heads=2)
    head = head_spec(8, 3)
    assert layer_flops(patch, 32, 16) == 2 * 4 * 768 * 8
    assert layer_flops(adapter_spec(8, 2), 32, 16) == 5 * 2 * (8 * 2 + 2 * 8)
    # Queries, keys, values and the projection after them; scores and mixed values; the two layers of the MLP.
    assert layer_flops(block, 32, 16) == 5 * 2 * (4 * 64 + 2 * 5 * 8 + 2 * 8 * 32)
    assert layer_flops(head, 32, 16) == 2 * 8 * 3
    p, b, h = (layer_flops(spec, 32, 16) for spec in (patch, block, head))
    assert forward_flops([patch, token, block, head], 32) == p + b + h
    assert training_flops([(patch, False), (token, False), (block, False), (head, True)], 32) == p + b + 3 * h
    assert training_flops([(patch, False), (token, True), (block, False), (head, True)], 32) == p + 2 * b + 3 * h
    assert training_flops([(patch, True), (token, True), (block, True), (head, True)], 32) == 3 * (p + b + h)
