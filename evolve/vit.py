"""Layers of a plain Vision Transformer as torch modules, and paths assembled from them.

Every layer is a function of one tensor, so that any run of neighbouring layers is simply one after the other (`run_layers`):

    patch_embed   image uint8 [batch, height, width, 3], or float32 in [-1, 1]  ->  patches [batch, patches, width] float32
    class_token   patches  ->  hidden states [batch, 1 + patches, width], the class token's row first
    pos_embed     hidden  ->  hidden
    adapter       hidden  ->  hidden
    block         hidden  ->  hidden
    norm          hidden  ->  the class token's row, normalised [batch, width]
    head          row     ->  logits [batch, classes]

The computation within patch embedding, block and norm is timm's. (The final norm works row by row: normalising the class token's row
alone gives the same bits as normalising all rows.) A layer's tensors are named as in its module. `decompose` takes a timm model apart
into layers.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929 (2021), section 3.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.layers.activations import GELU, GELUTanh
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from evolve.adapter import Adapter, initial_tensors
from evolve.errors import CheckpointError
from evolve.layer import (
    CLASS_TOKEN,
    NORM,
    PATCH_EMBED,
    POS_EMBED,
    LayerKind,
    LayerSpec,
    Position,
    Tensors,
    block_position,
)
from evolve.path import Path
from evolve.position_embedding import position_embedding_spec
from munet.preprocessing import Pixels

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"gelu": nn.GELU, "gelu_tanh": GELUTanh}
"""Activations of a block's MLP by the name its configuration gives."""


