"""What a setting may be, in words, taken from its pydantic model, so that every refusal states the whole range allowed."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
import pydantic

_WITH_WORDS_OF_THEIR_OWN = frozenset(
    {"missing", "extra_forbidden", "value_error", "union_tag_invalid", "union_tag_not_found", "too_short", "too_long"}
)
"""Findings whose message says more than what may stand there."""

_KEY = "[key]"
"""What pydantic calls a table's key, after the key, where it is the key that cannot be used."""

Model = TypeVar("Model", bound=pydantic.BaseModel)


@dataclasses.dataclass(frozen=True)
class SettingFinding:
    """One setting that cannot be used.

    Attributes:
        name: dotted, such as `search.rounds` or `tasks.0.name`; empty for the settings as a whole.
        kind: of the finding, as pydantic names it, such as `missing` or `extra_forbidden`.
        found: what was given.
        expected: in words, with both ends of a range; or what else is wrong.
        is_allowed: whether `expected` says what may stand there, rather than what is wrong.
    """

    name: str
    kind: str
    found: Any
    expected: str
    is_allowed: bool


def validate(kind: type[Model], values: Mapping[str, Any]) -> Model:
    """Returns settings made of the values of a TOML file, each of its own type: "2" and true are no numbers.

    Args:
        kind: the settings.
        values: what the file says.

    Raises:
        pydantic.ValidationError: something is missing, unknown or impossible; see `findings`.
    """
    # JSON has a list where the settings have a tuple, and text where they have a path, and nothing else that is taken for another.
    return kind.model_validate_json(json.dumps(values, default=str), strict=True)


def findings(error: pydantic.ValidationError, kind: type[pydantic.BaseModel]) -> list[SettingFinding]:
    """Returns what is wrong with settings, one finding a setting, in the order of the settings.

    Args:
        error: what `validate` raised.
        kind: the settings.
    """
    details = error.errors(include_url=False)
    found: dict[tuple[str, str], SettingFinding] = {}
    for detail in details:
        location = detail["loc"]
        # A list whose items are refused counts as empty.
        if detail["type"] == "too_short" and any(
            len(other["loc"]) > len(location) and _is_below(other["loc"], location) for other in details
        ):
            continue
        name, expected = _allowed(kind, location)
        own_words = detail["type"] in _WITH_WORDS_OF_THEIR_OWN or not expected
        if own_words:
            expected = detail["msg"].removeprefix("Value error, ")
        # Each alternative of a setting has a finding of its own; together they say no more than the first.
        key = (name, expected)
        found.setdefault(key, SettingFinding(name, detail["type"], detail.get("input"), expected, not own_words))
    return list(found.values())


def _is_below(location: Sequence[Any], above: Sequence[Any]) -> bool:
    return tuple(location[: len(above)]) == tuple(above)


def _allowed(kind: Any, location: Sequence[int | str]) -> tuple[str, str]:
    """Returns a setting's name and what it may be, in words; no words if nothing is known of it."""
    names: list[str] = []
    annotation: Any = kind
    for part in location:
        inner = _step(annotation, part)
        if inner is None:
            # The rest of the location names one of several alternatives: no setting, and no name that its writer would know.
            if isinstance(part, str) and _is_model(annotation) and part != _KEY:
                names.append(part)
                annotation = None
            break
        annotation, is_name = inner
        if is_name:
            names.append(str(part))
    return ".".join(names), _describe(annotation) if annotation is not None else ""


def _step(annotation: Any, part: int | str) -> tuple[Any, bool] | None:
    """Returns what stands below an annotation, and whether `part` belongs to the setting's name; None if nothing does."""
    if _is_model(annotation):
        field = annotation.model_fields.get(part)
        if field is None:
            return None
        return (Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation), True
    for alternative in _alternatives(annotation):
        bare, _ = _unwrap(alternative)
        if isinstance(part, int) and get_origin(bare) is tuple:
            return get_args(bare)[0], True
        if isinstance(part, str) and get_origin(bare) is dict:
            return get_args(bare)[1], True
        if _is_model(bare) and part in _tags(bare):
            return bare, False
        if bare is not annotation and _is_model(bare) and part in bare.model_fields:
            return _step(bare, part)
    return None


def _tags(model: type[pydantic.BaseModel]) -> Iterator[Any]:
    """Yields the values of a model's fields that tell it from the others of a union."""
    for field in model.model_fields.values():
        if get_origin(field.annotation) is Literal and field.is_required():
            yield from get_args(field.annotation)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _unwrap(annotation: Any) -> tuple[Any, list[Any]]:
    """Returns an annotation without its metadata, and the metadata."""
    if get_origin(annotation) is not Annotated:
        return annotation, []
    bare, *metadata = get_args(annotation)
    flat: list[Any] = []
    for entry in metadata:
        flat += entry.metadata if isinstance(entry, pydantic.fields.FieldInfo) else [entry]
    return bare, flat


def _alternatives(annotation: Any) -> list[Any]:
    """Returns the members of a union, but for None, which TOML cannot say; else the annotation alone."""
    bare, _ = _unwrap(annotation)
    if get_origin(bare) in (Union, types.UnionType):
        return [member for inner in get_args(bare) if inner is not type(None) for member in _alternatives(inner)]
    return [annotation]


def _describe(annotation: Any) -> str:
    words = [_describe_one(*_unwrap(alternative)) for alternative in _alternatives(annotation)]
    # One alternative without words leaves the whole without: half of what is allowed would be wrong.
    return _join(list(dict.fromkeys(words))) if all(words) else ""


def _describe_one(bare: Any, metadata: Sequence[Any]) -> str:
    if get_origin(bare) is Literal:
        return _join([repr(value) for value in get_args(bare)])
    if get_origin(bare) is tuple:
        return "a list"
    if _is_model(bare) or get_origin(bare) is dict:
        return "a table"
    if bare in (int, float):
        return " ".join(filter(None, ["a whole number" if bare is int else "a number", _range(metadata, is_whole=bare is int)]))
    if any(isinstance(entry, pydantic.AfterValidator) for entry in metadata):
        return ""
    return {bool: "true or false", pathlib.Path: "a path", str: "text" + _length(metadata)}.get(bare, "")


def _range(metadata: Sequence[Any], *, is_whole: bool) -> str:
    names = ("ge", "gt", "le", "lt")
    bounds = {name: getattr(entry, name) for entry in metadata for name in names if getattr(entry, name, None) is not None}
    if is_whole and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    if is_whole and "lt" in bounds:
        bounds["le"] = bounds.pop("lt") - 1
    if bounds.keys() == {"ge", "le"}:
        return f"from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[name]} {bounds[name]}" for name in names if name in bounds)


def _length(metadata: Sequence[Any]) -> str:
    most = next((entry.max_length for entry in metadata if isinstance(entry, annotated_types.MaxLen)), None)
    least = next((entry.min_length for entry in metadata if isinstance(entry, annotated_types.MinLen)), 0)
    if most is None:
        return f" of at least {least} characters" if least else ""
    return f" of {most} character{'' if most == 1 else 's'}" if most == least else f" of {least} to {most} characters"


def _join(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
