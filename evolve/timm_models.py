"""Models of timm, and their checkpoints, taken apart into layers.

The one place of the search that needs timm, imported by who needs it only when a root comes from there: importing it takes seconds.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from timm.layers.activations import GELU, GELUTanh
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from evolve.errors import CheckpointError
from evolve.layer import CLASS_TOKEN, NORM, PATCH_EMBED, POS_EMBED, LayerKind, LayerSpec, Position, block_position
from evolve.position_embedding import position_embedding_spec
from evolve.vit import array_of, tensors_of
from munet.names import similar_names


def check_name(model_name: str) -> None:
    """Checks that timm knows a model, with or without the tag of its weights.

    Raises:
        CheckpointError: it does not; the message names similar ones.
    """
    known = model_name.partition(".")[0]
    if not timm.is_model(known):
        similar = similar_names(known, timm.list_models())
        advice = f"did you mean {' or '.join(map(repr, similar))}?" if similar else "see timm.list_models()"
        raise CheckpointError(f"found the model name {model_name!r}", "one that timm knows", advice)


def download(model_name: str) -> nn.Module:
    """Returns a model with the pretrained weights that timm downloads, or has downloaded before.

    Raises:
        CheckpointError: timm does not know it, or cannot get its weights.
    """
    check_name(model_name)
    try:
        model: nn.Module = timm.create_model(model_name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"could not get the pretrained weights of {model_name!r} ({error})",
            "weights that timm can download",
            "without a network, fetch the checkpoint elsewhere and use source = 'file' with file and model",
        ) from error
    return model


def restore(model_name: str, state: Mapping[str, torch.Tensor], file: pathlib.Path) -> nn.Module:
    """Returns a model with the weights of a checkpoint.

    Args:
        model_name: timm's name, as `check_name` takes it.
        state: the checkpoint's tensors by name, without those of a head.
        file: where they come from, for messages.

    Raises:
        CheckpointError: they are not the tensors of such a model; the message names differences.
    """
    try:
        model: nn.Module = timm.create_model(model_name, pretrained=False, num_classes=0, **_grid_options(state))
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise CheckpointError(
            f"could not make the model {model_name!r} for {file} ({error})",
            "a Vision Transformer of timm that fits the checkpoint",
        ) from error
    wanted = model.state_dict()
    differences = [
        f"{name}: {_shape(state, name)} in the file, {_shape(wanted, name)} in the model"
        for name in sorted(wanted.keys() | state.keys())
        if _shape(state, name) != _shape(wanted, name)
    ]
    if differences:
        raise CheckpointError(
            f"found a checkpoint of another architecture than {model_name!r} in {file}: {'; '.join(differences[:3])}"
            + (f"; and {len(differences) - 3} more" if len(differences) > 3 else ""),
            "tensors of the same names and shapes",
            "set model to the architecture the checkpoint was made with",
        )
    model.load_state_dict(state)
    return model


def decompose(model: nn.Module, image_size: int) -> dict[Position, tuple[LayerSpec, dict[str, npt.NDArray[np.float32]]]]:
    """Takes a timm Vision Transformer apart into a root's layers, without its head.

    A position embedding without a row for the class token (timm's `no_embed_class`) gets one of zeros, which computes the same.

    Args:
        model: a VisionTransformer of timm with class token, pre-norm blocks and a final norm.
        image_size: height and width of the images it was made for, in pixels.

    Returns:
        Spec and weights by position, in order, from the patch embedding to the final norm.

    Raises:
        CheckpointError: the model is of an architecture that is not supported; the message names what.
    """
    if type(model) is not VisionTransformer:
        _refuse([f"a model of type {type(model).__name__}"])
    vit: Any = model
    _refuse(_odd_patch_parts(vit.patch_embed, image_size))
    _refuse(_odd_parts(vit))
    width, patch_size = vit.embed_dim, vit.patch_embed.patch_size[0]
    patch_bias = vit.patch_embed.proj.bias is not None
    positions = array_of(vit.pos_embed)[0]
    if vit.no_embed_class:
        positions = np.concatenate([np.zeros((1, width), dtype=np.float32), positions])
    layers: dict[Position, tuple[LayerSpec, dict[str, npt.NDArray[np.float32]]]] = {
        PATCH_EMBED: (
            LayerSpec.of(LayerKind.PATCH_EMBED, width=width, patch_size=patch_size, channels=3, bias=patch_bias),
            tensors_of(vit.patch_embed),
        ),
        CLASS_TOKEN: (LayerSpec.of(LayerKind.CLASS_TOKEN, width=width), {"weight": array_of(vit.cls_token).reshape(width)}),
        POS_EMBED: (position_embedding_spec(width, *vit.patch_embed.grid_size), {"weight": positions}),
    }
    for index, block in enumerate(vit.blocks):
        _refuse(f"{what} in block {index}" for what in _odd_block_parts(block))
        layers[block_position(index)] = (_block_spec(block), tensors_of(block))
    layers[NORM] = (LayerSpec.of(LayerKind.NORM, width=width, eps=vit.norm.eps), tensors_of(vit.norm))
    return layers


def _refuse(findings: Iterable[str]) -> None:
    named = tuple(findings)
    if named:
        raise CheckpointError(
            f"found an architecture with {', '.join(named)}",
            "a plain Vision Transformer of timm: learned position embedding, class token, pre-norm blocks, final norm",
            "choose another model, such as 'vit_tiny_patch16_224.augreg_in21k'",
        )


def _odd_patch_parts(embed: Any, image_size: int) -> list[str]:
    if type(embed) is not PatchEmbed:
        return [f"a patch embedding of type {type(embed).__name__}"]
    return _true(
        (not _is_identity(embed.norm), "a norm in the patch embedding"),
        (embed.proj.in_channels != 3, f"{embed.proj.in_channels} image channels"),
        (len(set(embed.patch_size)) > 1, f"patches of {embed.patch_size} pixels"),
        (embed.img_size != (image_size, image_size), f"an image size of {embed.img_size} instead of {image_size}"),
    )


def _odd_parts(model: Any) -> list[str]:
    return _true(
        (not model.has_class_token, "no class token"),
        (model.reg_token is not None, "register tokens"),
        (model.pos_embed is None, "no learned position embedding"),
        (not _is_identity(model.norm_pre), "a norm before the blocks (pre_norm)"),
        (not _is_layer_norm(model.norm), f"a final norm of type {type(model.norm).__name__}"),
        (not _is_identity(model.fc_norm), "a norm after pooling (fc_norm)"),
        (model.global_pool != "token" or model.attn_pool is not None, f"pooling {model.global_pool!r}"),
    )


def _odd_block_parts(block: Any) -> list[str]:
    if type(block) is not Block:
        return [f"a block of type {type(block).__name__}"]
    attention, mlp = block.attn, block.mlp
    if type(attention) is not Attention or type(mlp) is not Mlp:
        return [f"{type(attention).__name__} and {type(mlp).__name__}"]
    norms = (block.norm1, block.norm2)
    scales = [not _is_identity(scale) for scale in (block.ls1, block.ls2)]
    return _true(
        (not all(map(_is_layer_norm, norms)), f"norms of type {type(block.norm1).__name__}"),
        (len({norm.eps for norm in norms}) > 1, "norms of different eps"),
        (not (_is_identity(attention.q_norm) and _is_identity(attention.k_norm)), "norms of queries and keys (qk_norm)"),
        (not (_is_identity(attention.norm) and _is_identity(mlp.norm)), "norms within attention or MLP"),
        (attention.gate is not None, "gated attention"),
        (attention.attn_dim != attention.proj.out_features, f"attention of width {attention.attn_dim}"),
        (attention.proj.bias is None or mlp.fc1.bias is None or mlp.fc2.bias is None, "projections without bias"),
        (scales[0] != scales[1], "layer scale in one half"),
        (_activation_name(mlp.act) is None, f"activation {type(mlp.act).__name__}"),
    )


def _block_spec(block: Any) -> LayerSpec:
    return LayerSpec.of(
        LayerKind.BLOCK,
        width=block.mlp.fc1.in_features,
        heads=block.attn.num_heads,
        mlp_width=block.mlp.fc1.out_features,
        eps=block.norm1.eps,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_scale=not _is_identity(block.ls1),
        activation=_activation_name(block.mlp.act) or "",
    )


def _activation_name(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return "gelu_tanh" if isinstance(module, GELUTanh) else "gelu" if isinstance(module, GELU) else None


def _is_identity(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)


def _is_layer_norm(module: nn.Module) -> bool:
    return type(module) in (nn.LayerNorm, LayerNorm)


def _true(*findings: tuple[bool, str]) -> list[str]:
    return [what for found, what in findings if found]


def _grid_options(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns the image size that the checkpoint's position embedding was made for, if it is square."""
    positions, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if positions is None or patches is None or positions.ndim != 3 or patches.ndim != 4:
        return {}
    for rows in (positions.shape[1] - 1, positions.shape[1]):
        side = math.isqrt(max(rows, 0))
        if side > 0 and side * side == rows:
            return {"img_size": side * patches.shape[-1]}
    return {}


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "nothing"
