"""Fields of settings: their metadata, their types, and refusing a value.

What the project must know of a field beside its type and default is metadata of the field, declared by `setting`.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, Literal, get_type_hints

Change = Literal["never", "asked", "constant", "always"]
"""When a resumed run may have another value: never; with --resume changed; without it under a constant learning rate;
always."""
Affects = Literal["weights", "labels", "positions", "nothing"]
"""What of a model's weights a field changes: their shapes or meaning; the label table; the positions; nothing."""
UNKNOWN = object()
"""Stands for no value."""


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
