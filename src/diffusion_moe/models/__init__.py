"""Backbones, their presets and their sizes."""

import json
from pathlib import Path

from safetensors import SafetensorError

from ..config import ModelConfig
from .backbone import Backbone, DiTOutput
from .dit import DiT
from .jit import JiT

BACKBONES: dict[str, type[Backbone]] = {"dit": DiT, "jit": JiT}

__all__ = ["BACKBONES", "Backbone", "DiT", "DiTOutput", "JiT", "load_model", "make_model"]


def make_model(config: ModelConfig) -> Backbone:
    """A newly initialised model."""
    return BACKBONES[config.backbone](**{name: value for name, value in vars(config).items() if name != "backbone"})


def load_model(folder: Path) -> Backbone:
    """Load a saved model of either backbone, in eval mode on the CPU.

    Raises:
        ValueError: the folder is no model of this library, or it is damaged.
    """
    classes = {backbone.__name__: backbone for backbone in BACKBONES.values()}
    try:
        name = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} has no readable config.json, so it is no model") from error
    if name not in classes:
        raise ValueError(f"{folder} holds a model of class {name}; this library reads {', '.join(classes)}")
    try:
        return classes[name].from_pretrained(folder).eval()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load {folder}: {' '.join(str(error).split())}") from error
