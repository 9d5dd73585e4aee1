"""Loading the pretrained path that a system starts from, and writing one in munet's own format.

The own format is one safetensors file: tensors named `<position>/<name>`, such as `block.0/attn.qkv.weight`, in float32 or float16;
metadata `format`, `image_size`, `layers` (JSON: position, kind and configuration of each, in order) and whatever its maker adds.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import logging
import pathlib
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from evolve.config import RootSettings
from evolve.errors import CheckpointError
from evolve.layer import PATCH_EMBED, POS_EMBED, LayerKind, LayerSpec, Position, Tensors
from evolve.path import ordered_positions
from evolve.vit import build_module
from munet.files import write_atomically

FORMAT = "munet-root-1"
"""Name and version of the format described above."""

DEFAULT_BUNDLED = "characters"
"""The bundled root that is taken if none is named."""

RootLayers = Mapping[Position, tuple[LayerSpec, Tensors]]
"""Spec and float32 weights by position, in order, from the patch embedding to the final norm."""

_log = logging.getLogger(__name__)

# What torch and safetensors were seen to raise for damaged files.
_DAMAGE = (
    *(OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError),
    safetensors.SafetensorError,
)


@dataclasses.dataclass(frozen=True)
class LoadedRoot:
    """A pretrained path before it is stored.

    Attributes:
        layers: by position, in order, from the patch embedding to the final norm; the position embedding on its native grid.
        image_size: height and width of the images it was pretrained on, in pixels.
    """

    layers: RootLayers
    image_size: int


def load_root(settings: RootSettings) -> LoadedRoot:
    """Loads a root as the settings say.

    Raises:
        CheckpointError: it cannot be read or downloaded, does not fit the model it is said to be, has an architecture that is not
            supported, or fewer blocks than asked for.
    """
    if settings.source == "timm":
        root = _download(settings.model or "")
    elif settings.source == "file":
        root = _load_file(settings.file or pathlib.Path(), settings.model)
    else:
        root = _load_bundled(settings.model or DEFAULT_BUNDLED)
    _check_finite(root)
    return root if settings.blocks is None else _keep_blocks(root, settings.blocks)


def save_root(
    file: pathlib.Path, layers: RootLayers, image_size: int, *, float16: bool = False, info: Mapping[str, str] | None = None
) -> None:
    """Writes a root in munet's own format, whole or not at all.

    Args:
        file: to write.
        layers: by position, in order.
        image_size: height and width of the images it was pretrained on, in pixels.
        float16: stores the weights in half the space, rounded.
        info: what else to keep in the metadata, such as the recipe.

    Raises:
        OSError: the file cannot be written.
    """
    dtype = np.float16 if float16 else np.float32
    tensors = {
        f"{position}/{name}": np.ascontiguousarray(tensor, dtype=dtype)
        for position, (_, named) in layers.items()
        for name, tensor in named.items()
    }
    described = [[str(position), spec.kind.value, spec.config] for position, (spec, _) in layers.items()]
    metadata = {**(info or {}), "format": FORMAT, "image_size": str(image_size), "layers": json.dumps(described, sort_keys=True)}
    write_atomically(file, safetensors.numpy.save(tensors, metadata))


def _check_finite(root: LoadedRoot) -> None:
    for position, (_, tensors) in root.layers.items():
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise CheckpointError(
                    f"found weights {position}/{name} that are not finite", "finite weights", "take another checkpoint"
                )


def _keep_blocks(root: LoadedRoot, blocks: int) -> LoadedRoot:
    found = sum(position.kind is LayerKind.BLOCK for position in root.layers)
    if blocks > found:
        raise CheckpointError(
            f"found root.blocks = {blocks}",
            f"1 to {found}, as many as this root has",
            "ask for fewer blocks or take a deeper root",
        )
    kept = {p: layer for p, layer in root.layers.items() if p.block is None or p.block < blocks}
    return LoadedRoot(kept, root.image_size)


def _load_bundled(name: str) -> LoadedRoot:
    folder = importlib.resources.files("evolve.roots")
    bundled = sorted(entry.name.removesuffix(".safetensors") for entry in folder.iterdir() if entry.name.endswith(".safetensors"))
    if name not in bundled:
        raise CheckpointError(f"found no bundled root {name!r}", f"one of {bundled}", "a file of your own needs source = 'file'")
    with importlib.resources.as_file(folder / f"{name}.safetensors") as file:
        return _load_own(file)


def _load_file(file: pathlib.Path, model_name: str | None) -> LoadedRoot:
    if not file.is_file():
        raise CheckpointError(f"found no file {file}", "a root written by `munet-evolve pretrain`, or a timm checkpoint")
    if file.suffix == ".safetensors" and _metadata(file).get("format", "").startswith("munet-root"):
        return _load_own(file)
    if model_name is None:
        raise CheckpointError(
            f"found a checkpoint {file} and no model",
            "timm's name of its architecture",
            "set model, such as 'vit_tiny_patch16_224'",
        )
    return _load_timm_checkpoint(file, model_name)


# The own format


def _metadata(file: pathlib.Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(file, framework="numpy") as content:
            return content.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(file, error) from error


def _load_own(file: pathlib.Path) -> LoadedRoot:
    metadata = _metadata(file)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"found format {metadata.get('format')!r} in {file}", FORMAT, "use the version of munet that wrote it"
        )
    try:
        stored = safetensors.numpy.load_file(file)
        layers: dict[Position, tuple[LayerSpec, Tensors]] = {}
        for position, kind, config in json.loads(metadata["layers"]):
            named = {
                key.partition("/")[2]: np.asarray(tensor, dtype=np.float32)
                for key, tensor in stored.items()
                if key.partition("/")[0] == position
            }
            spec = LayerSpec.of(LayerKind(kind), **config)
            build_module(spec, named)
            layers[Position.parse(position)] = (spec, named)
        root = LoadedRoot(layers, int(metadata["image_size"]))
        _check_chain(root)
        return root
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(file, error) from error


def _check_chain(root: LoadedRoot) -> None:
    """Raises ValueError or KeyError unless there is a layer at every position of a root, in order, on the grid of its image size."""
    num_blocks = sum(position.kind is LayerKind.BLOCK for position in root.layers)
    expected = ordered_positions(num_blocks, (), with_head=False)
    if tuple(root.layers) != expected or num_blocks == 0:
        raise ValueError(f"layers at {[str(position) for position in root.layers]}")
    patch_size, (grid, _) = root.layers[PATCH_EMBED][0].integer("patch_size"), root.layers[POS_EMBED]
    if {grid.integer("grid_height"), grid.integer("grid_width")} != {root.image_size // patch_size}:
        raise ValueError(f"a position embedding {grid.config} for images of {root.image_size} pixels")


def _unreadable(file: pathlib.Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"could not read {file} ({error})", "a whole checkpoint", "fetch or write it again")


# timm


def _download(model_name: str) -> LoadedRoot:
    from evolve import timm_models  # takes seconds to import

    return _take_apart(timm_models.download(model_name))


def _load_timm_checkpoint(file: pathlib.Path, model_name: str) -> LoadedRoot:
    from evolve import timm_models  # takes seconds to import

    timm_models.check_name(model_name)
    return _take_apart(timm_models.restore(model_name, _read_state(file), file))


def _read_state(file: pathlib.Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a timm checkpoint without its head, never running code that a pickle holds."""
    try:
        loaded: Any
        if file.suffix == ".safetensors":
            loaded = safetensors.torch.load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"found more than weights in {file} ({str(error).splitlines()[0]})",
            "a file of tensors alone: pickled code is never run",
            "save its state_dict, best as .safetensors",
        ) from error
    except _DAMAGE as error:
        raise _unreadable(file, error) from error
    for nested in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(nested), dict):
            loaded = loaded[nested]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CheckpointError(f"found {type(loaded).__name__} in {file}", "tensors by name, as timm writes them")
    named = {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}
    return {name: tensor for name, tensor in named.items() if not re.match(r"(head|head_dist|pre_logits)\.", name)}


