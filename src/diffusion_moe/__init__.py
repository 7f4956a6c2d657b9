"""Diffusion transformers with mixtures of experts: DiffMoE, DSMoE and their baselines."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import Recipe
    from .models import DiT, DiTOutput, JiT
    from .moe import MoEFeedForward, RouterConfig

# Loaded when first asked for, so that the MoE layer needs torch alone and `--help` needs neither.
_HOME = {
    "DiT": "models",
    "DiTOutput": "models",
    "JiT": "models",
    "MoEFeedForward": "moe",
    "Recipe": "config",
    "RouterConfig": "moe",
}

__all__ = ["DiT", "DiTOutput", "JiT", "MoEFeedForward", "Recipe", "RouterConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffusion_moe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
