"""JiT and JiTMoE: transformers on large pixel patches that predict the clean image (arXiv 2511.13720)."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn.norm import make_norm
from .backbone import Backbone


class BottleneckPatchEmbedder(nn.Module):
    """Projection of a patch to a token through a low dimension (JiT, the bottleneck)."""

    def __init__(self, patch_dim: int, bottleneck_dim: int, dim: int) -> None:
        super().__init__()
        self.proj1 = nn.Linear(patch_dim, bottleneck_dim, bias=False)
        self.proj2 = nn.Linear(bottleneck_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x))


class JiT(Backbone):
    """Diffusion transformer in pixel space, dense (JiT) or with MoE layers (JiTMoE).

    The keyword arguments are the fields of `diffusion_moe.config.ModelConfig`, where each is explained. The papers'
    models have `prediction="x"`, `norm="rmsnorm"`, `qk_norm=True`, `position="sincos+rope2d"`,
    `rotary_pairs="neighbours"`, `mlp_activation="swiglu"`, and `class_tokens=32` from the third part of the blocks on.

    Example:
        >>> from diffusion_moe import model_preset
        >>> model = JiT(**model_preset("jitmoe-b-16-e16"))
    """

    kind = "jit"

    def make_patch_embedder(self) -> nn.Module:
        """Two linear layers, through `bottleneck_dim`."""
        config = self.settings
        assert config.bottleneck_dim is not None
        return BottleneckPatchEmbedder(
            config.in_channels * config.patch_size**2, config.bottleneck_dim, config.hidden_size
        )

    def make_final_norm(self) -> nn.Module:
        """The same norm as in the blocks."""
        return make_norm(self.settings.norm, self.settings.hidden_size)


JiT.__module__ = "diffusion_moe"
