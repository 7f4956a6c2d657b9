"""The options of a verb: its first argument, and fields of dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One option of a verb."""

    name: str
    section: str
    """Name of the recipe's section; empty for the verb's own options."""
    kind: type
    """The dataclass."""
    field: Field


@dataclass(frozen=True)
class CommandLine:
    """The options of one verb."""

    verb: str
    description: str
    own: Sequence[type] = ()
    """Dataclasses whose fields are options of the verb."""
    sections: Mapping[str, type] = dataclasses.field(default_factory=dict)
    """Sections of a recipe by name, whose fields are dotted options."""
    first: tuple[str, str] | None = None
    """Name and meaning of the first argument, if there is one."""
    left_out: Mapping[type, Iterable[str]] = dataclasses.field(default_factory=dict)
    """Fields that are not options of the verb, by dataclass."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Defaults by name of option that differ from the dataclasses'."""
    program: str = "diffusion-moe "
    """Text before the verb in the usage."""

    def options(self) -> Iterator[Option]:
        """All options."""
        for section, kind in [*(("", kind) for kind in self.own), *self.sections.items()]:
            for field in dataclasses.fields(kind):
                if field.name not in self.left_out.get(kind, ()):
                    yield Option(f"{section}.{field.name}" if section else field.name, section, kind, field)

    def default(self, option: Option) -> Any:
        """The default of an option; `dataclasses.MISSING` for one that must be given."""
        return self.defaults.get(option.name, option.field.default)

    def usage(self) -> str:
        """The command in one line."""
        first = "" if self.first is None else f" {self.first[0].upper()}"
        required = [option.name for option in self.options() if self.default(option) is dataclasses.MISSING]
        return f"{self.program}{self.verb}{first}{''.join(f' --{n} {n.upper()}' for n in required)} [options]"
