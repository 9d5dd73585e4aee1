"""Settings of an experiment, from one TOML file. Torch-free; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import pydantic

from evolve.errors import SettingsError
from evolve.hyperparameters import Hyperparameters, Schedule
from munet.names import check_task_name, similar_names
from munet.settings import SettingFinding, findings, validate

UnitInterval = Annotated[float, pydantic.Field(ge=0, le=1)]
PositiveInt = Annotated[int, pydantic.Field(ge=1)]
ImagesPerClass = Annotated[int, pydantic.Field(ge=1, le=10_000)]
"""Of what is rendered into memory."""
Threads = Annotated[int, pydantic.Field(ge=1, le=512)]
"""More than any one machine computes on, and few enough for every machine to start."""


class Settings(pydantic.BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RootSettings(Settings):
    """The pretrained path that a system starts from.

    Attributes:
        source: `bundled`: a root that comes with munet; `timm`: pretrained weights by timm's name, downloaded by timm; `file`: a
            local file, written by `munet-evolve pretrain` or a timm checkpoint (.safetensors, .pth, .bin).
        model: timm's model name; needed for `timm` and for a timm checkpoint; for `bundled` the root's name.
        file: the local file, relative to the experiment file.
        blocks: keep only the first so many blocks; all by default.
    """

    source: Literal["bundled", "timm", "file"] = "bundled"
    model: str | None = None
    file: pathlib.Path | None = None
    blocks: PositiveInt | None = None

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == "timm" and not self.model:
            raise ValueError("source 'timm' needs model, a name that timm knows, such as 'vit_tiny_patch16_224.augreg_in21k'")
        if self.source == "file" and self.file is None:
            raise ValueError("source 'file' needs file")
        if self.source != "file" and self.file is not None:
            raise ValueError(f"file is given, but source is {self.source!r}; use source = 'file'")
        return self


class DefaultSettings(Settings):
    """Hyperparameters that children of the root start from; see evolve.hyperparameters for each."""

    adapter_width: Annotated[int, pydantic.Field(ge=1, le=4096)] = 32
    learning_rate: Annotated[float, pydantic.Field(gt=0, le=1000)] = 0.01
    schedule: Schedule = "cosine"
    warmup_ratio: UnitInterval = 0.1
    momentum: Annotated[float, pydantic.Field(ge=0, lt=1)] | Literal["none"] = 0.9
    nesterov: bool = False
    image_size: Annotated[int, pydantic.Field(ge=8, le=1024)] = 32
    crop_area_min: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.05
    crop_aspect_min: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.75
    flip: bool = True
    brightness: UnitInterval = 0.0
    contrast: UnitInterval = 0.0
    saturation: UnitInterval = 0.0
    hue: Annotated[float, pydantic.Field(ge=0, le=0.5)] = 0.0

    def hyperparameters(self, num_blocks: int) -> Hyperparameters:
        """Returns them for a path of so many blocks."""
        values = self.model_dump()
        values["momentum"] = None if self.momentum == "none" else self.momentum
        return Hyperparameters(num_blocks=num_blocks, **values)


class SearchSettings(Settings):
    """How the search goes; the defaults are the published ones.

    Attributes:
        rounds: rounds every task is brought to.
        children_per_task: children trained per task and round, rounded up to whole generations.
        generation_size: children sampled together.
        mutation_rate: probability of each possible mutation.
        data_mutation_rate: that of data hyperparameters (augmentation and image size), which move once a generation, not once a child; by
            default `mutation_rate`.
        inherit_data: whether a generation that starts from seeds, of a task without a path of its own, takes the data hyperparameters of
            its first seed; otherwise the defaults, as published.
        auto_tune: whether every tunable hyperparameter mutates; otherwise, of these, only the number of blocks.
        mutate_blocks: whether the number of blocks mutates.
        fixed: hyperparameters that never mutate, by name, such as `image_size` for a root that saw images of one size alone.
        scale_factor: below 1 costs paths that add parameters; 1 is off.
        max_seeds: at most so many seeds; by default a quarter of `children_per_task`.
        early_stop: whether a child that cannot beat its parent any more stops before its last interval, see evolve.judgement.
    """

    rounds: PositiveInt = 2
    children_per_task: PositiveInt = 64
    generation_size: Annotated[int, pydantic.Field(ge=1, le=4096)] = 8
    mutation_rate: UnitInterval = 0.1
    data_mutation_rate: UnitInterval | None = None
    inherit_data: bool = False
    auto_tune: bool = False
    mutate_blocks: bool = True
    fixed: tuple[str, ...] = ()
    scale_factor: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    max_seeds: PositiveInt | None = None
    early_stop: bool = False

    @pydantic.field_validator("fixed")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = [field.name for field in dataclasses.fields(Hyperparameters)]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no hyperparameter; they are {', '.join(known)}")
        return names

    @property
    def num_generations(self) -> int:
        """Generations per task and round."""
        return -(-self.children_per_task // self.generation_size)

    @property
    def seed_limit(self) -> int:
        """At most so many seeds, the root included."""
        return self.max_seeds or max(1, self.children_per_task // 4)


class TrainingSettings(Settings):
    """How children train.

    Attributes:
        batch_size: images a batch.
        intervals: validations per child.
        batches_per_interval: at most so many batches between two validations.
        validation_batches: at most so many batches of the validation split are looked at.
        device: `auto` takes CUDA if there is one.
        precision: `bf16` trains and validates under bfloat16 autocast; CUDA only.
        threads: CPU threads a child trains with; part of the result.
        pack_size: children that are trained together, with what they share computed once; 1 trains one by one.
        workers: processes that train packs side by side, each with so many threads and a GPU of its own if there are several.
        executor: where they run: `processes` of this machine, or on the nodes of a Ray cluster.
        address: of the Ray cluster, as Ray names it: `host:port`; `auto` for the one that this machine belongs to (the default); `local`
            starts one on this machine for the time of the run.
        cpus_per_worker: CPUs that a worker takes of a Ray cluster's; `threads` by default.
        gpus_per_worker: GPUs that it takes, also a part of one; by default 1 where it trains on CUDA, else 0.
    """

    batch_size: Annotated[int, pydantic.Field(ge=1, le=65536)] = 256
    intervals: Annotated[int, pydantic.Field(ge=1, le=10_000)] = 5
    batches_per_interval: PositiveInt = 200
    validation_batches: PositiveInt = 10
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    threads: Threads = 2
    pack_size: Annotated[int, pydantic.Field(ge=1, le=1024)] = 1
    workers: Annotated[int, pydantic.Field(ge=1, le=256)] = 1
    executor: Literal["processes", "ray"] = "processes"
    address: str | None = None
    cpus_per_worker: Annotated[float, pydantic.Field(ge=0, le=4096)] | None = None
    gpus_per_worker: Annotated[float, pydantic.Field(ge=0, le=64)] | None = None

    @pydantic.model_validator(mode="after")
    def _of_ray(self) -> Self:
        given = [name for name in ("address", "cpus_per_worker", "gpus_per_worker") if getattr(self, name) is not None]
        if given and self.executor != "ray":
            raise ValueError(f"{given[0]} is given, but executor is {self.executor!r}; use executor = 'ray'")
        return self


NO_PART_OF_THE_RESULT = ("device", "workers", "executor", "address", "cpus_per_worker", "gpus_per_worker")
"""Settings of training that results do not depend on; of the device, a trainer's identity says which one was really used."""


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns groups of settings as a journal has them, what an earlier version did not have yet at its default."""
    defaults = {"defaults": DefaultSettings(), "search": SearchSettings(), "training": TrainingSettings()}
    complete = {group: {**defaults[group].model_dump(mode="json"), **settings[group]} for group in defaults if group in settings}
    return {**settings, **complete}


class AnyTask(Settings):
    """What every task has.

    Attributes:
        name: see munet.names.
        private: keeps other tasks from using this one's layers.
    """

    name: str
    private: bool = False

    @pydantic.field_validator("name")
    @classmethod
    def _allowed(cls, name: str) -> str:
        return check_task_name(name)


class ClassifiedTask(AnyTask):
    """What tasks of a user's own have in common.

    Attributes:
        classes: their names in their order, or a file with one name a line; by default all that are found, sorted.
        limit_per_class: use at most so many training images of each class.
    """

    classes: tuple[str, ...] | pathlib.Path | None = None
    limit_per_class: PositiveInt | None = None


class FilesTask(ClassifiedTask):
    """What tasks of image files have in common.

    Attributes:
        skip_unreadable: leave out images that cannot be read, with a warning that counts them; otherwise the first is an error.
        cache: a folder to keep decoded images in, for sets that are larger than the memory; by default they are held in memory.
    """

    skip_unreadable: bool = False
    cache: pathlib.Path | None = None


class FolderTask(FilesTask):
    """Images in one folder per class, with or without train/, validation/ and test/ above the classes.

    Attributes:
        folder: relative to the experiment file.
    """

    source: Literal["folder"]
    folder: pathlib.Path


class CsvTask(FilesTask):
    """Images that a table lists, one a line below a line of column names.

    Attributes:
        file: the table, relative to the experiment file.
        folder: what the paths in the table are relative to, itself relative to the experiment file; by default the table's folder.
        image_column: name of the column of paths.
        label_column: name of the column of class names.
        split_column: name of the column that says train, validation or test; by default `split` if there is such a column.
        delimiter: between cells, one character.
        encoding: of the table, as Python names it.
    """

    source: Literal["csv"]
    file: pathlib.Path
    folder: pathlib.Path | None = None
    image_column: str = "file"
    label_column: str = "label"
    split_column: str | None = None
    delimiter: Annotated[str, pydantic.Field(min_length=1, max_length=1)] = ","
    encoding: str = "utf-8"


class ArraysTask(ClassifiedTask):
    """Arrays of images and labels in one .npz file; whole numbers among the labels are indices of declared `classes`.

    Attributes:
        file: relative to the experiment file.
    """

    source: Literal["arrays"]
    file: pathlib.Path


class DigitsTask(AnyTask):
    """1,797 real handwritten digits that come with scikit-learn, 8 x 8 pixels, split 40/20/40 at random by seed.

    Attributes:
        split_seed: of the split.
        limit_per_class: use at most so many training images of each class.
    """

    source: Literal["digits"]
    split_seed: int = 0
    limit_per_class: PositiveInt | None = None


class CharactersTask(AnyTask):
    """Letters of one script rendered from the fonts that matplotlib ships, distorted; the same images for the same settings.

    Attributes:
        script: as Unicode names its characters, such as `GREEK`.
        train_per_class: training images of each letter.
        validation_per_class: validation images of each letter.
        test_per_class: test images of each letter.
        distortion: strength of rotation, shear, scale, shift, blur and noise; 0 is none.
        render_seed: of the distortion.
        max_classes: at most so many letters, those that most fonts draw; all by default.
        held_out_fonts: test images are drawn in fonts that training and validation never show, where a letter has enough of them.
    """

    source: Literal["characters"]
    script: str
    train_per_class: ImagesPerClass = 40
    validation_per_class: ImagesPerClass = 10
    test_per_class: ImagesPerClass = 20
    distortion: Annotated[float, pydantic.Field(ge=0, le=3)] = 1.0
    render_seed: int = 0
    max_classes: Annotated[int, pydantic.Field(ge=2)] | None = None
    held_out_fonts: bool = False


class TorchvisionTask(FilesTask):
    """A data set of torchvision.datasets; see evolve.data.torchvision_source for those that can be used.

    Attributes:
        dataset: name of its class, such as `MNIST`.
        folder: what torchvision calls its root, relative to the experiment file.
        arguments: of that class, such as `split` of `EMNIST`.
        download: let torchvision download what is not there; otherwise nothing is fetched.
        classes: other names for the set's classes, in its order; by default its own.
    """

    source: Literal["torchvision"]
    dataset: str
    folder: pathlib.Path
    arguments: dict[str, Any] = {}
    download: bool = False

    @pydantic.field_validator("arguments")
    @classmethod
    def _plain(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        odd = {name: value for name, value in arguments.items() if not isinstance(value, str | int | float | bool)}
        if odd:
            name, value = next(iter(odd.items()))
            raise ValueError(f"argument {name!r} is {value!r}; expected text, a number, true or false")
        return arguments


class HuggingFaceTask(FilesTask):
    """A data set of the Hugging Face hub, or local files in one of its layouts; needs the packages of the extra `huggingface`.

    Attributes:
        path: a folder, relative to the experiment file, if there is one; otherwise a name on the hub.
        config: of a set that has several.
        revision: branch, tag or commit of a set on the hub.
        image_column: by default the only column of images.
        label_column: by default the only column of class labels, or else `label` or `labels`.
        train_split: as the library slices them, such as `train[:90%]`; by default `train`.
        validation_split: by default `validation`, `val` or `valid`, if there is one.
        test_split: by default `test`, if there is one.
        download: fetch what is not on this machine; otherwise nothing is fetched.
    """

    source: Literal["huggingface"]
    path: str
    config: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    download: bool = False


TaskSettings = Annotated[
    FolderTask | CsvTask | ArraysTask | DigitsTask | CharactersTask | TorchvisionTask | HuggingFaceTask,
    pydantic.Field(discriminator="source"),
]


class Experiment(Settings):
    """Everything a run needs.

    Attributes:
        seed: of the search: sampling, batches, initial weights.
        tasks: in the order in which they are evolved in each round.
    """

    seed: Annotated[int, pydantic.Field(ge=0)] = 0
    root: RootSettings = RootSettings()
    defaults: DefaultSettings = DefaultSettings()
    search: SearchSettings = SearchSettings()
    training: TrainingSettings = TrainingSettings()
    tasks: Annotated[tuple[TaskSettings, ...], pydantic.Field(min_length=1)]

    @pydantic.model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"task names {twice} appear more than once; each task needs its own")
        return self


SettingsKind = TypeVar("SettingsKind", bound=Settings)

_PATHS = frozenset({"file", "folder", "classes", "cache"})
"""Settings that are paths where they are strings."""


def load_settings(file: pathlib.Path, kind: type[SettingsKind]) -> SettingsKind:
    """Reads settings from a TOML file; relative paths in it are taken from the file's folder.

    Args:
        file: the TOML file.
        kind: what to read, such as `Experiment`.

    Raises:
        SettingsError: the file is missing, no TOML, or a setting is unknown or impossible; every finding is named.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"could not read {file} ({error.strerror})", "a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"found no TOML in {file} ({error})", "a TOML file", "mend that line") from error
    try:
        return validate(kind, _anchor(values, file.parent))
    except pydantic.ValidationError as error:
        lines = "".join(f"\n  {_describe(finding, kind)}" for finding in findings(error, kind))
        raise SettingsError(f"found settings in {file} that cannot be used:{lines}", "the settings named above mended") from None


