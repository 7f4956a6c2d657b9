"""The backbone of DiT and JiT: conditioning, positions, blocks, output, and the methods of a diffusers model.

Shape suffixes: B images, N tokens of one image, D width, C channels, H and W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..config import TEXT_FIELDS, ModelConfig
from ..config.renamed import old_names
from ..moe import GroupedExperts, RoutingReport
from ..nn.attention import CrossAttention, window_mask
from ..nn.embeddings import TimestepEmbedder, patchify, unpatchify
from ..nn.norm import make_norm
from ..nn.position import Rotary, rotary_table, sincos_table
from .block import DiTBlock, FinalLayer, checkpoint_block
from .conditions import routing_context
from .diffusers_bases import HOMES, add_bases_when_imported, import_bases, takes_settings
from .inputs import Embedded, check_inputs
from .text import TextEmbedder
from .token_drop import NOTHING_DROPPED, Fusion, TokenDrop, keep_rotary, keep_tokens, middle_of, put_back


class DiTOutput(NamedTuple):
    """Output of a model. Like the outputs of diffusers, it can be indexed by position and by name."""

    sample: Tensor
    """Prediction, (B, C, H, W); with learn_sigma (B, 2C, H, W)."""
    routing: tuple[RoutingReport, ...] = ()
    """Report of each MoE layer's router, in the order of the layers."""

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else tuple(self)[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields in order."""
        return tuple(self)


class Backbone(nn.Module):
    """Embed, add positions, apply the blocks, project back. Subclasses make the patch embedder.

    It is a diffusers model (ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin) as soon as diffusers is loaded.
    Asking a model for a public name that it lacks loads diffusers.

    Attributes:
        settings: the fields of `ModelConfig` with their values.
    """

    kind: ClassVar[str]
    """Value of `ModelConfig.backbone`."""
    _is_made = False
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]  # noqa: RUF012 - the names and types are diffusers'
    _repeated_blocks = ["DiTBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["router"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder"]  # noqa: RUF012

    @takes_settings
    def __init__(self, **settings: Any) -> None:
        """Make the modules and initialise their weights.

        Raises:
            ValueError: the settings contradict each other.
        """
        super().__init__()
        # Tuples are lists in config.json.
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
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
        self.fusion = Fusion(D) if config.fusion else None
        self.final_layer = FinalLayer(D, P * P * self.out_channels, self.make_final_norm())
        self.register_positions()
        self.gradient_checkpointing = False
        self.reset_parameters()
        if config.class_tokens:
            self.class_positions = nn.Parameter(torch.empty(config.class_tokens, D))
            nn.init.normal_(self.class_positions, std=0.02)
        self._is_made = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # torch asks for the names of parameters and buffers before it registers them.
            if name.startswith("_") or not self._is_made or len(Backbone.__bases__) == len(HOMES):
                raise
        import_bases()
        return getattr(self, name)

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
        """Load a model from a folder or the hub: `diffusers.ModelMixin.from_pretrained`.

        Raises:
            ValueError: the files lack weights or were saved by an earlier version.
        """
        import_bases()
        with_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(name_or_path, output_loading_info=True, **options)  # type: ignore[misc]
        if info.get("missing_keys"):  # diffusers would only warn, and leave buffers at zero
            raise ValueError(
                f"{name_or_path} has no {', '.join(sorted(info['missing_keys'])[:3])}; it is incomplete or of "
                "an earlier version; save, convert or train it again with this version"
            )
        return (model, info) if with_info else model

    @classmethod
    def load_config(cls, name_or_path: str | os.PathLike, **options: Any) -> Any:
        """Read config.json: `diffusers.ConfigMixin.load_config`."""
        import_bases()
        return super().load_config(name_or_path, **options)  # type: ignore[misc]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> Any:
        """Make a fresh model from the content of config.json: `diffusers.ConfigMixin.from_config`.

        Raises:
            ValueError: an earlier version wrote the config.
        """
        import_bases()
        if old := old_names(config):
            raise ValueError(
                f"the model was saved by an earlier version: its config.json has {', '.join(old)}; bring it up to "
                "date with `diffusion-moe convert`"
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
        """A module from patches (B, N, C * P * P) to tokens (B, N, D)."""
        raise NotImplementedError

    def make_final_norm(self) -> nn.Module:
        """Norm before the output projection."""
        return make_norm("layernorm", self.settings.hidden_size)

    def register_positions(self) -> None:
        """Register the fixed tables."""
        config = self.settings
        side = config.sample_size // config.patch_size
        if config.rotary_axes:
            rotary = self.rotary_for(side, side)
            self.register_buffer("rotary_cos", rotary.cos_NI, persistent=False)
            self.register_buffer("rotary_sin", rotary.sin_NI, persistent=False)
        if config.adds_sincos:  # saved, as the EMA of reference checkpoints differs slightly from the formula
            self.register_buffer("pos_embed", sincos_table(side, side, config.hidden_size))
        self.other_sincos: dict[tuple[int, int, torch.device], Tensor] = {}
        self.other_rotary: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def still_tokens(self) -> int:
        """Maximum number of tokens before those of the image; rotary positions do not rotate them."""
        c = self.settings
        return c.class_tokens + (c.text_length if c.text_dim and c.text_conditioning == "joint" else 0)

    def rotary_for(self, rows: int, columns: int) -> Rotary:
        """Rotation angles of a grid of tokens, with as many unrotated tokens before them as there can be."""
        c = self.settings
        return rotary_table(rows, columns, c.head_width, c.rotary_axes, c.rotary_pairs, self.still_tokens)

    @property
    def null_class(self) -> int | None:
        """Label for no class; None if the model has none."""
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
        for module in self.modules():
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.proj.weight)
            elif isinstance(module, DiTBlock | FinalLayer):
                for parameter in module.adaln.parameters():
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
        """Tokens with added positions, and the conditioning of the blocks. Arguments and errors as for `forward`."""
        check_inputs(self.settings, hidden_states, class_labels, encoder_hidden_states)
        x_BND = self.x_embedder(patchify(hidden_states, self.settings.patch_size))
        if self.settings.adds_sincos:
            x_BND = x_BND + self.sincos(*self.grid(hidden_states)).to(x_BND.dtype)
        timestep = timestep.expand(len(x_BND))
        condition_BD, class_BD = self.t_embedder(timestep), None
        context = routing_context(
            self.settings, timestep, condition_BD, class_labels, encoder_hidden_states, encoder_attention_mask
        )
        if self.y_embedder is not None:
            class_BD = self.y_embedder(class_labels)
            condition_BD = condition_BD + class_BD
        if self.text_embedder is None:
            return Embedded(x_BND, condition_BD, class_BD, context)
        text, pooled_BD = self.text_embedder(encoder_hidden_states, encoder_attention_mask, pooled_projections)
        condition_BD = condition_BD + pooled_BD
        if self.settings.text_conditioning == "cross":
            return Embedded(x_BND, condition_BD, class_BD, context, text)
        x_BND = torch.cat((text.tokens.to(x_BND.dtype), x_BND), dim=1)
        return Embedded(x_BND, condition_BD, class_BD, context, text_tokens=self.settings.text_length)

    def grid(self, hidden_states: Tensor) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        P = self.settings.patch_size
        return hidden_states.shape[-2] // P, hidden_states.shape[-1] // P

    def sincos(self, rows: int, columns: int) -> Tensor:
        """Sine-cosine table of a grid: the saved one for the model's own size, else computed and kept."""
        if rows * columns == len(self.pos_embed) and rows == columns:
            return self.pos_embed
        key = (rows, columns, self.pos_embed.device)
        if key not in self.other_sincos:
            table = sincos_table(rows, columns, self.settings.hidden_size)
            self.other_sincos[key] = table.to(self.pos_embed.device)
        return self.other_sincos[key]

    def rotary(self, still_tokens: int = 0, grid: tuple[int, int] | None = None) -> Rotary | None:
        """Rotation angles of a sequence.

        Args:
            still_tokens: tokens before those of the image, which are not rotated.
            grid: rows and columns of the image's tokens; None: those of `sample_size`.
        """
        config = self.settings
        if not config.rotary_axes:
            return None
        side, cos_NI, sin_NI = config.sample_size // config.patch_size, self.rotary_cos, self.rotary_sin
        if grid is not None and grid != (side, side):
            key = (*grid, cos_NI.device)
            if key not in self.other_rotary:
                table = self.rotary_for(*grid)
                self.other_rotary[key] = table.cos_NI.to(cos_NI.device), table.sin_NI.to(cos_NI.device)
            cos_NI, sin_NI = self.other_rotary[key]
        skip = self.still_tokens - still_tokens
        return Rotary(cos_NI[skip:], sin_NI[skip:], config.rotary_axes, config.rotary_pairs)

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Store weights in low precision and cast them for each use, as diffusers does; also those of the experts."""
        import_bases()
        from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

        compute_dtype = compute_dtype or self.dtype
        super().enable_layerwise_casting(storage_dtype, compute_dtype, **options)  # type: ignore[misc]
        for experts in [module for module in self.modules() if isinstance(module, GroupedExperts)]:
            apply_layerwise_casting_hook(experts, storage_dtype, compute_dtype, options.get("non_blocking", False))

    def compile_blocks(self, backend: str = "inductor", fullgraph: bool = True) -> None:
        """Compile every block by `torch.compile`; compiled blocks stay as they are. Blocks of a kind share their code.

        A second batch size compiles again, for every batch size; a change of routing state does not.
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

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        token_drop: TokenDrop = NOTHING_DROPPED,
        return_dict: bool = True,
    ) -> DiTOutput | tuple[Tensor, tuple[RoutingReport, ...]]:
        """Predict the velocity, the clean image or the noise, as `prediction` says.

        Args:
            hidden_states: noisy images or latents, (B, C, H, W); H and W are multiples of patch_size.
            timestep: t in [0, 1] (0 is noise), or with `process: ddpm` the step from 0 (data) to 999, (B,) or a scalar.
            class_labels: classes, or `null_class` for none, int64, (B,); None for a model without classes.
            encoder_hidden_states: features of the text encoder, (B, L, text_dim); None for a model without text.
            encoder_attention_mask: true at tokens, bool, (B, L); None: everywhere. A row of false is no prompt.
            pooled_projections: pooled feature of the text encoder, (B, text_pooled_dim); None for a model without it.
            token_drop: what the middle blocks leave out, in training or for path-drop guidance.
            return_dict: return a `DiTOutput`; false: a plain tuple of the same.

        Raises:
            ValueError: labels or text that the model does not take or that are missing; a size that is no multiple of
                patch_size; features of another shape than the model's; something dropped that the model cannot lack.
        """
        embedded = self.embed(
            hidden_states, timestep, class_labels, encoder_hidden_states, encoder_attention_mask, pooled_projections
        )
        x, reports = self.run_blocks(embedded, self.grid(hidden_states), token_drop)
        patches = self.final_layer(x, embedded.condition)
        output = DiTOutput(unpatchify(patches, self.settings.patch_size, *hidden_states.shape[-2:]), tuple(reports))
        return output if return_dict else output.to_tuple()

    def run_blocks(
        self, embedded: Embedded, grid: tuple[int, int], drop: TokenDrop
    ) -> tuple[Tensor, list[RoutingReport]]:
        """Apply all blocks: tokens of the image, (B, N, D), and the reports of the routers."""
        x, condition, label, context, text, still = embedded
        middle = middle_of(self.settings, drop)
        before, kept, rotary = None, None, self.rotary(still, grid)
        mask = window_mask(x, self.settings.sliding_window, self.settings.attention_sinks)
        reports: list[RoutingReport] = []
        for index, block in enumerate(self.blocks):
            if middle and index == middle.start:
                before, kept = x, drop.kept_BK
                x, rotary = keep_tokens(x, kept, still), keep_rotary(rotary, kept, still)
            if label is not None and self.settings.class_tokens and index == self.settings.class_tokens_from:
                tokens = (label[:, None] + self.class_positions).to(x.dtype)
                x = torch.cat((tokens, x), dim=1)
                before = None if before is None else torch.cat((tokens, before), dim=1)
                still += self.settings.class_tokens
                rotary = keep_rotary(self.rotary(still, grid), kept, still)
                mask = window_mask(x, self.settings.sliding_window, self.settings.attention_sinks)
            if drop.path is not True or index not in middle:
                x, report = self.run_block(block, x, condition, rotary, mask, text, context)
                reports += [] if report is None else [report.without_first(still)]
            if before is not None and index == middle[-1]:
                x = put_back(x, before, kept, still) if self.fusion is None else self.fusion(x, before, drop, still)
                before, kept, rotary = None, None, self.rotary(still, grid)
        return x[:, still:], reports


add_bases_when_imported(Backbone)
if "DIFFUSERS_ATTN_BACKEND" in os.environ:
    import_bases()
