"""Registration with diffusers: after `import diffusion_moe`, `DiffusionPipeline.from_pretrained` loads our pipelines.

diffusers looks up a saved pipeline's class among its own names, and loads components of known libraries only.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from types import ModuleType

from ..import_hooks import when_imported

LIBRARY = "diffusion_moe"
PIPELINES = ("ClassToImagePipeline", "TextToImagePipeline")


def register() -> None:
    """Make diffusers know our library: now if it is loaded, else as soon as it is."""
    when_imported("diffusers.pipelines.pipeline_loading_utils", _introduce)


def _introduce(loader: ModuleType) -> None:
    """Name our library, and give `diffusers` our pipelines as attributes, which are imported on first use."""
    loader.LOADABLE_CLASSES[LIBRARY] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    diffusers = sys.modules["diffusers"]
    kind = type(diffusers)
    if not hasattr(kind, PIPELINES[0]):
        attributes = {name: property(partial(_pipeline, name)) for name in PIPELINES}
        diffusers.__class__ = type(kind.__name__, (kind,), {**attributes, "__module__": kind.__module__})


def _pipeline(name: str, module: ModuleType) -> type:
    return getattr(import_module(LIBRARY), name)
