"""Recipes from YAML files and options: one way for the command, for runs and for tests."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .build import build, parse_text, unknown_name
from .fields import hints
from .recipe import SECTIONS, Recipe
from .renamed import current_sections

RECIPE_FOLDER = Path(__file__).parents[1] / "recipes"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Sections = Mapping[str, Mapping[str, Any]]
"""Plain values of a recipe's fields by section and name; what is left out has its default."""


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe, or `name` itself if it is a path to a YAML file."""
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
    """The content of a YAML file; a ValueError if it cannot be read."""
    try:
        return yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def read_sections(path: Path, old_names: bool = False) -> Sections:
    """The sections of a recipe file; an unknown key is refused with its full path.

    Args:
        old_names: take names of the version before too, as in the recipe of a run.
    """
    sections = read_yaml(path)
    if not isinstance(sections, dict):
        raise ValueError(f"recipe {path} is not a mapping of sections; it may hold {', '.join(SECTIONS)}")
    if old_names:
        sections = current_sections(sections)
    for section, fields in sections.items():
        if section not in SECTIONS:
            raise ValueError(f"recipe {path}: {unknown_name(str(section), list(SECTIONS))}")
        if not isinstance(fields, dict):
            raise ValueError(f"recipe {path}: {section} is {fields!r}; expected a mapping of its fields")
        known = [f"{section}.{name}" for name in hints(SECTIONS[section])]
        for name in (f"{section}.{key}" for key in fields):
            if name not in known:
                raise ValueError(f"recipe {path}: {unknown_name(name, known)}")
    return sections


def parse_options(arguments: Sequence[str], types: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of `--name=value` and `--name value`, by name; a dash in a name means an underscore.

    A switch (type bool) needs no value. The last of several values of one option counts. `types` has all known options.

    Raises:
        ValueError: an unknown option, or one without its value.
    """
    values, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"{argument!r} is not an option; options begin with --")
        given, equals, text = argument.partition("=")
        name = given[2:].replace("-", "_")
        if name not in types:
            raise ValueError(unknown_name(f"--{name}", [f"--{known}" for known in types]))
        if not equals and types[name] is bool and (not rest or rest[0].startswith("--")):
            text = "true"
        elif not equals and not rest:
            raise ValueError(f"{given} has no value; give one")
        elif not equals:
            text = rest.pop(0)
        values[name] = parse_text(text, types[name])
    return values


def merge(*layers: Sections) -> Sections:
    """Sections of several layers; a later layer's value counts."""
    names = dict.fromkeys(name for layer in layers for name in layer)
    return {name: {k: v for layer in layers for k, v in layer.get(name, {}).items()} for name in names}


def build_recipe(sections: Sections) -> Recipe:
    """A recipe out of plain values."""
    return Recipe(**{name: build(SECTIONS[name], fields, f"{name}.") for name, fields in sections.items()})


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a shipped one's name, or a YAML file; then apply options such as `--model.depth=4`."""
    file = path if isinstance(path, Path) else find_recipe(path)
    types = {f"{name}.{key}": kind for name, section in SECTIONS.items() for key, kind in hints(section).items()}
    given: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, value in parse_options(overrides, types).items():
        section, _, key = name.partition(".")
        given[section][key] = value
    return build_recipe(merge(read_sections(file), given))
