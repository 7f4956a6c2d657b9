"""Architectures of the papers by name: the `model` sections of the shipped recipes."""

from __future__ import annotations

from typing import Any

from ..config import read_recipe, recipe_names
from ..models import Backbone, make_model


def preset_names() -> list[str]:
    """Names of the shipped recipes, such as `dsmoe-s-e16`; docs/models.md describes them."""
    return recipe_names()


def model_preset(name: str) -> dict[str, Any]:
    """Keyword arguments for `DiT` (for `JiT` if the name starts with jit) of a shipped recipe.

    Raises:
        ValueError: no such recipe; the message names the nearest ones.

    Example:
        >>> model = DiT(**model_preset("dsmoe-s-e16") | {"num_classes": 10})
    """
    return {key: value for key, value in vars(read_recipe(name).model).items() if key != "backbone"}


def make_preset(name: str) -> Backbone:
    """A newly initialised `DiT` or `JiT` of a shipped recipe.

    Raises:
        ValueError: no such recipe; the message names the nearest ones.
    """
    return make_model(read_recipe(name).model)
