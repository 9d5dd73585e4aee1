"""What a report says of systems that never were: of any number of tasks at once, the same every time."""

from __future__ import annotations

import random
from typing import Any

from evolve.hyperparameters import Hyperparameters
from evolve.layer import HEAD, POS_EMBED, Layer, LayerKind, LayerSpec, Position
from evolve.outcomes import Outcomes
from evolve.path import Path, PlacedLayer, ordered_positions
from evolve.report.baselines import Baseline
from evolve.report.content import Content, compare, cost_of, rank
from evolve.report.mutations import payoffs
from evolve.report.searches import ROOT, Child, Search, SearchEnd
from evolve.report.structure import arrange
from evolve.summary import SystemSummary, TaskSummary

LONG_NAME = "a-task-whose-name-is-as-long-as-names-of-tasks-may-be-which-is-64"[:64]


def make_child(number: int = 0, **changes: Any) -> Child:
    """A child with unremarkable values, those named replaced."""
    values: dict[str, Any] = {
        "number": number,
        "generation": number // 8,
        "index": number % 8,
        "path_id": f"path-{number}",
        "parent_id": "root-id",
        "parent": ROOT,
        "mutations": (),
        "hyperparameters": Hyperparameters(num_blocks=3).to_dict(),
        "trained_layers": (),
        "quality": 0.5,
        "score": 0.5,
        "parent_score": None,
        "survived": True,
        "diverged": False,
        "stopped_early": False,
        "accounted_parameters": 10.0,
        "num_trained_images": 100,
        "flops": 1e9,
        "train_seconds": 2.0,
        "evaluate_seconds": 1.0,
    }
    return Child(**{**values, **changes})


