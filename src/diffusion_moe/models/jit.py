"""JiT and JiTMoE: plain transformers on large pixel patches that predict the clean image (arXiv 2511.13720).

Shape suffixes: B images, N tokens of one image, D width, C channels, H and W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..moe import RoutingReport
from ..nn.norm import make_norm
from .backbone import Backbone, DiTOutput, takes_settings


class BottleneckPatchEmbedder(nn.Module):
    """From the numbers of a patch through a narrow layer to a token (JiT, the low-dimensional bottleneck)."""

    def __init__(self, patch_dim: int, bottleneck_dim: int, dim: int) -> None:
        super().__init__()
        self.proj1 = nn.Linear(patch_dim, bottleneck_dim, bias=False)
        self.proj2 = nn.Linear(bottleneck_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x))


class JiT(Backbone):
    """A diffusion transformer in pixel space, dense (JiT) or with mixtures of experts (JiTMoE).

    The keyword arguments are the fields of `diffusion_moe.config.ModelConfig`, where each is explained. What makes the
    published models: `prediction="x"`, `norm="rmsnorm"`, `qk_norm=True`, `position="sincos+rope2d"`,
    `rotary_pairs="neighbours"`, `mlp_activation="swiglu"`, `class_tokens=32` from the third part of the blocks on.

    Example:
        >>> from diffusion_moe import model_preset
        >>> model = JiT(**model_preset("jitmoe-b-16-e16"))
    """

    kind = "jit"

    @takes_settings
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        config = self.settings
        if config.class_tokens:
            self.class_positions = nn.Parameter(torch.empty(config.class_tokens, config.hidden_size))
            nn.init.normal_(self.class_positions, std=0.02)

    def make_patch_embedder(self) -> nn.Module:
        config = self.settings
        assert config.bottleneck_dim is not None
        return BottleneckPatchEmbedder(
            config.in_channels * config.patch_size**2, config.bottleneck_dim, config.hidden_size
        )

    def make_final_norm(self) -> nn.Module:
        """The same as in the blocks."""
        return make_norm(self.settings.norm, self.settings.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        return_dict: bool = True,
    ) -> DiTOutput | tuple[Tensor, tuple[RoutingReport, ...]]:
        """Predict what `prediction` says, mostly the clean image.

        Args:
            hidden_states: noisy images, (B, C, H, W), of any size that patches fill.
            timestep: t in [0, 1] (0 is noise), (B,) or a scalar.
            class_labels: classes, or `null_class` for none, int64, (B,); None for a model without classes.
            encoder_hidden_states: the text encoder's features, (B, L, text_dim); None for a model without text.
            encoder_attention_mask: which of them are tokens, bool, (B, L); None: all. A row without any is no prompt.
            pooled_projections: the encoder's pooled feature, (B, text_pooled_dim), if the model has that.

        Raises:
            ValueError: labels or text given to a model without, or missing for a model with them; a size that patches
                do not fill; features that are not the model's.
        """
        config = self.settings
        x, condition, label, text, still = self.embed(
            hidden_states, timestep, class_labels, encoder_hidden_states, encoder_attention_mask, pooled_projections
        )
        reports, grid = list[RoutingReport](), self.grid(hidden_states)
        rotary = self.rotary(still, grid)
        for index, block in enumerate(self.blocks):
            if config.class_tokens and index == config.class_tokens_from:
                assert label is not None
                x = torch.cat(((label[:, None] + self.class_positions).to(x.dtype), x), dim=1)
                still += config.class_tokens
                rotary = self.rotary(still, grid)
            x, report = self.run_block(block, x, condition, rotary, *text)
            if report is not None:
                reports.append(report)
        return self.to_output(x[:, still:], condition, reports, hidden_states.shape, return_dict)


JiT.__module__ = "diffusion_moe"
