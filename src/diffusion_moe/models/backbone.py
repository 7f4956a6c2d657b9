"""What the backbones share: conditioning, blocks, output, and their life as diffusers models.

Shape suffixes: B images, N tokens of one image, D width, C channels, H and W pixels.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import TEXT_FIELDS, ModelConfig
from ..moe import GroupedExperts, RoutingReport
from ..nn.attention import CrossAttention
from ..nn.embeddings import TimestepEmbedder, patchify, unpatchify
from ..nn.norm import make_norm
from ..nn.position import Rotary, rotary_table, sincos_table
from .block import DiTBlock, FinalLayer
from .diffusers_bases import ATTRIBUTES, HOMES, add_all_bases, add_loaded_bases
from .text import TextEmbedder, TextTokens


class DiTOutput(NamedTuple):
    """Output of a model. As diffusers' outputs, it can also be indexed by name."""

    sample: Tensor
    """The prediction (and, with learn_sigma, as many channels more), (B, C, H, W)."""
    routing: tuple[RoutingReport, ...] = ()
    """What each MoE layer's router learned, in the order of the layers."""

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else tuple(self)[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields in order."""
        return tuple(self)


RENAMED = {
    "num_groups": "n_group",
    "top_groups": "topk_group",
    "routed_scale": "routed_scaling_factor",
    "interleave": "moe_layer_freq",
    "skip_first": "first_k_dense",
}
"""Settings by their names in models of an earlier version, whose routers also kept their bias under another name."""

Grid = tuple[int, int]
"""Rows and columns of an image's tokens."""


class Embedded(NamedTuple):
    """The input of the blocks."""

    tokens: Tensor
    """(B, N, D)."""
    condition: Tensor
    """Time, class and pooled text, (B, D)."""
    label: Tensor | None
    """The class alone, (B, D); None for a model without classes."""
    text: tuple[TextTokens, ...]
    """What the blocks attend to; empty without text, and where its tokens are among `tokens`."""
    text_tokens: int
    """How many of `tokens` are the text's; they come first."""


def takes_settings(init: Callable[..., None]) -> Callable[..., None]:
    """Give an `__init__(self, **settings)` the fields of `ModelConfig` as its signature, which diffusers reads."""
    fields = ModelConfig.__dataclass_fields__.values()
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields
        if field.name != "backbone"
    ]
    init.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return init


