"""Backbones, their presets and their sizes."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import ModelConfig
from ..config.renamed import current_names, old_names
from .backbone import Backbone, DiTOutput
from .dit import DiT
from .jit import JiT

BACKBONES: dict[str, type[Backbone]] = {"dit": DiT, "jit": JiT}

__all__ = ["BACKBONES", "Backbone", "DiT", "DiTOutput", "JiT", "load_model", "make_model", "save_model"]


def make_model(config: ModelConfig) -> Backbone:
    """A newly initialised model."""
    return BACKBONES[config.backbone](**{name: value for name, value in vars(config).items() if name != "backbone"})


def save_model(model: Backbone, folder: Path) -> None:
    """Save a model as its `save_pretrained` does, with all weights in one file, but without importing diffusers.

    Raises:
        OSError, SafetensorError: a file cannot be written.
    """
    written_by = {"_class_name": type(model).__name__, "_diffusers_version": version("diffusers")}
    # A loaded model has names of diffusers' beside its settings, as _name_or_path.
    settings = {name: value for name, value in model._internal_dict.items() if not name.startswith("_")}
    config = json.dumps(written_by | settings, indent=2, sort_keys=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config + "\n")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def load_model(folder: Path) -> Backbone:
    """Load a saved model of either backbone, in eval mode on the CPU.

    Raises:
        ValueError: the folder is no model of this library, or it is damaged.
    """
    classes = {backbone.__name__: backbone for backbone in BACKBONES.values()}
    try:
        config = json.loads((folder / "config.json").read_text())
        name = config.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} has no readable config.json, so it is no model") from error
    if name not in classes:
        raise ValueError(f"{folder} holds a model of class {name}; this library reads {', '.join(classes)}")
    try:
        if old_names(config):
            return _load_earlier(classes[name], config, folder).eval()
        return classes[name].from_pretrained(folder).eval()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load {folder}: {' '.join(str(error).split())}") from error


def _load_earlier(model_class: type[Backbone], config: dict[str, Any], folder: Path) -> Backbone:
    """Load a model that version 0.1 saved, whose settings and correction biases had other names."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    model = model_class(**current_names(settings))
    state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    model.load_state_dict(
        {name.replace(".router.correction", ".router.e_score_correction_bias"): state[name] for name in state}
    )
    return model
