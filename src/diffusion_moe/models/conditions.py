"""What each block is given beside the tokens, their positions and the modulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from .text import TextTokens


def further_inputs(text: TextTokens | None, unconditional_B: Tensor | None) -> tuple[Any, ...]:
    """The last arguments of `DiTBlock.forward`, without those that are None at the end."""
    if unconditional_B is not None:
        return text, unconditional_B
    return () if text is None else (text,)


def unconditional_images(
    config: ModelConfig, class_labels: Tensor | None, text: Tensor | None, text_mask: Tensor | None
) -> Tensor | None:
    """True for images without class and prompt, bool, (B,); None where the routing rule does not need it.

    Args:
        class_labels: classes, or `num_classes` for none, (B,); None for a model without classes.
        text: features of prompts, (B, L, width); None for a model without text.
        text_mask: true at tokens, (B, L); None: everywhere.
    """
    if config.rule is None or not config.rule.needs_labels:
        return None
    missing = [] if class_labels is None else [class_labels == config.num_classes]
    if text is not None:
        has_prompt = text.new_ones(len(text), dtype=torch.bool) if text_mask is None else text_mask.bool().any(dim=1)
        missing.append(~has_prompt)
    return torch.stack(missing).all(dim=0)
