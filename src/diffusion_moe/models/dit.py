"""The diffusion transformer of latents and small images: one backbone for every routing rule."""

from __future__ import annotations

from torch import nn

from .backbone import Backbone


class DiT(Backbone):
    """Diffusion transformer whose feed-forward layers are dense or MoE layers (DiT, DiffMoE, DSMoE).

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


# The public name, which save_pretrained writes and from_pretrained looks up.
DiT.__module__ = "diffusion_moe"
