"""Dataclasses out of plain values, and recipes out of files and options."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from diffusion_moe.config import build, find_recipe, read_recipe, recipe_names, to_dict, to_yaml
from diffusion_moe.config.build import as_text, parse_text
from diffusion_moe.config.fields import hints
from diffusion_moe.config.reading import merge, parse_options


@dataclass(frozen=True)
class Settings:
    """One field of every type."""

    path: Path
    count: int = 1
    rate: float = 0.5
    switch: bool = False
    name: str = "a"
    label: str | None = None
    limit: float | None = None
    choice: Literal["none", "some", 3] = "none"
    decays: tuple[float, ...] = ()
    interval: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()


def from_options(*arguments):
    return build(Settings, {"path": "p"} | parse_options(arguments, hints(Settings)))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("--path=a/b", "path", Path("a/b")),
        ("--count=1_000", "count", 1000),
        ("--rate=1e-4", "rate", 1e-4),
        ("--rate=2", "rate", 2.0),
        ("--switch=yes", "switch", True),
        ("--name=12", "name", "12"),
        ("--name=#3", "name", "#3"),
        ("--name=[a", "name", "[a"),
        ("--label=#3", "label", "#3"),
        ("--label=", "label", ""),
        ("--label=null", "label", None),
        ("--limit=null", "limit", None),
        ("--limit=1E3", "limit", 1000.0),
        ("--choice=3", "choice", 3),
        ("--choice=some", "choice", "some"),
        ("--decays=[1e-3, 1]", "decays", (0.001, 1.0)),
        ("--decays=[]", "decays", ()),
        ("--interval=[0.1,1]", "interval", (0.1, 1.0)),
        ("--names=[a.b,c]", "names", ("a.b", "c")),
    ],
)
def test_texts_of_options_become_values(text, name, value):
    for arguments in ([text], text.split("=", 1)):
        found = getattr(from_options(*arguments), name)
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--count=1.5", "count is 1.5; expected int"),
        ("--count=true", "count is true; expected int"),
        ("--count=null", "count is null; expected int"),
        ("--count=1e3", "count is 1e3; expected int"),
        ("--rate=many", "rate is many; expected float"),
        ("--rate=false", "rate is false; expected float"),
        ("--limit=[1]", "limit is [1]; expected float or null"),
        ("--switch=1", "switch is 1; expected true or false"),
        ("--choice=true", "choice is true; expected one of none, some, 3"),
        ("--decays=0.5", "decays is 0.5; expected a list, as [0.5]"),
        ("--decays=[a]", "decays is [a]; expected a list of float"),
        ("--interval=[0.5]", "interval is [0.5]; expected a list of 2 float"),
        ("--cuont=3", "there is no --cuont; did you mean --count?"),
        ("--xyz=3", "there is no --xyz; see --help all for all names"),
        ("--count", "--count has no value; give one"),
        ("count=3", "'count=3' is not an option; options begin with --"),
    ],
)
def test_a_wrong_option_is_one_line(text, message):
    with pytest.raises(ValueError) as error:
        from_options(text)
    assert str(error.value) == message


def test_values_of_yaml_are_checked_like_options():
    assert build(Settings, {"path": "p", "rate": "1e-4", "interval": [0, "5e-1"]}, "a.") == Settings(
        Path("p"), rate=1e-4, interval=(0.0, 0.5)
    )
    for values, message in (
        ({"path": "p", "count": "4"}, "a.count is 4; expected int"),
        ({"path": ["p"]}, "a.path is [p]; expected a path"),
        ({"path": "p", "name": True}, "a.name is true; expected text"),
        ({"path": "p", "cuont": 4}, "there is no a.cuont; did you mean a.count?"),
        ({}, "a.path is missing; give it"),
    ):
        with pytest.raises(ValueError) as error:
            build(Settings, values, "a.")
        assert str(error.value) == message


def test_switches_dashes_and_the_last_value_count():
    types = hints(Settings) | {"two_words": bool}
    parsed = parse_options(["--switch", "--two-words", "--count", "2", "--count=-3"], types)
    assert parsed == {"switch": True, "two_words": True, "count": -3}
    assert parse_options(["--switch", "false"], types) == {"switch": False}


def test_later_layers_count():
    merged = merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": {"z": 4}}, {"b": {"z": 5}})
    assert merged == {"a": {"x": 1, "y": 3}, "b": {"z": 5}}


def test_every_value_of_a_recipe_survives_its_text_and_its_yaml(tmp_path):
    for name in recipe_names():
        recipe = read_recipe(name)
        options = []
        for section, fields in to_dict(recipe).items():
            for key, value in fields.items():
                options += [f"--{section}.{key}", as_text(value)]
        assert read_recipe("digits", options) == recipe
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert read_recipe(tmp_path / "again.yaml") == recipe
    assert parse_text("1e-4", float) == "1e-4"  # YAML 1.1: `build` makes it a number


def test_reading_all_recipes_is_fast_and_loads_neither_torch_nor_a_parser():
    code = """
import json, sys, time
from diffusion_moe.config import read_recipe, recipe_names
begin = time.process_time()
for name in recipe_names():
    read_recipe(name)
print(json.dumps([time.process_time() - begin, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = json.loads(result.stdout)
    assert seconds < 0.5
    assert not {"torch", "jsonargparse", "argparse", "numpy"} & set(loaded)
    assert find_recipe("digits").is_file()
