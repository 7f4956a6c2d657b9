"""How diffusers learns of us: after `import diffusion_moe`, `DiffusionPipeline.from_pretrained` loads what we saved.

diffusers looks a saved pipeline's class up among its own names, and loads components of libraries it knows only. We add
ourselves to both when it loads the module that does so, which may be before or after us, without importing it.
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


def register() -> None:
    """Make diffusers know us: now if it is loaded far enough, else as soon as it is."""
    if LOADER in sys.modules:
        _introduce(sys.modules[LOADER])
    elif not any(isinstance(finder, _Herald) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Herald())


class _Herald(MetaPathFinder):
    """Finds `LOADER` as Python would, and has us introduced once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python's own spec for `LOADER`, with a loader that introduces us afterwards; nothing for other names."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == LOADER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _introduce(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


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
