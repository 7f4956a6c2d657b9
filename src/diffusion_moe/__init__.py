"""Diffusion transformers with mixtures of experts: DiffMoE, DSMoE and their baselines."""

from typing import TYPE_CHECKING, Any

from .pipelines.registration import register as _register_with_diffusers

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .analysis.recorder import record_routing
    from .config import Recipe
    from .models import DiT, DiTOutput, JiT
    from .models.presets import model_preset
    from .moe import MoEFeedForward, RouterConfig
    from .pipelines.class_to_image import ClassToImagePipeline
    from .pipelines.schedulers import default_scheduler
    from .pipelines.text_to_image import TextToImagePipeline

# Loaded when first asked for, so that the MoE layer needs torch alone and `--help` needs neither.
_HOME = {
    "ClassToImagePipeline": "pipelines.class_to_image",
    "DiT": "models",
    "DiTOutput": "models",
    "JiT": "models",
    "MoEFeedForward": "moe",
    "Recipe": "config",
    "RouterConfig": "moe",
    "TextToImagePipeline": "pipelines.text_to_image",
    "default_scheduler": "pipelines.schedulers",
    "model_preset": "models.presets",
    "record_routing": "analysis.recorder",
}

__all__ = [
    "ClassToImagePipeline",
    "DiT",
    "DiTOutput",
    "JiT",
    "MoEFeedForward",
    "Recipe",
    "RouterConfig",
    "TextToImagePipeline",
    "__version__",
    "default_scheduler",
    "model_preset",
    "record_routing",
]


def __getattr__(name: str) -> Any:
    if name == "ModelMixin":  # diffusers asks a library by this name which of its classes are models
        from diffusers import ModelMixin

        return ModelMixin
    if name not in _HOME:
        raise AttributeError(f"module 'diffusion_moe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


_register_with_diffusers()
