"""What is published to be measured, and what came of it. Apart from what makes it: processes that measure a server need no torch."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A Vision Transformer.

    Attributes:
        name: for people.
        width: of the hidden states.
        heads: of each block's attention.
        blocks: how many.
        patch_size: in pixels.
        image_size: in pixels.
    """

    name: str
    width: int
    heads: int
    blocks: int
    patch_size: int
    image_size: int


SMALL = Architecture("ViT-S/16 at 224 px", 384, 6, 12, 16, 224)
CHARACTERS = Architecture("the bundled root: ViT-Ti/16, 3 blocks, 32 px", 192, 3, 3, 16, 32)
TINY = Architecture("ViT-Ti/16 at 224 px", 192, 3, 12, 16, 224)
SMOKE = Architecture("smoke: width 16, 3 blocks, 16 px", 16, 2, 3, 8, 16)


@dataclasses.dataclass(frozen=True)
class Own:
    """What a task has of its own, beside a final norm and a head; all else is the root's.

    Attributes:
        blocks: cloned ones.
        adapters: blocks before which it has one.
    """

    blocks: tuple[int, ...] = ()
    adapters: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """What is to be published.

    Attributes:
        name: of its folder.
        architecture: of the root.
        generations: tasks of each generation; tasks of earlier ones stay, and what a task has of its own is new each time it is named.
        whole: whether each task's route of the last generation is wanted as one ONNX file too.
        golden_images: that a server rehearses; fewer are published sooner, where torch has to answer them for many large tasks.
    """

    name: str
    architecture: Architecture
    generations: tuple[Mapping[str, Own], ...]
    whole: bool = False
    golden_images: int = 4


@dataclasses.dataclass(frozen=True)
class Published:
    """A system that was exported.

    Attributes:
        repository: the model repository; its first generation is current.
        whole: each task's route as one ONNX file, by name.
        shared: share of one forward pass, by floating point operations, in layers that all tasks have in common.
        image_size: in pixels.
    """

    repository: pathlib.Path
    whole: Mapping[str, pathlib.Path]
    shared: float
    image_size: int


def make_current(repository: pathlib.Path, number: int) -> None:
    """Makes a generation the current one, by a rename, as its publisher does."""
    written = repository / ".CURRENT"
    written.write_text(f"{number}\n")
    written.replace(repository / "CURRENT")