def make_search(*children: Child, **changes: Any) -> Search:
    """A closed search of these children, whose best became current."""
    best = max(children, key=lambda child: child.score)
    values: dict[str, Any] = {
        "task": "one",
        "round": 0,
        "opened_after": 0,
        "num_planned": len(children),
        "num_generations": -(-len(children) // 8),
        "generation": (len(children) - 1) // 8,
        "scale_factor": 1.0,
        "quality_before": None,
        "children": children,
        "end": SearchEnd(best.path_id, best.quality, best.score, 0.5, 0.5, 3.0 * len(children) + 1.0, 0.0),
    }
    return Search(**{**values, **changes})


def make_task(name: str, **changes: Any) -> TaskSummary:
    """A task with unremarkable values, those named replaced."""
    values: dict[str, Any] = {
        "name": name,
        "path_id": f"path-of-{name}",
        "parent": ROOT,
        "quality": 0.6,
        "test_accuracy": 0.5,
        "rounds": 1,
        "private": False,
        "num_classes": 3,
        "image_size": 32,
        "num_blocks": 3,
        "dropped_blocks": 0,
        "adapters": (),
        "own_layers": ("head",),
        "root_layers": ("patch_embed",),
        "borrowed_layers": {},
        "num_parameters": 100,
        "own_parameters": 10,
        "accounted_parameters": 40.0,
        "outcomes": Outcomes(),
    }
    return TaskSummary(**{**values, **changes})


def make_baseline(method: str, task: str, **changes: Any) -> Baseline:
    """A baseline with unremarkable values, those named replaced."""
    values: dict[str, Any] = {
        "quality": 0.5,
        "test_accuracy": 0.45,
        "accounted_parameters": 100.0,
        "num_trained_images": 1000,
        "flops": 1e10,
        "train_seconds": 20.0,
        "evaluate_seconds": 5.0,
        "wall_seconds": 26.0,
    }
    return Baseline(method=method, task=task, **{**values, **changes})


def make_paths(layers: dict[str, dict[Position, str]], num_blocks: int = 3) -> dict[str, Path]:
    """Paths of tasks from the ids of the layers that are not the root's; a task drops blocks whose id is empty."""
    paths = {}
    for task, own in layers.items():
        dropped = {position for position, layer_id in own.items() if not layer_id}
        adapters = {position.block for position in own if position.kind is LayerKind.ADAPTER}
        blocks = num_blocks - len(dropped)
        placed = []
        for position in ordered_positions(blocks, [block for block in adapters if block is not None]):
            spec = LayerSpec.of(position.kind, width=4, **({"adapter_width": 8} if position.kind is LayerKind.ADAPTER else {}))
            layer_id = f"head of {task}" if position == HEAD else own.get(position, f"root {position}")
            placed.append(PlacedLayer(position, Layer(layer_id, spec, 10)))
        paths[task] = Path.of(
            task=task, layers=placed, hyperparameters=Hyperparameters(num_blocks=blocks), parent_id=None, quality=0.5
        )
    return paths


def make_content(num_tasks: int, *, methods: tuple[str, ...] = (), num_blocks: int = 12) -> Content:
    """All that a report says of so many tasks, drawn at random: shared layers, families, hyperparameters, costs."""
    draw = random.Random(num_tasks)
    names = [LONG_NAME, *(f"task-{number}" for number in range(1, num_tasks))]
    layers = _draw_layers(names, num_blocks, draw)
    paths = make_paths(layers, num_blocks)
    root_ids = {layer_id for path in paths.values() for layer_id in path.layer_ids if layer_id.startswith("root ")}
    trainers = {layer_id: layer_id.rpartition(" ")[2] for path in paths.values() for layer_id in path.layer_ids}
    structure = arrange(paths, trainers | dict.fromkeys(root_ids, ROOT), root_ids)
    searches = [_draw_search(name, place, draw) for place, name in enumerate(names)]
    tasks = tuple(
        make_task(
            name,
            quality=draw.uniform(0.6, 0.95),
            test_accuracy=draw.uniform(0.55, 0.95) if name != "task-3" else None,
            accounted_parameters=10 ** draw.uniform(5, 7),
        )
        for name in sorted(names)
    )
    baselines = [
        make_baseline(method, task.name, test_accuracy=draw.uniform(0.5, 0.9), accounted_parameters=10 ** draw.uniform(5.5, 7))
        for method in methods
        for task in tasks
    ]
    costs = tuple(cost_of(name, searches) for name in names)
    return Content(
        summary=SystemSummary("id", num_blocks, 1000, tasks, 100, 10_000, 20_000),
        standings=tuple(rank(tasks, baselines)),
        methods=tuple(compare(tasks, baselines, costs)),
        baselines=tuple(baselines),
        structure=structure,
        searches=tuple(searches),
        payoffs=tuple(payoffs(searches)),
        costs=costs,
        findings=(),
    )


def _draw_layers(names: list[str], num_blocks: int, draw: random.Random) -> dict[str, dict[Position, str]]:
    """Each task takes up another's layers or the root's, clones some and inserts adapters."""
    layers: dict[str, dict[Position, str]] = {}
    for name in names:
        own = dict(layers[draw.choice(list(layers))]) if layers and draw.random() < 0.6 else {}
        for position in ordered_positions(num_blocks, range(num_blocks), with_head=False):
            if position != POS_EMBED and draw.random() < 0.1:
                own[position] = f"{position} of {name}"
        layers[name] = own
    return layers


def _draw_search(name: str, place: int, draw: random.Random) -> Search:
    children: list[Child] = []
    kinds = ("learning_rate: 0.01 -> 0.02", "momentum: 0.9 -> 0.8", "adapter.1: insert", "block.2: clone", "norm: clone")
    for number in range(16):
        survivors = [child for child in children if child.survived]
        parent = draw.choice(survivors) if number > 2 else None
        score = draw.uniform(0.6, 0.9)
        mutations = tuple(kind for kind in kinds if parent is not None and draw.random() < 0.5)
        children.append(
            make_child(
                number,
                path_id=f"{name}-{number}",
                parent_id=parent.path_id if parent else "root-id",
                parent=name if parent else ROOT,
                mutations=mutations,
                hyperparameters=Hyperparameters(
                    num_blocks=draw.randint(1, 12),
                    learning_rate=draw.choice((0.001, 0.01, 0.1)),
                    image_size=draw.randrange(16, 385, 16),
                ).to_dict(),
                quality=score,
                score=score,
                parent_score=parent.score if parent else None,
                survived=parent is None or score > parent.score,
                diverged=draw.random() < 0.05,
                flops=draw.uniform(1e12, 9e14),
                train_seconds=draw.uniform(20, 900),
            )
        )
    return make_search(*children, task=name, opened_after=place)
