"""Export of the EMA models of a finished run."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..config import Recipe
from ..data import ImageDataset
from ..distributed import barrier
from ..models import Backbone, save_model
from ..run_folder import DATA, ORIGIN, RunFolder
from .initialization import merge_adapters
from .parallelize import whole_model
from .state import TrainState


def export_models(run: RunFolder, state: TrainState, recipe: Recipe, dataset: ImageDataset) -> None:
    """Save the EMA models, each whole or not at all, with metadata of their training and data.

    Raises:
        OSError: one cannot be written; names its folder.
    """
    for decay, ema in {recipe.training.ema_decay: state.ema, **state.extra_emas}.items():
        is_extra = ema is not state.ema
        target = run.ema_model(decay) if is_extra else run.model
        model = whole_model(ema, recipe)
        if model is None:
            continue
        model = merge_adapters(model, recipe.init, None if is_extra else run.lora)
        training = {"training_steps": state.step, "ema_decay": decay}
        save_model_folder(model, target, {ORIGIN: training, DATA: dataset.metadata()})
    barrier()


def save_model_folder(model: Backbone, target: Path, metadata: dict[str, dict[str, Any]]) -> None:
    """Save a model and its metadata, by name of file; the folder is replaced once all of it is written.

    Raises:
        OSError: it cannot be written; names the folder, of which nothing is left.
    """
    folder = target.with_name(f"{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        save_model(model, folder)
        for name, content in metadata.items():
            (folder / name).write_text(json.dumps(content) + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = f"cannot write the model ({getattr(error, 'strerror', None) or error})"
        raise OSError(getattr(error, "errno", None) or errno.EIO, reason, str(folder)) from error
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
