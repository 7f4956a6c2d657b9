"""Fields of settings: their metadata, their types, and refusing a value.

What the project must know of a field beside its type and default is metadata of the field, declared by `setting`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

Change = Literal["never", "asked", "constant", "always"]
"""When a resumed run may have another value: never; with --resume changed; without it under a constant learning rate;
always."""
Affects = Literal["weights", "labels", "positions", "nothing"]
"""What of a model's weights a field changes: their shapes or meaning; the label table; the positions; nothing."""
UNKNOWN = object()
"""Stands for no value."""


class Range(NamedTuple):
    """Numbers that a field may have; null is checked by the type alone."""

    remedy: str
    holds: Callable[[float], bool]


POSITIVE = Range("it must be positive", lambda value: value > 0)
POSITIVE_OR_NULL = POSITIVE._replace(remedy="it must be positive, or null")
FRACTION = Range("choose from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Range("choose from 0 to below 1", lambda value: 0 <= value < 1)
SEED = Range("choose from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
NOT_NEGATIVE = Range("use 0 for none", lambda value: value >= 0)


def setting(
    default: Any,
    *,
    change: Change = "asked",
    common: bool = False,
    kinds: tuple[str, ...] = (),
    encode: bool = True,
    affects: Affects | None = None,
    group: str | None = None,
    reference: bool = True,
    before: Any = UNKNOWN,
    valid: Range | None = None,
) -> Any:
    """A field of a settings dataclass with its metadata.

    Args:
        default: its default.
        change: when a resumed run may have another value.
        common: `--help` shows it; `--help all` shows every field.
        kinds: values of data.kind that read it; empty: all.
        encode: the verb `encode` takes it (data).
        affects: what of the weights it changes (model); such a field never changes in a run.
        group: "text" or "experts" for fields that only models with text or experts read (model).
        reference: the papers' code has it too (model).
        before: the value that runs older than the field were trained with.
        valid: numbers that it may have, see `check_fields`.
    """
    metadata = {
        "change": "never" if affects else change,
        "common": common,
        "kinds": kinds,
        "encode": encode,
        "affects": affects,
        "group": group,
        "reference": reference,
        "before": before,
        "valid": valid,
    }
    return dataclasses.field(default=default, metadata=metadata)


def names_where(section: type, **metadata: Any) -> frozenset[str]:
    """Fields whose metadata has all these values."""
    return frozenset(
        field.name
        for field in dataclasses.fields(section)
        if all(field.metadata.get(key) == value for key, value in metadata.items())
    )


def older_values(section: type) -> dict[str, Any]:
    """Fields that recipes of older versions lack, with the values their runs were trained with."""
    fields = dataclasses.fields(section)
    return {f.name: f.metadata["before"] for f in fields if f.metadata.get("before", UNKNOWN) is not UNKNOWN}


def hints(section: type) -> dict[str, Any]:
    """The types of a dataclass' fields."""
    return _hints(section)


@cache
def _hints(section: type) -> dict[str, Any]:
    known = get_type_hints(section)
    return {field.name: known[field.name] for field in dataclasses.fields(section)}


def require(condition: bool, message: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(message)


def require_default(settings: Any, section: str, name: str, reason: str, remedy: str = "remove it") -> None:
    """Refuse another value than a field's default.

    Raises:
        ValueError: the field has another value.
    """
    value = getattr(settings, name)
    if value != type(settings).__dataclass_fields__[name].default:
        shown = ", ".join(value) if isinstance(value, tuple) else value
        raise ValueError(f"{section}.{name} is {shown}, {reason}; {remedy}")


def check_fields(settings: Any, section: str) -> None:
    """Check the numbers of a section, the elements of a tuple each, and the values of its Literals.

    Raises:
        ValueError: a number is outside of its field's range, or a value is not one of the field's.
    """
    for field in dataclasses.fields(settings):
        valid, value = field.metadata["valid"], getattr(settings, field.name)
        hint = hints(type(settings))[field.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"{section}.{field.name} is {value!r}; choose one of {choices}")
        values = value if isinstance(value, tuple) else (value,)
        if valid is not None and value is not None and not all(map(valid.holds, values)):
            verb = "are" if isinstance(value, tuple) else "is"
            raise ValueError(f"{section}.{field.name} {verb} {value}; {valid.remedy}")
