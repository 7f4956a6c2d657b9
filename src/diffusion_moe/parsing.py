"""From YAML files and command lines to dataclasses, through jsonargparse; every mistake becomes one line."""

from __future__ import annotations

import argparse
import difflib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from .config import SECTIONS, Recipe

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def make_parser(verb: str, description: str, sections: Mapping[str, type] | None = None) -> ArgumentParser:
    """A parser for one verb, with the fields of each section as dotted options explained by their docstrings."""
    parser = ArgumentParser(
        prog=f"diffusion-moe {verb}",
        description=description,
        allow_abbrev=False,
        exit_on_error=False,
        print_config=None,
        default_env=False,
    )
    for name, section in (sections or {}).items():
        parser.add_class_arguments(section, name)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse and build the section dataclasses.

    Raises:
        ValueError: one line that names the option, its value and what is expected.
    """
    return _in_one_line(parser, lambda: parser.instantiate(_parsed(parser, arguments)))


def peek(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """The values as given: types are checked, sections not yet built, so that what contradicts may be filled in.

    Raises:
        ValueError: as `parse`.
    """
    return _in_one_line(parser, lambda: _parsed(parser, arguments))


def _in_one_line(parser: ArgumentParser, work: Callable[[], Namespace]) -> Namespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return work()
        except (argparse.ArgumentError, TypeError, ValueError) as error:
            raise ValueError(_one_line(str(error), parser)) from error


def _parsed(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Values as given. YAML takes a text that begins with # for a comment, that is for None; here it stays a text."""
    spelled = _usual_spelling(parser, arguments)
    parsed = parser.parse_args(spelled)
    texts = {
        f"--{action.dest}" for action in parser._actions if {str, NoneType} == {*get_args(_type_of(action))}
    }  # `str` alone is never read as YAML
    for argument, following in zip(spelled, [*spelled[1:], ""]):
        name, equals, value = argument.partition("=")
        value = value if equals else following
        if name in texts and value.lstrip().startswith("#"):
            parsed[name.removeprefix("--")] = value
    return parsed


def _usual_spelling(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Dashes for underscores in option names, and switches without a value, as most commands take them."""
    switches = {option for action in parser._actions if _is_switch(action) for option in action.option_strings}
    known = {option for action in parser._actions for option in action.option_strings}
    spelled = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        usual = "--" + name[2:].replace("-", "_") if name.startswith("--") else name
        name = usual if usual in known else name
        bare = not equals and (i + 1 == len(arguments) or arguments[i + 1].startswith("--"))
        spelled.append(f"{name}=true" if name in switches and bare else name + equals + value)
    return spelled


def _is_switch(action: argparse.Action) -> bool:
    return _type_of(action) is bool


def _type_of(action: argparse.Action) -> Any:
    return getattr(action, "_typehint", None)


def _one_line(message: str, parser: ArgumentParser) -> str:
    typed = re.search(r'Parser key "([^"]+)":(.*?)(?:Got value|Given value): (.*)$', message, re.DOTALL)
    if typed:
        name, problem, value = typed.groups()
        expected = re.findall(r"Expected an? (.+?)\.?\s*$", problem, re.MULTILINE)
        wanted = " or ".join(re.sub(r"<class '(\w+)'>", r"\1", kind) for kind in expected)
        wanted = re.sub(r"typing\.Literal\[(.*)\]", lambda match: f"one of {match[1].replace(chr(39), '')}", wanted)
        wanted = wanted.replace("NoneType", "null").replace("tuple", f"a list, as [{value.strip()}]")
        return f"{name} is {value.strip()}; expected {wanted}"
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown:
        return unknown_name(unknown[1].split("=")[0], [option for a in parser._actions for option in a.option_strings])
    return " ".join(message.split())


def unknown_name(name: str, known: Sequence[str]) -> str:
    """One line for a misspelled name, with the nearest known ones."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"there is no {name}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help for all names")


RECIPE_FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe, or `name` itself if it is a path to a YAML file.

    Raises:
        ValueError: no such file or recipe; the message names the nearest recipes.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.parent != Path():
        if not path.is_file():
            raise ValueError(f"there is no recipe file {name}; shipped recipes: {', '.join(recipe_names())}")
        return path
    if name in recipe_names():
        return RECIPE_FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0.4) or recipe_names()
    raise ValueError(f"there is no recipe {name!r}; did you mean {', '.join(near)}? See `diffusion-moe recipes`")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def recipe_arguments(path: Path) -> list[str]:
    """The fields of a recipe file as options, `--model.depth=4` and so on.

    Raises:
        ValueError: unreadable file, not a mapping of sections, or an unknown key, with its full path.
    """
    sections = read_yaml(path)
    if not isinstance(sections, dict):
        raise ValueError(f"recipe {path} is not a mapping of sections; it may hold {', '.join(SECTIONS)}")
    arguments = []
    for section, fields in sections.items():
        if section not in SECTIONS:
            raise ValueError(f"recipe {path}: {unknown_name(str(section), list(SECTIONS))}")
        if not isinstance(fields, dict):
            raise ValueError(f"recipe {path}: {section} is {fields!r}; expected a mapping of its fields")
        known = [f"{section}.{name}" for name in SECTIONS[section].__dataclass_fields__]  # type: ignore[attr-defined]
        for key, value in fields.items():
            if f"{section}.{key}" not in known:
                raise ValueError(f"recipe {path}: {unknown_name(f'{section}.{key}', known)}")
            arguments.append(f"--{section}.{key}={as_text(value)}")
    return arguments


def as_text(value: Any) -> str:
    """A value as an option's text."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def recipe_from(parsed: Namespace) -> Recipe:
    """The recipe out of parsed arguments."""
    return Recipe(**{name: parsed[name] for name in SECTIONS})


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a shipped one's name, or a YAML file; then apply options such as `--model.depth=4`.

    Raises:
        ValueError: one line that says what is wrong.
    """
    file = path if isinstance(path, Path) else find_recipe(path)
    return recipe_from(parse(_recipe_parser(), [*recipe_arguments(file), *overrides]))


@cache
def _recipe_parser() -> ArgumentParser:
    return make_parser("train", "", SECTIONS)
