"""Sampling a child: what it inherits, what mutates, and where each of its layers is found.

Source: muNet (arXiv 2205.10937), sections on mutations and on the search method.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence

from evolve.generation import ChildPlan, LayerPlan, Origin
from evolve.hyperparameters import DATA_NAMES, Hyperparameters, Tunable
from evolve.layer import HEAD, NORM, PATCH_EMBED, POS_EMBED, Layer, LayerKind, LayerSpec, Position
from evolve.mutation import insert_adapters, step_hyperparameters
from evolve.path import Path, ordered_positions
from evolve.position_embedding import position_embedding_spec
from evolve.specs import adapter_spec, head_spec


def derive_generator(*names: object) -> random.Random:
    """Returns a random generator of its own for what these names say, such as (seed, task, round, generation, child)."""
    return random.Random(derive_seed(*names))


def derive_seed(*names: object) -> int:
    """Returns a number from 0 to 2**63 - 1 that depends on these names alone."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What sampling needs to know of the system and the active task; fixed for one search.

    Attributes:
        task: name of the active task.
        num_classes: classes of the active task.
        root: the root path.
        frozen: ids of the layers of the root and of other tasks' current paths.
        position_embedding: gives the system's embedding for a grid of so many patches a side.
        tunables: what may mutate in a child.
        mutation_rate: probability of each possible mutation.
    """

    task: str
    num_classes: int
    root: Path
    frozen: frozenset[str]
    position_embedding: Callable[[int], Layer]
    tunables: Sequence[Tunable]
    mutation_rate: float

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.root.layer(PATCH_EMBED).spec.integer("width")

    def grid(self, image_size: int) -> int:
        """Returns the number of patches a side of an image."""
        return image_size // self.root.layer(PATCH_EMBED).spec.integer("patch_size")


def sample_child(
    index: int,
    lineage: Sequence[Path],
    inherited: Hyperparameters,
    data: Hyperparameters,
    surroundings: Surroundings,
    generator: random.Random,
    *,
    mutated: bool,
) -> ChildPlan:
    """Samples one child.

    Args:
        index: its number within the generation.
        lineage: the parent, then its ancestors from near to far, the root last.
        inherited: the parent's hyperparameters (for the root, the experiment's defaults).
        data: hyperparameters whose data group holds for the whole generation.
        surroundings: of this search.
        generator: this child's own.
        mutated: False for the first child of a seed: nothing frozen is cloned, only the head trains.
    """
    hyperparameters = inherited.replace(**{name: getattr(data, name) for name in DATA_NAMES})
    adapter_blocks = lineage[0].adapter_blocks
    mutations: list[str] = []
    rate = 0.0
    if mutated:
        rate = surroundings.mutation_rate
        hyperparameters, stepped = step_hyperparameters(hyperparameters, surroundings.tunables, rate, generator)
        adapter_blocks = tuple(block for block in adapter_blocks if block < hyperparameters.num_blocks)
        adapter_blocks, inserted = insert_adapters(hyperparameters.num_blocks, adapter_blocks, rate, generator)
        mutations = [*stepped, *inserted]
    layers = []
    for position in ordered_positions(hyperparameters.num_blocks, adapter_blocks):
        spec = _spec(position, hyperparameters, surroundings)
        source = _look_up(position, spec, lineage, surroundings)
        origin = _origin(position, source, surroundings, rate, generator, mutated=mutated)
        if mutated and origin is Origin.CLONED:
            mutations.append(f"{position}: clone")
        layers.append(LayerPlan(position, spec, origin, source))
    return ChildPlan(index, lineage[0].id, hyperparameters, tuple(layers), tuple(mutations), seed=generator.getrandbits(63))


def _spec(position: Position, hyperparameters: Hyperparameters, surroundings: Surroundings) -> LayerSpec:
    """Returns the kind and shape of the layer that a child with these hyperparameters needs at a position."""
    width = surroundings.width
    if position == POS_EMBED:
        grid = surroundings.grid(hyperparameters.image_size)
        return position_embedding_spec(width, grid, grid)
    if position == HEAD:
        return head_spec(width, surroundings.num_classes)
    if position.kind is LayerKind.ADAPTER:
        return adapter_spec(width, hyperparameters.adapter_width)
    return surroundings.root.layer(position).spec


def _look_up(position: Position, spec: LayerSpec, lineage: Sequence[Path], surroundings: Surroundings) -> Layer | None:
    """Returns the layer of the nearest ancestor that has one of this shape there; a head only of the active task; None if none."""
    for path in lineage:
        if position == HEAD and path.task != surroundings.task:
            continue
        found = path.find(position)
        if found is not None and found.spec == spec:
            return found
    if position == POS_EMBED:
        return surroundings.position_embedding(spec.integer("grid_height"))
    return None


def _origin(
    position: Position,
    source: Layer | None,
    surroundings: Surroundings,
    rate: float,
    generator: random.Random,
    *,
    mutated: bool,
) -> Origin:
    if source is None:
        return Origin.NEW
    if not _is_frozen(position, source, surroundings):
        return Origin.CONTINUED
    # A head is never shared, even one that happens to equal another task's; the final norm of a mutated child always trains.
    if position == HEAD or (position == NORM and mutated):
        return Origin.CLONED
    return Origin.CLONED if mutated and generator.random() < rate else Origin.SHARED


def _is_frozen(position: Position, layer: Layer, surroundings: Surroundings) -> bool:
    if layer.id in surroundings.frozen:
        return True
    # Resampled position embeddings belong to the root, whoever came to need that size first.
    return position == POS_EMBED and layer.id == surroundings.position_embedding(layer.spec.integer("grid_height")).id
