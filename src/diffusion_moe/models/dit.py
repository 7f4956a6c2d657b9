"""The diffusion transformer of latents: one backbone for every routing rule.

Shape suffixes: B images, N tokens of one image, D width, C channels, H and W pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..moe import RoutingReport
from .backbone import Backbone, DiTOutput


class DiT(Backbone):
    """Diffusion transformer whose feed-forward layers are dense or mixtures of experts (DiT, DiffMoE, DSMoE).

    The keyword arguments are the fields of `diffusion_moe.config.ModelConfig`, where each is explained; an unknown one
    is refused. `save_pretrained` and `from_pretrained` are diffusers'.

    Example:
        >>> model = DiT(sample_size=8, in_channels=1, hidden_size=64, depth=4, num_heads=4, num_classes=10,
        ...             num_experts=8, expert_dim=32)
        >>> velocity = model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([3, 7])).sample
    """

    kind = "dit"

    def make_patch_embedder(self) -> nn.Module:
        """One linear layer."""
        config = self.settings
        return nn.Linear(config.in_channels * config.patch_size**2, config.hidden_size)

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
        """Predict what `prediction` says, mostly the velocity.

        Args:
            hidden_states: noisy images or latents, (B, C, H, W), of any size that patches fill.
            timestep: t in [0, 1] (0 is noise), or with `process: ddpm` the step from 0 (data) to 999, (B,) or a scalar.
            class_labels: classes, or `null_class` for none, int64, (B,); None for a model without classes.
            encoder_hidden_states: the text encoder's features, (B, L, text_dim); None for a model without text.
            encoder_attention_mask: which of them are tokens, bool, (B, L); None: all. A row without any is no prompt.
            pooled_projections: the encoder's pooled feature, (B, text_pooled_dim), if the model has that.

        Raises:
            ValueError: labels or text given to a model without, or missing for a model with them; a size that patches
                do not fill; features that are not the model's.
        """
        x, condition, _, text, text_tokens = self.embed(
            hidden_states, timestep, class_labels, encoder_hidden_states, encoder_attention_mask, pooled_projections
        )
        reports, rotary = [], self.rotary(text_tokens, self.grid(hidden_states))
        for block in self.blocks:
            x, report = self.run_block(block, x, condition, rotary, *text)
            if report is not None:
                reports.append(report)
        return self.to_output(x[:, text_tokens:], condition, reports, hidden_states.shape, return_dict)


# What save_pretrained records and from_pretrained looks up: the public name.
DiT.__module__ = "diffusion_moe"
