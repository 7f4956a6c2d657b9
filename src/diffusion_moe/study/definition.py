"""A study: a base recipe, variants of it, seeds and claims, read from a YAML file. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config import SECTIONS, Recipe, find_recipe, read_sections, read_yaml, require, to_dict, unknown_name
from ..config.build import build
from ..config.reading import Sections, build_recipe, merge
from ..counts import model_size
from .claims import Claim, read_claim
from .matching import MATCHED, with_matched_width

HASH_DIGITS = 12
ONE_SCALE = "all"
"""Name of the scale of a study without scales."""
CURVE_POINTS = 20
"""Held-out losses of a run whose recipe sets no logging.validate_every."""


@dataclass(frozen=True)
class StudyFields:
    """Fields of a study's file that are plain values."""

    recipe: str
    """The base recipe: a shipped one's name, or a YAML file."""
    output: Path
    """Folder of the runs, the records and the page."""
    reference: str
    """Variant that the others are compared with: activated parameters, time to quality."""
    title: str = "Study"
    text: str = ""
    """Paragraph under the page's title."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tolerance: float = 0.02
    """Share by which activated parameters may differ from the reference's."""
    modules: tuple[str, ...] = ()
    """Python files or modules that are imported first: they may register routing rules."""
    scores: bool = True
    """Score generated images of each run by FD and KID."""
    statistics: Path | None = None
    """Statistics of real images for FD and KID; unless given, a small classifier of the data makes them once."""

    def __post_init__(self) -> None:
        require(bool(self.seeds), "seeds are empty; give at least one")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds are {list(self.seeds)}; give each once")
        require(self.tolerance > 0, f"tolerance is {self.tolerance}; it must be positive")


@dataclass(frozen=True)
class Variant:
    """Settings that differ from the base recipe."""

    name: str
    overrides: Sections
    at: Mapping[str, Sections]
    """Further overrides by scale."""
    match: str | None = None
    """Width that is chosen so that the activated parameters are the reference's, as model.expert_dim."""
    unequal: bool = False
    """The variant may have other activated parameters than the reference."""
    scales: tuple[str, ...] = ()
    """Scales that it is trained at; empty: all."""


class StudyRun(NamedTuple):
    """One run of a study."""

    variant: str
    scale: str
    seed: int
    recipe: Recipe

    @property
    def hash(self) -> str:
        """Identifies the recipe: a hash of all values that are not defaults."""
        return recipe_hash(self.recipe)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.variant}-{self.scale}-seed{self.seed}-{self.hash}"


@dataclass(frozen=True)
class Study:
    """A whole study."""

    file: Path
    fields: StudyFields
    variants: Mapping[str, Variant]
    recipes: Mapping[tuple[str, str], Recipe]
    """Recipe of each variant and scale, with the first seed."""
    claims: tuple[Claim, ...]

    @property
    def scales(self) -> list[str]:
        """Names of the scales."""
        return list(dict.fromkeys(scale for _, scale in self.recipes))

    def runs(self) -> Iterator[StudyRun]:
        """All runs, scale by scale and seed by seed, so that a study that is stopped has whole pairs."""
        for scale in self.scales:
            for seed in self.fields.seeds:
                for variant in (name for name, at in self.recipes if at == scale):
                    recipe = self.recipes[variant, scale]
                    training = dataclasses.replace(recipe.training, seed=seed)
                    yield StudyRun(variant, scale, seed, dataclasses.replace(recipe, training=training))

    def check_equal(self) -> None:
        """Check the activated parameters of all variants but those that may be unequal.

        Raises:
            ValueError: some differ by more than the tolerance; names them with their numbers.
        """
        wrong = []
        for (name, scale), recipe in self.recipes.items():
            wanted = model_size(self.recipes[self.fields.reference, scale].model).activated
            found = model_size(recipe.model).activated
            if not self.variants[name].unequal and abs(found / wanted - 1) > self.fields.tolerance:
                wrong.append(f"{name} at {scale}: {found:,.0f}, {found / wanted - 1:+.1%} of {wanted:,.0f}")
        require(
            not wrong,
            f"activated parameters differ from those of {self.fields.reference} by more than "
            f"{self.fields.tolerance:.1%}: {'; '.join(wrong)}; change widths, give `match: model.expert_dim`, or mark "
            "a variant `unequal: true`",
        )


def recipe_hash(recipe: Recipe) -> str:
    """Start of a SHA-256 over the values that are not defaults: a new field with its default does not change it."""
    values = {}
    for section, fields in to_dict(recipe).items():
        usual = {field.name: _plain(field.default) for field in dataclasses.fields(SECTIONS[section])}
        values[section] = {name: value for name, value in fields.items() if value != usual[name]}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:HASH_DIGITS]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read_study(file: Path) -> Study:
    """Read a study, and make the recipes of its variants.

    Raises:
        ValueError: one line with the mistake.
    """
    content = read_yaml(file)
    require(isinstance(content, dict), f"{file} is no mapping; a study has recipe, output, reference and variants")
    content = dict(content)
    variants, scales = content.pop("variants", None), content.pop("scales", None) or {ONE_SCALE: {}}
    claims, shared = content.pop("claims", None) or [], content.pop("overrides", None) or {}
    fields = build(StudyFields, content, f"{file}: ")
    require(isinstance(variants, dict) and bool(variants), f"{file} has no variants; give names with their overrides")
    require(isinstance(scales, dict), f"{file}: scales is {scales!r}; give names with their overrides")
    import_modules(fields.modules)
    known = {str(name): _read_variant(str(name), values, scales, file) for name, values in variants.items()}
    require(
        fields.reference in known,
        f"{file}: the reference {fields.reference!r} is no variant; choose one of {', '.join(known)}",
    )
    base = merge(read_sections(find_recipe(fields.recipe)), read_overrides(shared, f"{file}: overrides"))
    layers = {str(name): read_overrides(values, f"{file}: scale {name}") for name, values in scales.items()}
    recipes = _make_recipes(base, layers, known, fields)
    read = tuple(read_claim(values, known, f"{file}: claim {i}") for i, values in enumerate(claims, start=1))
    return Study(file, fields, known, recipes, read)