class PatchEmbedding(PatchEmbed):
    """Scales an image to [-1, 1] and projects its patches.

    Tensors: `proj.weight` [width, 3, patch_size, patch_size], `proj.bias` [width] if the configuration says bias.
    """

    def __init__(self, width: int, patch_size: int, bias: bool) -> None:
        super().__init__(img_size=None, patch_size=patch_size, embed_dim=width, bias=bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Returns the patches.

        Args:
            image: [batch, height, width, 3], uint8 or already scaled to [-1, 1].

        Returns:
            [batch, patches, width], patches row by row.
        """
        if image.dtype == torch.uint8:
            image = scale_image(image)
        patches: torch.Tensor = super().forward(image.permute(0, 3, 1, 2))  # type: ignore[no-untyped-call]
        return patches


class ClassToken(nn.Module):
    """Puts the class token before the patches. Tensors: `weight` [width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Returns [batch, 1 + patches, width] for [batch, patches, width]."""
        return torch.cat([self.weight.to(patches.dtype).expand(patches.shape[0], 1, -1), patches], dim=1)


class PositionEmbedding(nn.Module):
    """Adds the position embedding. Tensors: `weight` [1 + grid_height * grid_width, width], the class token's row first."""

    def __init__(self, width: int, grid_height: int, grid_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 + grid_height * grid_width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [batch, tokens, width] for [batch, tokens, width]."""
        return x + self.weight


class ClassTokenNorm(LayerNorm):
    """The final norm, of the class token's row. Tensors: `weight` and `bias` [width]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [batch, width] for [batch, tokens, width]."""
        row: torch.Tensor = super().forward(x[:, 0])
        return row


def scale_image(image: torch.Tensor) -> torch.Tensor:
    """Returns uint8 pixels as float32 in [-1, 1], in the same shape."""
    return image.to(torch.float32) / 127.5 - 1.0


def build_module(spec: LayerSpec, tensors: Tensors | None, *, fused_attention: bool = True) -> nn.Module:
    """Returns the module that computes a layer.

    Args:
        spec: kind and configuration.
        tensors: the layer's weights, copied as float32. None gives a new adapter (seed 0), a head of zeros, and for any other kind
            what torch and timm initialise it with.
        fused_attention: whether a block uses torch's fused attention.

    Raises:
        ValueError: the tensors are not those of such a layer.
    """
    if tensors is None and spec.kind in (LayerKind.ADAPTER, LayerKind.HEAD):
        tensors = new_tensors(spec, 0)
    if tensors is None:
        module = _BUILDERS[spec.kind](spec)
    else:
        # Nothing is allocated or drawn for weights that are replaced at once.
        with torch.device("meta"):
            module = _BUILDERS[spec.kind](spec)
        # Copied into memory that torch aligns: what a matrix product rounds to can depend on the alignment, which numpy's varies.
        weights = {name: torch.tensor(np.asarray(tensor, dtype=np.float32)) for name, tensor in tensors.items()}
        try:
            module.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"found weights that do not fit {spec}: {error}") from error
    for part in module.modules():
        if isinstance(part, Attention):
            part.fused_attn = fused_attention  # type: ignore[misc]  # final for TorchScript alone
    return module


def new_tensors(spec: LayerSpec, seed: int | Sequence[int]) -> dict[str, npt.NDArray[np.float32]]:
    """Returns the weights that a new adapter or head starts with: an adapter is drawn by the seed, a head is zero.

    Raises:
        ValueError: neither an adapter nor a head; other layers come from a root.
    """
    if spec.kind is LayerKind.ADAPTER:
        return initial_tensors(spec, seed)
    if spec.kind is LayerKind.HEAD:
        width, classes = spec.integer("width"), spec.integer("classes")
        return {"weight": np.zeros((classes, width), dtype=np.float32), "bias": np.zeros(classes, dtype=np.float32)}
    raise ValueError(f"found a new {spec.kind}, expected an adapter or a head; other layers come from a root")


def tensors_of(module: nn.Module) -> dict[str, npt.NDArray[np.float32]]:
    """Returns a copy of a layer's weights, float32, named as `build_module` takes them."""
    return {name: _numpy(tensor) for name, tensor in module.state_dict().items()}


class PathModel(nn.Module):
    """A path, or a run of neighbouring layers of one, as one module.

    Attributes:
        positions: where its layers stand, in order.
        layers: the layers' modules, in the same order.
    """

    def __init__(self, layers: Iterable[tuple[Position, nn.Module]]) -> None:
        super().__init__()
        placed = tuple(layers)
        self.positions = tuple(position for position, _ in placed)
        self.layers = nn.ModuleList(module for _, module in placed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs all layers; for a whole path, from an image as PatchEmbedding takes it to logits [batch, classes]."""
        return run_layers(self.layers, x)

    def layer(self, position: Position) -> nn.Module:
        """Returns the module at a position.

        Raises:
            ValueError: none stands there.
        """
        return self.layers[self.positions.index(position)]


def run_layers(layers: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Runs layers one after the other."""
    for layer in layers:
        x = layer(x)
    return x


def build_path(path: Path, tensors: Callable[[str], Tensors], *, fused_attention: bool = True) -> PathModel:
    """Returns a stored path as one module in evaluation mode.

    Args:
        path: a task's path, or the root, which ends with the norm.
        tensors: a layer's weights by its id.
        fused_attention: whether blocks use torch's fused attention.
    """
    modules = (
        (position, build_module(layer.spec, tensors(layer.id), fused_attention=fused_attention))
        for position, layer in path.layers
    )
    return PathModel(modules).eval()


def reference_logits(
    path: Path, tensors: Callable[[str], Tensors], images: Pixels, batch_size: int = 32
) -> npt.NDArray[np.float32]:
    """Computes a path's logits on the CPU, layer by layer, in batches of one fixed size.

    A short batch is filled up with black images, so that an image's logits depend neither on how many others there are nor on
    which: they are what exports are compared with, and what must not change by a bit when another task is published.

    Args:
        path: a task's path.
        tensors: a layer's weights by its id.
        images: [images, size, size, 3] uint8, resized to the path's image size.
        batch_size: images that are computed at a time.

    Returns:
        [images, classes] float32.
    """
    model = build_path(path, tensors)
    chunks: list[npt.NDArray[np.float32]] = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            batch = np.zeros((batch_size, *images.shape[1:]), dtype=np.uint8)
            batch[: len(chunk)] = chunk
            chunks.append(model(torch.from_numpy(batch)).numpy()[: len(chunk)])
    classes = path.layers[-1].layer.spec.integer("classes")
    return np.concatenate(chunks) if chunks else np.empty((0, classes), dtype=np.float32)


def _build_block(spec: LayerSpec) -> nn.Module:
    config = spec.config
    width = spec.integer("width")
    activation = str(config["activation"])
    if activation not in ACTIVATIONS:
        raise ValueError(f"found activation {activation!r}, expected one of {sorted(ACTIVATIONS)}")
    return Block(
        dim=width,
        num_heads=spec.integer("heads"),
        # timm multiplies by the width and rounds down: half a unit more survives that whatever the division rounds to.
        mlp_ratio=(spec.integer("mlp_width") + 0.5) / width,
        qkv_bias=bool(config["qkv_bias"]),
        init_values=1e-5 if config["layer_scale"] else None,
        act_layer=ACTIVATIONS[activation],
        norm_layer=functools.partial(LayerNorm, eps=float(config["eps"])),  # type: ignore[arg-type]  # timm asks for a class, any maker will do
    )


_BUILDERS: Mapping[LayerKind, Callable[[LayerSpec], nn.Module]] = {
    LayerKind.PATCH_EMBED: lambda spec: PatchEmbedding(
        spec.integer("width"), spec.integer("patch_size"), bool(spec.config["bias"])
    ),
    LayerKind.CLASS_TOKEN: lambda spec: ClassToken(spec.integer("width")),
    LayerKind.POS_EMBED: lambda spec: PositionEmbedding(
        spec.integer("width"), spec.integer("grid_height"), spec.integer("grid_width")
    ),
    LayerKind.ADAPTER: lambda spec: Adapter(spec.integer("width"), spec.integer("adapter_width"), float(spec.config["eps"])),
    LayerKind.BLOCK: _build_block,
    LayerKind.NORM: lambda spec: ClassTokenNorm(spec.integer("width"), eps=float(spec.config["eps"])),
    LayerKind.HEAD: lambda spec: nn.Linear(spec.integer("width"), spec.integer("classes")),
}


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
    positions = _numpy(vit.pos_embed)[0]
    if vit.no_embed_class:
        positions = np.concatenate([np.zeros((1, width), dtype=np.float32), positions])
    layers: dict[Position, tuple[LayerSpec, dict[str, npt.NDArray[np.float32]]]] = {
        PATCH_EMBED: (
            LayerSpec.of(LayerKind.PATCH_EMBED, width=width, patch_size=patch_size, channels=3, bias=patch_bias),
            tensors_of(vit.patch_embed),
        ),
        CLASS_TOKEN: (LayerSpec.of(LayerKind.CLASS_TOKEN, width=width), {"weight": _numpy(vit.cls_token).reshape(width)}),
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


def _numpy(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32).numpy().copy()