def _take_apart(model: Any) -> LoadedRoot:
    from evolve import timm_models  # takes seconds to import

    embed = getattr(model, "patch_embed", None)
    image_size = int((getattr(embed, "img_size", None) or (0,))[0])
    layers: dict[Position, tuple[LayerSpec, Tensors]] = {**timm_models.decompose(model, image_size)}
    mean, std = (np.asarray(model.pretrained_cfg.get(key) or (0.5, 0.5, 0.5)) for key in ("mean", "std"))
    if not (np.allclose(mean, 0.5) and np.allclose(std, 0.5)):
        _log.info("the checkpoint scales images by mean %s and deviation %s: folded into its patch embedding", mean, std)
        layers[PATCH_EMBED] = _fold_scaling(*layers[PATCH_EMBED], mean, std)
    return LoadedRoot(layers, image_size)


def _fold_scaling(
    spec: LayerSpec, tensors: Tensors, mean: npt.NDArray[Any], std: npt.NDArray[Any]
) -> tuple[LayerSpec, dict[str, npt.NDArray[np.float32]]]:
    """Changes a patch embedding made for images scaled by mean and deviation so that it takes images in [-1, 1]."""
    weight = np.asarray(tensors["proj.weight"], dtype=np.float64)
    bias = np.asarray(tensors.get("proj.bias", np.zeros(len(weight))), dtype=np.float64)
    # A pixel x in [-1, 1] is x / 2 + 1 / 2 in [0, 1], which the checkpoint saw as (x / 2 + 1 / 2 - mean) / std.
    bias = bias + np.einsum("wchv,c->w", weight, (0.5 - mean) / std)
    weight = weight * (0.5 / std)[:, None, None]
    folded = {"proj.weight": weight.astype(np.float32), "proj.bias": bias.astype(np.float32)}
    return LayerSpec.of(spec.kind, **{**spec.config, "bias": True}), folded
