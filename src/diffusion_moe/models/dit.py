"""The diffusion transformer of latents: one backbone for every routing rule.

Shape suffixes: B images, N tokens of one image, D width, C channels, H and W pixels.
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..moe import RoutingReport
from .backbone import Backbone, DiTOutput, takes_settings


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

    @register_to_config
    @takes_settings
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.build(settings)

    def make_patch_embedder(self) -> nn.Module:
        """One linear layer."""
        config = self.settings
        return nn.Linear(config.in_channels * config.patch_size**2, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> DiTOutput | tuple[Tensor, tuple[RoutingReport, ...]]:
        """Predict what `prediction` says, mostly the velocity.

        Args:
            hidden_states: noisy images or latents, (B, C, H, W).
            timestep: t in [0, 1] (0 is noise), or with `process: ddpm` the step from 0 (data) to 999, (B,) or a scalar.
            class_labels: classes, or `null_class` for none, int64, (B,); None for an unconditional model.

        Raises:
            ValueError: labels given to an unconditional model, or missing for a conditional one.
        """
        x, condition, _ = self.embed(hidden_states, timestep, class_labels)
        reports, rotary = [], self.rotary()
        for block in self.blocks:
            x, report = self.run_block(block, x, condition, rotary)
            if report is not None:
                reports.append(report)
        return self.to_output(x, condition, reports, hidden_states.shape, return_dict)


# What save_pretrained records and from_pretrained looks up: the public name.
DiT.__module__ = "diffusion_moe"
