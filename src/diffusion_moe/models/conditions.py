"""Inputs of the routers other than the tokens. Shape suffixes: B images, L tokens of a text, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..diffusion.ddpm import DDPM_STEPS
from ..moe import RoutingContext
from ..moe.precision import full_precision
from ..nn.norm import EPS


def routing_context(
    config: ModelConfig,
    timestep_B: Tensor,
    time_BD: Tensor,
    class_labels: Tensor | None,
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> RoutingContext | None:
    """The parts of the context that the model's routing rule looks at; None if it looks at none.

    Args:
        timestep_B: t, or with `process: ddpm` the step.
        time_BD: embedding of the time.
        class_labels: classes, or `num_classes` for none, (B,); None for a model without classes.
        text: features of prompts, (B, L, width); None for a model without text.
        text_mask: true at tokens, (B, L); None: everywhere.
    """
    if config.rule is None or not config.rule.sees or not config.moe_blocks:
        return None
    time_B = time_embedding_BD = unconditional_B = None
    if "time_B" in config.rule.sees:
        time_B = timestep_B.float()
        if config.process == "ddpm":
            time_B = 1 - time_B / DDPM_STEPS
    if "time_embedding_BD" in config.rule.sees:
        # Nucleus-Image normalises its embedding of time; the norm's learned scale is in the router's weight here.
        with full_precision(time_BD):
            time_BD = time_BD.to(torch.promote_types(time_BD.dtype, torch.float32))
            time_embedding_BD = F.rms_norm(time_BD, time_BD.shape[1:], eps=EPS)
    if "unconditional_B" in config.rule.sees:
        unconditional_B = unconditional_images(config, class_labels, text, text_mask)
    return RoutingContext(time_B, time_embedding_BD, unconditional_B)


def unconditional_images(
    config: ModelConfig, class_labels: Tensor | None, text: Tensor | None, text_mask: Tensor | None
) -> Tensor:
    """True for images without class and prompt, bool, (B,). Arguments as for `routing_context`."""
    missing = [] if class_labels is None else [class_labels == config.num_classes]
    if text is not None:
        has_prompt = text.new_ones(len(text), dtype=torch.bool) if text_mask is None else text_mask.bool().any(dim=1)
        missing.append(~has_prompt)
    return torch.stack(missing).all(dim=0)
