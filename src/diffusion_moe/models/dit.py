"""The diffusion transformer: one backbone for every routing rule.

Shape suffixes: B images, N tokens of one image, D width, C channels, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..config import ModelConfig
from ..moe import FeedForward, MoEFeedForward, RouterConfig, RoutingReport
from ..nn.attention import SelfAttention
from ..nn.embeddings import TimestepEmbedder, patchify, unpatchify
from ..nn.norm import make_norm, modulate
from ..nn.position import Rotary, rotary_table, sincos_table


@dataclass
class DiTOutput(BaseOutput):
    """What the model answers."""

    sample: Tensor
    """Predicted velocity (and, with learn_sigma, as many channels more), (B, C, H, W)."""
    routing: tuple[RoutingReport, ...] = ()
    """What each MoE layer's router learned, in the order of the layers."""


class BlockOutput(NamedTuple):
    """Tokens after a block, and its router's report if it has one."""

    hidden_states: Tensor
    report: RoutingReport | None


class DiTBlock(nn.Module):
    """Attention and a feed-forward layer, dense or a mixture, both modulated by adaLN-Zero (DiT section 3.2)."""

    def __init__(self, config: ModelConfig, is_moe: bool) -> None:
        super().__init__()
        D = config.hidden_size
        self.norm1, self.norm2 = make_norm(config.norm, D), make_norm(config.norm, D)
        self.attn = SelfAttention(D, config.num_heads, config.num_kv_heads, config.qk_norm)
        self.mlp = _moe(config) if is_moe else FeedForward(D, int(D * config.mlp_ratio), config.mlp_activation)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x_BND: Tensor, condition_BD: Tensor, rotary: Rotary | None) -> BlockOutput:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(condition_BD).chunk(6, dim=-1)
        x_BND = x_BND + gate1[:, None] * self.attn(modulate(self.norm1(x_BND), shift1, scale1), rotary)
        y_BND = self.mlp(modulate(self.norm2(x_BND), shift2, scale2))
        report = None
        if isinstance(self.mlp, MoEFeedForward):
            y_BND, report = y_BND
        return BlockOutput(x_BND + gate2[:, None] * y_BND, report)


class FinalLayer(nn.Module):
    """Modulated norm and a projection back to pixels."""

    def __init__(self, config: ModelConfig, out_features: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.norm = make_norm(config.norm, D)
        self.linear = nn.Linear(D, out_features)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        shift, scale = self.adaln(condition_BD).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x_BND), shift, scale))


def _moe(config: ModelConfig) -> MoEFeedForward:
    assert config.router != "dense"
    return MoEFeedForward(
        dim=config.hidden_size,
        expert_dim=config.expert_dim,
        router=RouterConfig(
            kind=config.router,
            num_experts=config.num_experts,
            top_k=config.top_k,
            capacity=config.capacity,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            routed_scale=config.routed_scale,
            balance=config.balance,
            balance_weight=config.balance_weight,
            balance_rate=config.balance_rate,
            capacity_loss_weight=config.capacity_loss_weight,
            threshold_decay=config.threshold_decay,
            inference_pool=config.inference_pool,
        ),
        activation=config.expert_activation,
        bias=config.expert_bias,
        shared=config.shared,
        shared_dim=config.shared_dim,
        shared_bias=config.shared_bias,
    )


def is_moe_block(config: ModelConfig, index: int) -> bool:
    """Whether block `index` is a mixture: the odd ones (or all), after the first `skip_first`."""
    return config.router != "dense" and index >= config.skip_first and (index % 2 == 1 or not config.interleave)


