"""From images with labels that are still to be read to a task's data: missing splits filled, training images limited, images read."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from evolve.config import CsvTask, FolderTask, HuggingFaceTask, TorchvisionTask
from evolve.data.cache import CacheReader
from evolve.data.reading import Files, MemoryReader, Reader, Unreadable
from evolve.data.splits import fill_missing, limited
from evolve.data.task import ImageSet, TaskData

ListedTask = FolderTask | CsvTask | TorchvisionTask | HuggingFaceTask


def load_listed(
    task: ListedTask,
    labels: tuple[str, ...],
    files: dict[str, Files],
    unreadable: Unreadable,
    progress: Callable[[int, int], None] | None = None,
) -> TaskData:
    """Reads the files of a task.

    Args:
        task: its settings.
        labels: names of the classes.
        files: of `train`, and of the splits that the source gives.
        unreadable: of this source; may have noted files already.
        progress: is told after each file how many are done, and of how many; those of a training set to be divided, or of which only
            readable images count towards a limit, count twice, as they are read twice.

    Raises:
        DataError: too few images to fill a missing split; a file that cannot be read; a cache that cannot be used.
    """
    described = source_of(task)
    train = files["train"]
    warnings: tuple[str, ...] = ()
    missing = [split for split in ("test", "validation") if split not in files]
    # What is left out must not take the place of an image that is there.
    look_first = bool(missing) or (unreadable.skip and task.limit_per_class is not None)
    steps = _Steps(progress, len(train) * look_first + sum(len(split) for split in files.values()))
    reader: Reader = (
        MemoryReader(unreadable, steps.tell)
        if task.cache is None
        else CacheReader(task.cache, image_folder(task), unreadable, steps.tell)
    )
    if look_first:
        contents = reader.contents(train)
        train = train.choose([index for index, content in enumerate(contents) if content is not None])
        files = {**files, "train": train}
    if missing:
        known = [content for content in contents if content is not None]
        divided, warnings = fill_missing(train.labels, known, missing, described)
        files |= {split: train.choose(indices) for split, indices in divided.splits.items()}
    train = files["train"]
    files = {**files, "train": train.choose(limited(train.labels, train.names, task.limit_per_class))}
    steps.expect(sum(len(split) for split in files.values()))
    images = {}
    for split, chosen in files.items():
        indices, pixels = reader.read(chosen)
        readable_files = chosen.choose(indices)
        images[split] = ImageSet(pixels, readable_files.labels, readable_files.names)
    warnings = (*unreadable.warnings(described), *warnings)
    return TaskData(task.name, labels, images["train"], images["validation"], images["test"], warnings)


def image_folder(task: ListedTask) -> pathlib.Path:
    """Returns the folder that names of images are relative to; there need be none of that name, but only one set of images has it."""
    if isinstance(task, TorchvisionTask):
        return task.folder / "-".join([task.dataset, *(str(value) for _, value in sorted(task.arguments.items()))])
    if isinstance(task, HuggingFaceTask):
        return pathlib.Path("/huggingface", task.path, task.config or "")
    return task.folder if task.folder is not None else task.file.parent


def source_of(task: ListedTask) -> str:
    """Returns what messages call the source of a task."""
    if isinstance(task, TorchvisionTask):
        return f"{task.dataset} in {task.folder}"
    if isinstance(task, HuggingFaceTask):
        return f"data set {task.path}"
    return f"folder {task.folder}" if isinstance(task, FolderTask) else f"table {task.file}"


class _Steps:
    """Counts files for whoever wants to know."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def expect(self, left: int) -> None:
        """Says how many steps are left, now that it is known."""
        self._total = self._done + left

    def tell(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
