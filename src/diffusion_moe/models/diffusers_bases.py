"""diffusers' base classes, which `Backbone` gets when diffusers is loaded or first needed.

Importing diffusers takes longer than importing torch, and training does not use it. So `Backbone` begins as a plain
module. It gets the bases when somebody imports them, or when a model is asked for a name that it does not have.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from torch import nn

from ..config import ModelConfig
from ..import_hooks import when_imported

HOMES = {
    "ModelMixin": "diffusers.models.modeling_utils",
    "ConfigMixin": "diffusers.configuration_utils",
    "AttentionMixin": "diffusers.models.attention",
    "PeftAdapterMixin": "diffusers.loaders.peft",
}


def add_bases_when_imported(model_class: type[nn.Module]) -> None:
    """Add each base as soon as its module is imported; none before `ModelMixin`."""

    def add_imported(_: ModuleType) -> None:
        found = [getattr(sys.modules.get(home), name, None) for name, home in HOMES.items()]
        if found[0] is not None:
            model_class.__bases__ = tuple(base for base in found if base is not None)

    for home in HOMES.values():
        when_imported(home, add_imported)


def import_bases() -> None:
    """Import diffusers' bases and attention backends."""
    for home in (*HOMES.values(), "diffusers.models.attention_dispatch"):
        import_module(home)


def takes_settings(init: Callable[..., None]) -> Callable[..., None]:
    """Give an `__init__(self, **settings)` the fields of `ModelConfig` as its signature, which diffusers reads."""
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in ModelConfig.__dataclass_fields__.values()
        if field.name != "backbone"
    ]
    init.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return init