def import_modules(names: tuple[str, ...]) -> None:
    """Import modules and Python files, each once in a process.

    Raises:
        ValueError: one cannot be imported.
    """
    for name in names:
        path = Path(name)
        try:
            if not name.endswith(".py"):
                importlib.import_module(name)
            elif path.stem not in sys.modules:
                spec = importlib.util.spec_from_file_location(path.stem, path)
                assert spec is not None and spec.loader is not None
                sys.modules[path.stem] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[path.stem])
        except (ImportError, OSError) as error:
            sys.modules.pop(path.stem, None)
            raise ValueError(f"modules: {name} cannot be imported ({error})") from error


def read_overrides(values: Any, where: str) -> Sections:
    """Overrides of a recipe: sections as in a recipe, or dotted names as in options.

    Raises:
        ValueError: a name is unknown, or the seed, which the study sets.
    """
    require(isinstance(values, dict | None), f"{where} is {values!r}; give overrides such as model.depth: 4")
    dotted: dict[str, Any] = {}
    for name, value in (values or {}).items():
        if name in SECTIONS and isinstance(value, dict):
            dotted |= {f"{name}.{field}": each for field, each in value.items()}
        else:
            dotted[str(name)] = value
    known = [f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)]
    sections: dict[str, dict[str, Any]] = {}
    for name, value in dotted.items():
        require(name in known, f"{where}: {unknown_name(name, known)}")
        require(name != "training.seed", f"{where} sets training.seed; give seeds instead")
        require(not name.startswith("init."), f"{where} sets {name}; variants of a study start from random weights")
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    return sections


def _read_variant(name: str, values: Any, scales: Mapping[str, Any], file: Path) -> Variant:
    where = f"{file}: variant {name}"
    require(isinstance(values, dict | None), f"{where} is {values!r}; give overrides such as model.router: dense")
    rest = dict(values or {})
    at, match, unequal = rest.pop("at", {}), rest.pop("match", None), rest.pop("unequal", False)
    only = rest.pop("scales", [])
    require(match in (None, *MATCHED), f"{where}: match is {match!r}; choose one of {', '.join(MATCHED)}")
    require(isinstance(unequal, bool), f"{where}: unequal is {unequal!r}; expected true or false")
    require(isinstance(only, list), f"{where}: scales is {only!r}; give a list of names")
    for scale in [*at, *only]:
        require(scale in scales, f"{where}: there is no scale {scale!r}; choose one of {', '.join(map(str, scales))}")
    layers = {str(scale): read_overrides(overrides, f"{where} at {scale}") for scale, overrides in at.items()}
    return Variant(name, read_overrides(rest, where), layers, match, unequal, tuple(map(str, only)))


def _make_recipes(
    base: Sections, scales: Mapping[str, Sections], variants: Mapping[str, Variant], fields: StudyFields
) -> dict[tuple[str, str], Recipe]:
    recipes = {}
    for scale, layer in scales.items():
        target: float | None = None
        trained = {name: variant for name, variant in variants.items() if scale in (variant.scales or scales)}
        require(
            fields.reference in trained,
            f"the reference {fields.reference} is not trained at scale {scale}; remove its scales",
        )
        for variant in sorted(trained.values(), key=lambda variant: variant.name != fields.reference):
            sections = merge(base, layer, variant.overrides, variant.at.get(scale, {}))
            if variant.match is not None and target is not None:
                sections = with_matched_width(sections, variant.match, target, variant.name)
            recipe = build_recipe(_with_logging(sections, fields.seeds[0]))
            target = model_size(recipe.model).activated if target is None else target
            recipes[variant.name, scale] = recipe
        _check_distinct({name: recipes[name, scale] for name in trained})
    return {(name, scale): recipes[name, scale] for scale in scales for name in variants if (name, scale) in recipes}


def _check_distinct(recipes: Mapping[str, Recipe]) -> None:
    """Refuse two variants with one recipe, which would be trained twice."""
    seen: dict[str, str] = {}
    for name, recipe in recipes.items():
        before = seen.setdefault(recipe_hash(recipe), name)
        require(before == name, f"the variants {before} and {name} have the same recipe; remove one")


def _with_logging(sections: Sections, seed: int) -> Sections:
    """Sections with what every run of a study needs: its seed, held-out losses of all held-out images, few files."""
    steps = int(sections.get("training", {}).get("steps", SECTIONS["training"]().steps))
    usual = {
        "logging": {"validate_every": max(1, steps // CURVE_POINTS), "validate_images": 4096, "tensorboard": False},
        "training": {"keep_checkpoints": 1},
    }
    return merge(usual, sections, {"training": {"seed": seed}})