class DiT(ModelMixin, ConfigMixin):
    """Diffusion transformer whose feed-forward layers are dense or mixtures of experts.

    The keyword arguments are the fields of `diffusion_moe.config.ModelConfig`, where each is explained; an unknown one
    is refused. `save_pretrained` and `from_pretrained` are diffusers'.

    Example:
        >>> model = DiT(sample_size=8, in_channels=1, hidden_size=64, depth=4, num_heads=4, num_classes=10,
        ...             num_experts=8, expert_dim=32)
        >>> velocity = model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([3, 7])).sample
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]  # noqa: RUF012 - the name and type are diffusers'
    _repeated_blocks = ["DiTBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["router"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        sample_size: int = ModelConfig.sample_size,
        patch_size: int = ModelConfig.patch_size,
        in_channels: int = ModelConfig.in_channels,
        learn_sigma: bool = ModelConfig.learn_sigma,
        hidden_size: int = ModelConfig.hidden_size,
        depth: int = ModelConfig.depth,
        num_heads: int = ModelConfig.num_heads,
        num_kv_heads: int | None = ModelConfig.num_kv_heads,
        qk_norm: bool = ModelConfig.qk_norm,
        norm: str = ModelConfig.norm,
        position: str = ModelConfig.position,
        mlp_ratio: float = ModelConfig.mlp_ratio,
        mlp_activation: str = ModelConfig.mlp_activation,
        num_classes: int = ModelConfig.num_classes,
        router: str = ModelConfig.router,
        num_experts: int = ModelConfig.num_experts,
        expert_dim: int = ModelConfig.expert_dim,
        expert_activation: str = ModelConfig.expert_activation,
        expert_bias: bool = ModelConfig.expert_bias,
        top_k: int = ModelConfig.top_k,
        capacity: float = ModelConfig.capacity,
        num_groups: int = ModelConfig.num_groups,
        top_groups: int = ModelConfig.top_groups,
        routed_scale: float = ModelConfig.routed_scale,
        shared: str = ModelConfig.shared,
        shared_dim: int | None = ModelConfig.shared_dim,
        shared_bias: bool = ModelConfig.shared_bias,
        balance: str = ModelConfig.balance,
        balance_weight: float = ModelConfig.balance_weight,
        balance_rate: float = ModelConfig.balance_rate,
        capacity_loss_weight: float = ModelConfig.capacity_loss_weight,
        threshold_decay: float = ModelConfig.threshold_decay,
        inference_pool: str = ModelConfig.inference_pool,
        interleave: bool = ModelConfig.interleave,
        skip_first: int = ModelConfig.skip_first,
    ) -> None:
        settings: dict[str, Any] = dict(locals())
        super().__init__()
        self.settings = config = ModelConfig(**{name: settings[name] for name in ModelConfig.__dataclass_fields__})
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        D, P, side = config.hidden_size, config.patch_size, config.sample_size // config.patch_size
        self.x_embedder = nn.Linear(config.in_channels * P * P, D)
        self.t_embedder = TimestepEmbedder(D)
        # One row more than there are classes: the null class of guidance.
        self.y_embedder = nn.Embedding(config.num_classes + 1, D) if config.num_classes else None
        self.blocks = nn.ModuleList(DiTBlock(config, is_moe_block(config, i)) for i in range(config.depth))
        self.final_layer = FinalLayer(config, P * P * self.out_channels)
        self._register_positions(side)
        self.gradient_checkpointing = False
        self.reset_parameters()

    def _register_positions(self, side: int) -> None:
        """Fixed tables, remade with the model and so not saved with it."""
        config = self.settings
        self.rotary_axes = {"sincos": 0, "rope1d": 1, "rope2d": 2}[config.position]
        if self.rotary_axes:
            rotary = rotary_table(side, side, config.hidden_size // config.num_heads, self.rotary_axes)
            self.register_buffer("rotary_cos", rotary.cos_NI, persistent=False)
            self.register_buffer("rotary_sin", rotary.sin_NI, persistent=False)
        else:
            self.register_buffer("pos_embed", sincos_table(side, side, config.hidden_size), persistent=False)

    @property
    def null_class(self) -> int | None:
        """The label that means no class; None for an unconditional model."""
        return self.settings.num_classes or None

    def reset_parameters(self) -> None:
        """Xavier-uniform linears, zero biases; normal 0.02 embeddings; zero modulation and output (adaLN-Zero).

        Experts and routers keep the initialisation of their own classes.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.t_embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.weight, std=0.02)
        for adaln in [module.adaln for module in self.modules() if isinstance(module, DiTBlock | FinalLayer)]:
            for parameter in adaln.parameters():
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> DiTOutput | tuple[Tensor, tuple[RoutingReport, ...]]:
        """Predict the velocity.

        Args:
            hidden_states: noisy images or latents, (B, C, H, W). timestep: t in [0, 1] (0 is noise), (B,) or a scalar.
            class_labels: classes, or `null_class` for none, int64, (B,); None for an unconditional model.

        Raises:
            ValueError: labels given to an unconditional model, or missing for a conditional one.
        """
        if (class_labels is None) != (self.y_embedder is None):
            raise ValueError(
                f"class_labels are {'missing' if class_labels is None else 'given'}, but the model has num_classes "
                f"{self.settings.num_classes}; pass them exactly when it is not 0"
            )
        x = self.x_embedder(patchify(hidden_states, self.settings.patch_size))
        condition = self.t_embedder(timestep.expand(len(x)))
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(class_labels)
        rotary = None
        if self.rotary_axes:
            rotary = Rotary(self.rotary_cos, self.rotary_sin, self.rotary_axes)
        else:
            x = x + self.pos_embed.to(x.dtype)
        reports = []
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, report = self._gradient_checkpointing_func(block, x, condition, rotary)
            else:
                x, report = block(x, condition, rotary)
            if report is not None:
                reports.append(report)
        height, width = hidden_states.shape[-2:]
        sample = unpatchify(self.final_layer(x, condition), self.settings.patch_size, height, width)
        if not return_dict:
            return sample, tuple(reports)
        return DiTOutput(sample=sample, routing=tuple(reports))


# What save_pretrained records and from_pretrained looks up: the public name.
DiT.__module__ = "diffusion_moe"
