"""Layers of a plain Vision Transformer as torch modules, and paths assembled from them.

Every layer is a function of one tensor, so that any run of neighbouring layers is simply one after the other (`run_layers`):

    patch_embed   image uint8 [batch, height, width, 3], or float32 in [-1, 1]  ->  patches [batch, patches, width] float32
    class_token   patches  ->  hidden states [batch, 1 + patches, width], the class token's row first
    pos_embed     hidden  ->  hidden
    adapter       hidden  ->  hidden
    block         hidden  ->  hidden
    norm          hidden  ->  the class token's row, normalised [batch, width]
    head          row     ->  logits [batch, classes]

Patch embedding, block and norm compute, to the bit, what timm's Vision Transformer computes, whose checkpoints roots come from
(evolve.timm_models); nothing here imports timm, which takes seconds. (The final norm works row by row: normalising
the class token's row alone gives the same bits as normalising all rows.) A layer's tensors are named as in its module, as timm names
them.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929 (2021), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from evolve.adapter import Adapter, initial_tensors
from evolve.layer import LayerKind, LayerSpec, Position, Tensors
from evolve.path import Path
from munet.preprocessing import Pixels

ACTIVATIONS: Mapping[str, Literal["none", "tanh"]] = {"gelu": "none", "gelu_tanh": "tanh"}
"""How the GELU of a block's MLP is approximated, by the name its configuration gives."""


class PatchEmbedding(nn.Module):
    """Scales an image to [-1, 1] and projects its patches.

    Tensors: `proj.weight` [width, 3, patch_size, patch_size], `proj.bias` [width] if the configuration says bias.
    """

    def __init__(self, width: int, patch_size: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Returns the patches.

        Args:
            image: [batch, height, width, 3], uint8 or already scaled to [-1, 1].

        Returns:
            [batch, patches, width], patches row by row.
        """
        if image.dtype == torch.uint8:
            image = scale_image(image)
        projected: torch.Tensor = self.proj(image.permute(0, 3, 1, 2))
        return projected.flatten(2).transpose(1, 2)


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


class Attention(nn.Module):
    """Self-attention with several heads. Tensors: `qkv.weight` [3 * width, width], `qkv.bias` if so configured, `proj.*`.

    Attributes:
        fused: whether torch's fused attention computes it; otherwise the matrix products stand one by one.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.fused = True
        self._heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [batch, tokens, width] for [batch, tokens, width]."""
        batch, tokens, width = x.shape
        queries, keys, values = (
            self.qkv(x).reshape(batch, tokens, 3, self._heads, width // self._heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
        else:
            scores = (queries * (width // self._heads) ** -0.5) @ keys.transpose(-2, -1)
            mixed = scores.softmax(dim=-1) @ values
        attended: torch.Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return attended


class Mlp(nn.Module):
    """Two linear layers with a GELU between. Tensors: `fc1.*` to the width of the MLP, `fc2.*` back."""

    def __init__(self, width: int, mlp_width: int, approximate: Literal["none", "tanh"]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [batch, tokens, width] for [batch, tokens, width]."""
        mapped: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return mapped


class LayerScale(nn.Module):
    """Scales every feature. Tensors: `gamma` [width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [batch, tokens, width] for [batch, tokens, width]."""
        return x * self.gamma


class Block(nn.Module):
    """A transformer block with the norms before attention and MLP.

    Tensors: `norm1.*`, `attn.*` (Attention), `ls1.gamma` if the configuration says layer_scale; `norm2.*`, `mlp.*` (Mlp), `ls2.gamma`.
    """

    def __init__(self, spec: LayerSpec) -> None:
        """Makes a block as its spec says.

        Raises:
            ValueError: the spec names an activation that is not known, or heads that do not divide the width.
        """
        super().__init__()
        width, heads, eps, activation = (
            spec.integer("width"),
            spec.integer("heads"),
            float(spec.config["eps"]),
            spec.config["activation"],
        )
        if activation not in ACTIVATIONS:
            raise ValueError(f"found activation {activation!r}, expected one of {sorted(ACTIVATIONS)}")
        if width % heads != 0:
            raise ValueError(f"found {heads} heads, expected a number that divides the width {width}")
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, bool(spec.config["qkv_bias"]))
        self.ls1 = LayerScale(width) if spec.config["layer_scale"] else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, spec.integer("mlp_width"), ACTIVATIONS[str(activation)])
        self.ls2 = LayerScale(width) if spec.config["layer_scale"] else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [batch, tokens, width] for [batch, tokens, width]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        mapped: torch.Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return mapped


class ClassTokenNorm(nn.LayerNorm):
    """The final norm, of the class token's row. Tensors: `weight` and `bias` [width]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [batch, width] for [batch, tokens, width]."""
        return super().forward(x[:, 0])


def scale_image(image: torch.Tensor) -> torch.Tensor:
    """Returns uint8 pixels as float32 in [-1, 1], in the same shape."""
    return image.to(torch.float32) / 127.5 - 1.0


def build_module(spec: LayerSpec, tensors: Tensors | None, *, fused_attention: bool = True) -> nn.Module:
    """Returns the module that computes a layer.

    Args:
        spec: kind and configuration.
        tensors: the layer's weights, copied as float32. None gives a new adapter (seed 0), a head of zeros, and for any other kind
            what torch initialises it with.
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
            part.fused = fused_attention
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
    return {name: array_of(tensor) for name, tensor in module.state_dict().items()}


def array_of(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """Returns a copy of a tensor on any device, float32, in the same shape."""
    return tensor.detach().to("cpu", torch.float32).numpy().copy()


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


_BUILDERS: Mapping[LayerKind, Callable[[LayerSpec], nn.Module]] = {
    LayerKind.PATCH_EMBED: lambda spec: PatchEmbedding(
        spec.integer("width"), spec.integer("patch_size"), bool(spec.config["bias"])
    ),
    LayerKind.CLASS_TOKEN: lambda spec: ClassToken(spec.integer("width")),
    LayerKind.POS_EMBED: lambda spec: PositionEmbedding(
        spec.integer("width"), spec.integer("grid_height"), spec.integer("grid_width")
    ),
    LayerKind.ADAPTER: lambda spec: Adapter(spec.integer("width"), spec.integer("adapter_width"), float(spec.config["eps"])),
    LayerKind.BLOCK: Block,
    LayerKind.NORM: lambda spec: ClassTokenNorm(spec.integer("width"), eps=float(spec.config["eps"])),
    LayerKind.HEAD: lambda spec: nn.Linear(spec.integer("width"), spec.integer("classes")),
}
