"""How diffusers learns of us: after `import diffusion_moe`, `DiffusionPipeline.from_pretrained` loads what we saved.

diffusers looks a saved pipeline's class up among its own names, and loads components of libraries it knows only. We add
ourselves to both, and diffusers' bases to our models, when it loads the modules that hold them. This may be before or
after us, and imports nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

LIBRARY = "diffusion_moe"
PIPELINES = ("ClassToImagePipeline", "TextToImagePipeline")
LOADER = "diffusers.pipelines.pipeline_loading_utils"
MODELS = "diffusion_moe.models.backbone"
WATCHED = {
    LOADER,
    "diffusers.models.modeling_utils",
    "diffusers.models.attention",
    "diffusers.models.attention_dispatch",
    "diffusers.loaders.peft",
}
"""Modules of diffusers after whose import there is something to add."""


def register() -> None:
    """Make diffusers know us: now if it is loaded far enough, else as soon as it is."""
    if LOADER in sys.modules:
        _introduce(sys.modules[LOADER])
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds the watched modules as Python would, and has us introduced once one has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python's own spec for a watched module, with a loader that calls us afterwards; nothing for other names."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in WATCHED else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _loaded(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _loaded(module: ModuleType) -> None:
    """Add what the module is needed for."""
    if module.__name__ == LOADER:
        _introduce(module)
    elif MODELS in sys.modules:
        models = sys.modules[MODELS]
        models.add_loaded_bases(models.Backbone)


def _introduce(loader: ModuleType) -> None:
    """Name our library, and give `diffusers` our pipelines as attributes that are imported when asked for."""
    loadable = vars(loader).get("LOADABLE_CLASSES", {})
    loadable[LIBRARY] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    diffusers, kind = sys.modules["diffusers"], type(sys.modules["diffusers"])
    if not hasattr(kind, PIPELINES[0]):
        attributes = {name: property(partial(_ours, name)) for name in PIPELINES}
        diffusers.__class__ = type(kind.__name__, (kind,), {**attributes, "__module__": kind.__module__})


def _ours(name: str, module: ModuleType) -> type:
    return getattr(import_module(LIBRARY), name)