class Backbone(nn.Module):
    """Embed, add positions, apply the blocks, project back. Subclasses say how patches become tokens.

    It becomes a diffusers model (ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin) as soon as diffusers is
    loaded; until then, asking for anything of theirs loads it.

    Attributes:
        settings: the fields of `ModelConfig` with their values.
    """

    kind: ClassVar[str]
    """Value of `ModelConfig.backbone`."""
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]  # noqa: RUF012 - the names and types are diffusers'
    _repeated_blocks = ["DiTBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["router"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder"]  # noqa: RUF012

    @takes_settings
    def __init__(self, **settings: Any) -> None:
        """Make the modules and draw their weights.

        Raises:
            ValueError: the settings contradict each other.
        """
        super().__init__()
        self.settings = config = ModelConfig(backbone=self.kind, **settings)  # type: ignore[arg-type]
        left_out = {"backbone"} if config.text_dim else {"backbone", *TEXT_FIELDS}
        # Where diffusers keeps what config.json holds.
        self._internal_dict = {name: value for name, value in vars(config).items() if name not in left_out}
        self._gradient_checkpointing_func: Callable[..., Any] | None = None
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        D, P = config.hidden_size, config.patch_size
        self.x_embedder = self.make_patch_embedder()
        self.t_embedder = TimestepEmbedder(D)
        rows = config.num_classes + int(config.null_class)
        self.y_embedder = nn.Embedding(rows, D) if config.num_classes else None
        self.text_embedder = TextEmbedder(config) if config.text_dim else None
        self.blocks = nn.ModuleList(DiTBlock(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(D, P * P * self.out_channels, self.make_final_norm())
        self.register_positions()
        self.gradient_checkpointing = False
        self.reset_parameters()

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES and len(Backbone.__bases__) < len(HOMES):
            add_all_bases(Backbone)
            return getattr(self, name)
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Device to compute on; with diffusers' offloading it may differ from that of the weights."""
        return super().device if len(Backbone.__bases__) > 1 else next(self.parameters()).device  # type: ignore[misc]

    @property
    def config(self) -> Any:
        """The settings as diffusers keeps them, a FrozenDict."""
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(self._internal_dict)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike | None, **options: Any) -> Any:
        """Load a model from a folder or the hub: `diffusers.ModelMixin.from_pretrained`."""
        add_all_bases(Backbone)
        return super().from_pretrained(name_or_path, **options)  # type: ignore[misc]

    @classmethod
    def load_config(cls, name_or_path: str | os.PathLike, **options: Any) -> Any:
        """Read config.json: `diffusers.ConfigMixin.load_config`."""
        add_all_bases(Backbone)
        return super().load_config(name_or_path, **options)  # type: ignore[misc]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> Any:
        """Make a fresh model from the content of config.json: `diffusers.ConfigMixin.from_config`.

        Raises:
            ValueError: the model is of an earlier version.
        """
        add_all_bases(Backbone)
        old = [f"{name} (now {RENAMED[name]})" for name in RENAMED if name in config]
        if old:
            raise ValueError(
                f"the model was saved by an earlier version: its config.json has {', '.join(old)}; convert or train it "
                "again with this version"
            )
        return super().from_config(config, **options)  # type: ignore[misc]

    def enable_gradient_checkpointing(self, function: Callable[..., Any] | None = None) -> None:
        """Recompute each block in the backward pass.

        Args:
            function: called with a block and its inputs; None: `torch.utils.checkpoint.checkpoint`.
        """
        self._gradient_checkpointing_func = function or checkpoint_block
        self.gradient_checkpointing = True

    def make_patch_embedder(self) -> nn.Module:
        """From the numbers of a patch (B, N, C * P * P) to tokens (B, N, D)."""
        raise NotImplementedError

    def make_final_norm(self) -> nn.Module:
        """The norm before the output projection."""
        return make_norm("layernorm", self.settings.hidden_size)

    def register_positions(self) -> None:
        """Fixed tables. The added one is saved: in the published checkpoints averaging moved it slightly."""
        config = self.settings
        side = config.sample_size // config.patch_size
        if config.rotary_axes:
            rotary = self.rotary_for(side, side)
            self.register_buffer("rotary_cos", rotary.cos_NI, persistent=False)
            self.register_buffer("rotary_sin", rotary.sin_NI, persistent=False)
        if config.adds_sincos:
            self.register_buffer("pos_embed", sincos_table(side, side, config.hidden_size))
        self.other_sincos: dict[tuple[int, int, torch.device], Tensor] = {}
        self.other_rotary: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def still_tokens(self) -> int:
        """Most tokens before those of the image; rotary positions do not turn them."""
        config = self.settings
        joint = config.text_dim and config.text_conditioning == "joint"
        return config.class_tokens + (config.text_length if joint else 0)

    def rotary_for(self, rows: int, columns: int) -> Rotary:
        """Rotation angles of a grid of tokens: those of a larger one begin with those of a smaller one."""
        c = self.settings
        return rotary_table(rows, columns, c.head_width, c.rotary_axes, c.rotary_pairs, self.still_tokens)

    @property
    def null_class(self) -> int | None:
        """The label that means no class; None if there is none."""
        return self.settings.num_classes if self.settings.num_classes and self.settings.null_class else None

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
        for cross in [module for module in self.modules() if isinstance(module, CrossAttention)]:
            nn.init.zeros_(cross.proj.weight)
        for adaln in [module.adaln for module in self.modules() if isinstance(module, DiTBlock | FinalLayer)]:
            for parameter in adaln.parameters():
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
    ) -> Embedded:
        """Tokens with added positions, and what modulates the blocks.

        Raises:
            ValueError: labels or text given to a model without, or missing for a model with them; a size that patches
                do not fill; features that are not the model's.
        """
        self._check_inputs(hidden_states, class_labels, encoder_hidden_states)
        x_BND = self.x_embedder(patchify(hidden_states, self.settings.patch_size))
        if self.settings.adds_sincos:
            x_BND = x_BND + self.sincos(*self.grid(hidden_states)).to(x_BND.dtype)
        condition_BD, class_BD = self.t_embedder(timestep.expand(len(x_BND))), None
        if self.y_embedder is not None:
            class_BD = self.y_embedder(class_labels)
            condition_BD = condition_BD + class_BD
        if self.text_embedder is None:
            return Embedded(x_BND, condition_BD, class_BD, (), 0)
        text, pooled_BD = self.text_embedder(encoder_hidden_states, encoder_attention_mask, pooled_projections)
        condition_BD = condition_BD + pooled_BD
        if self.settings.text_conditioning == "cross":
            return Embedded(x_BND, condition_BD, class_BD, (text,), 0)
        x_BND = torch.cat((text.tokens.to(x_BND.dtype), x_BND), dim=1)
        return Embedded(x_BND, condition_BD, class_BD, (), self.settings.text_length)

    def _check_inputs(self, hidden_states: Tensor, class_labels: Tensor | None, text: Tensor | None) -> None:
        config, (height, width) = self.settings, hidden_states.shape[-2:]
        if (class_labels is None) != (self.y_embedder is None):
            raise ValueError(
                f"class_labels are {'missing' if class_labels is None else 'given'}, but the model has num_classes "
                f"{config.num_classes}; pass them exactly when it is not 0"
            )
        if (text is None) != (self.text_embedder is None):
            raise ValueError(
                f"encoder_hidden_states are {'missing' if text is None else 'given'}, but the model has text_dim "
                f"{config.text_dim}; pass them exactly when it is not 0 (no prompt: a mask without a true place)"
            )
        if height % config.patch_size or width % config.patch_size or not height or not width:
            raise ValueError(
                f"the image is {height} x {width}; both must be positive multiples of patch_size {config.patch_size}"
            )

    def grid(self, hidden_states: Tensor) -> Grid:
        """Rows and columns of an image's tokens."""
        P = self.settings.patch_size
        return hidden_states.shape[-2] // P, hidden_states.shape[-1] // P

    def sincos(self, rows: int, columns: int) -> Tensor:
        """The added table for a grid: the model's own for its own size, else the formula's."""
        if rows * columns == len(self.pos_embed) and rows == columns:
            return self.pos_embed
        place = (rows, columns, self.pos_embed.device)
        if place not in self.other_sincos:
            table = sincos_table(rows, columns, self.settings.hidden_size)
            self.other_sincos[place] = table.to(self.pos_embed.device)
        return self.other_sincos[place]

    def rotary(self, still_tokens: int = 0, grid: Grid | None = None) -> Rotary | None:
        """Rotation angles for a sequence that starts with so many tokens that are not turned.

        Args:
            grid: rows and columns of the image's tokens; None: those of `sample_size`.
        """
        config = self.settings
        if not config.rotary_axes:
            return None
        side, cos_NI, sin_NI = config.sample_size // config.patch_size, self.rotary_cos, self.rotary_sin
        if grid is not None and grid != (side, side):
            place = (*grid, cos_NI.device)
            if place not in self.other_rotary:
                table = self.rotary_for(*grid)
                self.other_rotary[place] = table.cos_NI.to(cos_NI.device), table.sin_NI.to(cos_NI.device)
            cos_NI, sin_NI = self.other_rotary[place]
        skip = self.still_tokens - still_tokens
        return Rotary(cos_NI[skip:], sin_NI[skip:], config.rotary_axes, config.rotary_pairs)

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Keep weights in a narrow dtype and widen them for each use: diffusers', and the stacked experts besides."""
        add_all_bases(Backbone)
        from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

        compute_dtype = compute_dtype or self.dtype
        super().enable_layerwise_casting(storage_dtype, compute_dtype, **options)  # type: ignore[misc]
        for experts in [module for module in self.modules() if isinstance(module, GroupedExperts)]:
            apply_layerwise_casting_hook(experts, storage_dtype, compute_dtype, options.get("non_blocking", False))

    def compile_blocks(self, backend: str = "inductor", fullgraph: bool = True) -> None:
        """Compile every block by `torch.compile`, once. Blocks of a kind share their code.

        The second batch size a block meets makes its code good for any; routing state changes nothing.
        """
        for block in self.blocks:
            if block._compiled_call_impl is None:
                block.compile(fullgraph=fullgraph, backend=backend)

    def run_block(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, RoutingReport | None]:
        """Apply a block, recomputing it in the backward pass if gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            assert self._gradient_checkpointing_func is not None
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def to_output(
        self, x_BND: Tensor, condition_BD: Tensor, reports: list[RoutingReport], size: torch.Size, return_dict: bool
    ) -> DiTOutput | tuple[Tensor, tuple[RoutingReport, ...]]:
        """The last tokens as an image of the size of the input."""
        sample = unpatchify(self.final_layer(x_BND, condition_BD), self.settings.patch_size, size[-2], size[-1])
        if not return_dict:
            return sample, tuple(reports)
        return DiTOutput(sample=sample, routing=tuple(reports))


def checkpoint_block(block: nn.Module, *inputs: Any) -> Any:
    """Apply a block and keep its inputs alone."""
    return checkpoint(block.__call__, *inputs, use_reentrant=False)


add_loaded_bases(Backbone)
if "DIFFUSERS_ATTN_BACKEND" in os.environ:
    add_all_bases(Backbone)