def _anchor(values: Any, folder: pathlib.Path) -> Any:
    """Makes the relative paths of the settings in _PATHS relative to the settings file's folder."""
    if isinstance(values, dict):
        anchored = {
            key: str(folder / value) if key in _PATHS and isinstance(value, str) else _anchor(value, folder)
            for key, value in values.items()
        }
        # A path or a name, as in the library itself: which of them, the folder decides.
        path = values.get("path") if values.get("source") == "huggingface" else None
        if isinstance(path, str) and "\0" not in path and (folder / path).exists():
            anchored["path"] = str((folder / path).absolute())
        return anchored
    if isinstance(values, list):
        return [_anchor(value, folder) for value in values]
    return values


def _describe(finding: SettingFinding, kind: type[Settings]) -> str:
    where = finding.name or kind.__name__
    if finding.kind == "extra_forbidden":
        key, known = where.rpartition(".")[2], _known_keys(kind)
        if key in known:
            return f"{where}: unknown setting here; it belongs to another table, or to tasks of another source"
        similar = similar_names(key, known)
        return f"{where}: unknown setting" + (f"; did you mean {' or '.join(map(repr, similar))}?" if similar else "")
    is_shown = not isinstance(finding.found, dict | list)
    if finding.is_allowed:
        found = repr(finding.found) if is_shown else "a table" if isinstance(finding.found, dict) else "a list"
        return f"{where}: found {found}, expected {finding.expected}"
    return f"{where}: {finding.expected}" + (f" (found {finding.found!r})" if is_shown else "")


def _known_keys(kind: Any, seen: frozenset[Any] = frozenset()) -> set[str]:
    """Returns the names of all settings anywhere below a kind."""
    keys: set[str] = set()
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, Settings) and candidate not in seen:
            for name, field in candidate.model_fields.items():
                keys |= {name} | _known_keys(field.annotation, seen | {candidate})
        elif candidate is not kind:
            keys |= _known_keys(candidate, seen)
    return keys
