"""What a generation and its questions are in Triton: which models, which ensemble, which outputs."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

from server.generation import Generation
from server.questions import LoadedGeneration, RouteTree


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How Triton is asked some tasks of one image size.

    Attributes:
        ensemble: the model to ask.
        outputs: the name of each task's logits there, by task.
        tree: where their images run.
        models: names of the ensemble and of every segment that they run through.
        max_rows: images in one request, at most. So many fill a batch of every segment on their way.
    """

    ensemble: str
    outputs: Mapping[str, str]
    tree: RouteTree
    models: frozenset[str]
    max_rows: int


class HeldGeneration(LoadedGeneration):
    """A generation that the engine holds, with plans for its questions."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(generation)
        self.plan = functools.lru_cache(maxsize=self.NUM_TREES)(self._plan)

    @functools.cached_property
    def ensembles(self) -> frozenset[str]:
        """Names of its ensembles."""
        tasks = self.generation.tasks.values()
        return frozenset([*(task.ensemble for task in tasks), *self.generation.ensembles.values()])

    @functools.cached_property
    def models(self) -> frozenset[str]:
        """Names of all its models."""
        return self.ensembles | self.generation.segments.keys()

    @functools.cached_property
    def asked(self) -> frozenset[str]:
        """Names of the models that some plan runs through: all but ensembles over a single task, which has one of its own."""
        sizes = collections.Counter(task.image_size for task in self.generation.tasks.values())
        return self.models.difference(name for size, name in self.generation.ensembles.items() if sizes[size] == 1)

    @functools.cached_property
    def task_through(self) -> Mapping[str, str]:
        """For each segment, the name of a task that runs through it."""
        return {segment: task.name for task in self.generation.tasks.values() for segment in task.route}

    def plan_through(self, model: str) -> Plan:
        """Returns a plan that runs through one of its models."""
        for task in self.generation.tasks.values():
            if task.ensemble == model:
                return self.plan((task.name,))
        for size, ensemble in self.generation.ensembles.items():
            if ensemble == model:
                of_size = [task.name for task in self.generation.tasks.values() if task.image_size == size]
                return self.plan(tuple(of_size[:2]))
        return self.plan((self.task_through[model],))

    def _plan(self, tasks: Sequence[str]) -> Plan:
        generation = self.generation
        first = generation.tasks[tasks[0]]
        ensemble, outputs, within = first.ensemble, {first.name: "logits"}, [first]
        if len(tasks) > 1:
            ensemble, outputs = generation.ensembles[first.image_size], {name: f"logits_{name}" for name in tasks}
            within = [task for task in generation.tasks.values() if task.image_size == first.image_size]
        # An ensemble takes as many rows as the one of its segments that takes the fewest, whether it is asked or not.
        max_rows = min(generation.segments[name].max_batch_size for task in within for name in task.route)
        tree = self.tree(tuple(tasks))
        models = frozenset([ensemble, *(branch.segment for branch in tree.branches)])
        return Plan(ensemble, outputs, tree, models, max_rows)
