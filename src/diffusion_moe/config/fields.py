"""Fields of settings: their metadata, their types, and refusing a value.

What the project must know of a field beside its type and default is metadata of the field, declared by `setting`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

Change = Literal["never", "asked", "constant", "always"]
"""Times when a resumed run may have another value: never; with --resume changed; without it under a constant learning
rate; always."""
Affects = Literal["weights", "labels", "positions", "nothing"]
"""Part of a model's weights that a field changes: their shapes or meaning; the label table; the positions; nothing."""


class Range(NamedTuple):
    """Numbers that a field may have; null is checked by the type alone."""

    remedy: str
    holds: Callable[[float], bool]


POSITIVE = Range("it must be positive", lambda value: value > 0)
POSITIVE_OR_NULL = POSITIVE._replace(remedy="it must be positive, or null")
FRACTION = Range("choose from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Range("choose from 0 to below 1", lambda value: 0 <= value < 1)
UP_TO_ONE = Range("it must be above 0 and at most 1", lambda value: 0 < value <= 1)
SEED = Range("choose from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
# The even average over all of training has the width 12 ** -0.5 = 0.289.
EMA_STD = Range("choose above 0 and at most 0.28", lambda value: 0 < value <= 0.28)
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
    before: Any = None,
    valid: Range | None = None,
) -> Any:
    """A field of a settings dataclass with its metadata.

    Args:
        change: when a resumed run may have another value.
        common: `--help` shows it; `--help all` shows every field.
        kinds: values of data.kind that read it; empty: all.
        encode: the verb `encode` takes it (data).
        affects: what of the weights it changes (model); such a field never changes in a run.
        group: "text" or "experts" for fields that only models with text or experts read (model).
        reference: the papers' code has it too (model).
        before: the value that runs older than the field were trained with, if it is not the default.
        valid: numbers that it may have, see `Settings`.
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
    return frozenset(field.name for field in dataclasses.fields(section) if metadata.items() <= field.metadata.items())


def older_values(section: type) -> dict[str, Any]:
    """Fields that recipes of older versions lack, with the values their runs were trained with."""
    fields = dataclasses.fields(section)
    return {field.name: field.metadata["before"] for field in fields if field.metadata["before"] is not None}


@cache
def hints(section: type) -> dict[str, Any]:
    """The types of a dataclass' fields."""
    known = get_type_hints(section)
    return {field.name: known[field.name] for field in dataclasses.fields(section)}


def require(condition: bool, message: str) -> None:
    """Refuse a setting by a ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


class Settings:
    """Base of the sections of a recipe and of a verb's options: the checks that all share."""

    def __post_init__(self) -> None:
        """Check the numbers, the elements of a tuple each, and the values of Literals.

        Raises:
            ValueError: a number is outside of its field's range, or a value is not one of the field's.
        """
        types = hints(type(self))  # type: ignore[arg-type]  # mypy does not know that classes have a hash
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name, hint, valid = field.name, types[field.name], field.metadata["valid"]
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                choices = ", ".join(map(str, get_args(hint)))
                raise ValueError(f"{self.prefix}{name} is {value!r}; choose one of {choices}")
            values = value if isinstance(value, tuple) else (value,)
            if valid is not None and value is not None and not all(map(valid.holds, values)):
                verb = "are" if isinstance(value, tuple) else "is"
                raise ValueError(f"{self.prefix}{name} {verb} {value}; {valid.remedy}")

    @property
    def prefix(self) -> str:
        """Text before a field's name in messages: "model." for `ModelConfig`; empty for options of a verb."""
        name = type(self).__name__
        return f"{name.removesuffix('Config').lower()}." if name.endswith("Config") else ""

    def require_default(self, name: str, reason: str, remedy: str = "remove it") -> None:
        """Refuse another value than a field's default."""
        value = getattr(self, name)
        if value != getattr(type(self), name):
            shown = ", ".join(value) if isinstance(value, tuple) else value
            raise ValueError(f"{self.prefix}{name} is {shown}, {reason}; {remedy}")

    def require_divisible(self, name: str, divisor: str) -> None:
        """Refuse a number that is not a multiple of another field's."""
        value, by = getattr(self, name), getattr(self, divisor)
        if value % by:
            raise ValueError(f"{self.prefix}{name} {value} is not divisible by {self.prefix}{divisor} {by}")
