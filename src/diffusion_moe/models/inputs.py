"""The arguments of a model's forward, checked, and what the blocks get of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..config import ModelConfig
from ..moe import RoutingContext
from .text import TextTokens


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


class Embedded(NamedTuple):
    """The input of the blocks."""

    tokens: Tensor
    """(B, N, D)."""
    condition: Tensor
    """Time, class and pooled text, (B, D)."""
    label: Tensor | None
    """The class alone, (B, D); None for a model without classes."""
    context: RoutingContext | None
    """Inputs of the routers other than the tokens; None for rules that have none."""
    text: TextTokens | None = None
    """Text for cross-attention; None without it."""
    text_tokens: int = 0
    """Number of text tokens at the front of `tokens`; 0 unless text and image form one sequence."""
