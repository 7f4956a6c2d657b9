"""Checks of the arguments of a model's forward."""

from __future__ import annotations

from torch import Tensor

from ..config import ModelConfig


def check_inputs(config: ModelConfig, hidden_states: Tensor, class_labels: Tensor | None, text: Tensor | None) -> None:
    """Check the arguments of a model's forward against its settings.

    Raises:
        ValueError: see `Backbone.forward`.
    """
    height, width = hidden_states.shape[-2:]
    if (class_labels is None) != (not config.num_classes):
        raise ValueError(
            f"class_labels are {'missing' if class_labels is None else 'given'}, but the model has num_classes "
            f"{config.num_classes}; pass them exactly when it is not 0"
        )
    if (text is None) != (not config.text_dim):
        raise ValueError(
            f"encoder_hidden_states are {'missing' if text is None else 'given'}, but the model has text_dim "
            f"{config.text_dim}; pass them exactly when it is not 0 (no prompt: a mask of false)"
        )
    if height % config.patch_size or width % config.patch_size or not height or not width:
        raise ValueError(
            f"the image is {height} x {width}; both must be positive multiples of patch_size {config.patch_size}"
        )
