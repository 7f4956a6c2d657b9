"""Dataclasses out of plain values, as YAML gives them, checked by the types of the fields."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from .fields import hints
from .renamed import new_name

Section = TypeVar("Section")
EXPECTED = {int: "int", float: "float", bool: "true or false", str: "text", Path: "a path", NoneType: "null"}
"""The words for a type in a message."""


def build(section: type[Section], values: Mapping[str, Any], prefix: str = "") -> Section:
    """A dataclass out of values by the names of its fields; those that are not given have their defaults.

    Args:
        prefix: comes before the fields' names in messages, as "model.".

    Raises:
        ValueError: one line: an unknown name, a missing or wrong value, or settings that contradict each other.
    """
    types = hints(section)  # type: ignore[arg-type]  # mypy does not know that classes have a hash
    for name in values:
        if name not in types:
            raise ValueError(unknown_name(f"{prefix}{name}", [f"{prefix}{known}" for known in types]))
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in values and not has_default:
            raise ValueError(f"{prefix}{field.name} is missing; give it")
    return section(**{name: _convert(value, types[name], f"{prefix}{name}") for name, value in values.items()})


def parse_text(text: str, hint: Any) -> Any:
    """The plain value that an option's text means; `build` checks it."""
    kinds = get_args(hint) or (hint,)
    if NoneType in kinds and text == "null":
        return None
    if (str in kinds or Path in kinds) and get_origin(hint) is not tuple:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def unknown_name(name: str, known: Sequence[str]) -> str:
    """One line for a name of the version before, with its new one, or for a misspelled one, with the nearest ones."""
    renamed = new_name(name)
    if renamed is not None:
        return f"{name} is now {renamed}; rename it"
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    remedy = f"did you mean {' or '.join(near)}?" if near else "see --help all for all names"
    return f"there is no {name}; {remedy}"


def _convert(value: Any, hint: Any, name: str) -> Any:
    try:
        return _typed(value, hint)
    except ValueError as error:
        given = as_text(value)
        wanted = f"a list, as [{given}]" if get_origin(hint) is tuple and not isinstance(value, list) else words(hint)
        raise ValueError(f"{name} is {given}; expected {wanted}") from error


def _typed(value: Any, hint: Any) -> Any:
    """The value as the type says; a ValueError if it is none of that type."""
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        if any(value == choice and type(value) is type(choice) for choice in kinds):
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            kinds = (kinds[0],) * len(value) if kinds[1:] == (Ellipsis,) else kinds
            if len(kinds) == len(value):
                return tuple(_typed(item, kind) for item, kind in zip(value, kinds))
    elif kinds:  # a union with None
        return None if value is None else _typed(value, next(kind for kind in kinds if kind is not NoneType))
    elif hint is float:
        # A text too, because YAML 1.1 reads 1e-4, without a dot, as text.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    elif hint in (str, Path):
        if isinstance(value, str | Path) or (isinstance(value, int | float) and not isinstance(value, bool)):
            return hint(value)
    elif type(value) is hint:
        return value
    raise ValueError("of another type")


def words(hint: Any) -> str:
    """Words for the values of a type, for messages."""
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, kinds))}"
    if get_origin(hint) is tuple:
        inner = words(kinds[0])
        return f"a list of {inner}" if kinds[1:] == (Ellipsis,) else f"a list of {len(kinds)} {inner}"
    if kinds:
        return " or ".join(words(kind) for kind in kinds)
    return EXPECTED.get(hint, str(hint))


def as_text(value: Any) -> str:
    """A plain value as YAML in one line."""
    if isinstance(value, str | Path):
        return str(value)
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
