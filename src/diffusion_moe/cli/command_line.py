"""The options of a verb: its first argument, and fields of dataclasses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
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
    description: str | None
    own: Sequence[type] = ()
    """Dataclasses whose fields are options of the verb."""
    sections: Mapping[str, type] = field(default_factory=dict)
    """Sections of a recipe by name, whose fields are dotted options."""
    first: tuple[str, str] | None = None
    """Name and meaning of the first argument, if there is one."""
    hidden: Mapping[type, Iterable[str]] = field(default_factory=dict)
    """Fields that are not options of the verb, by dataclass."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults by name of option that differ from the dataclasses'."""
    program: str = "diffusion-moe "
    """Text before the verb in the usage."""

    def options(self) -> Iterator[Option]:
        """All options."""
        for section, kind in [*(("", kind) for kind in self.own), *self.sections.items()]:
            for option in fields(kind):
                if option.name not in self.hidden.get(kind, ()):
                    yield Option(f"{section}.{option.name}" if section else option.name, section, kind, option)

    def default(self, option: Option) -> Any:
        """The default of an option; `dataclasses.MISSING` for one that must be given."""
        return self.defaults.get(option.name, option.field.default)

    def usage(self) -> str:
        """The command in one line."""
        first = "" if self.first is None else f" {self.first[0].upper()}"
        required = [option.name for option in self.options() if self.default(option) is MISSING]
        return f"{self.program}{self.verb}{first}{''.join(f' --{n} {n.upper()}' for n in required)} [options]"
