"""From a command line to plain values and dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ..config.build import build
from ..config.fields import hints
from ..config.reading import Sections, parse_options
from .command_line import CommandLine
from .help import help_text

Options = TypeVar("Options")


class Given(NamedTuple):
    """The plain values that a command line has."""

    first: str
    """The first argument."""
    values: Mapping[type | str, dict[str, Any]]
    """Values by field, of the verb's own dataclasses and of a recipe's sections by name."""

    @property
    def sections(self) -> Sections:
        """Values by section and field of a recipe."""
        return {name: values for name, values in self.values.items() if isinstance(name, str)}

    def options(self, kind: type[Options], defaults: Mapping[str, Any] | None = None) -> Options:
        """A dataclass of the verb's own options; `defaults` are values for what is not given."""
        return build(kind, {**(defaults or {}), **self.values[kind]})


def parse(line: CommandLine, arguments: Sequence[str]) -> Given:
    """The values of a verb's options as given; `--help` prints the help and ends the command.

    Raises:
        ValueError: the first argument is missing, or an option is unknown.
    """
    for i, argument in enumerate(arguments):
        if argument in ("-h", "--help"):
            print(help_text(line, everything=list(arguments[i + 1 : i + 2]) == ["all"]))
            raise SystemExit(0)
    first, rest = "", list(arguments)
    if line.first is not None:
        if not arguments or arguments[0].startswith("-"):
            raise ValueError(f"the {line.first[0]} is missing; usage: {line.usage()}")
        first = rest.pop(0)
    options = {option.name: option for option in line.options()}
    keys: list[type | str] = [*line.own, *line.sections]
    values: dict[type | str, dict[str, Any]] = {key: {} for key in keys}
    types = {name: hints(option.kind)[option.field.name] for name, option in options.items()}
    for name, value in parse_options(rest, types).items():
        option = options[name]
        values[option.section or option.kind][option.field.name] = value
    return Given(first, values)
