"""Bytes that autograd keeps of a forward pass, by formula: no torch, no model is built.

Tests compare each part with what autograd keeps of a real forward pass on a CPU, to the byte. Names: B images, N tokens
of one image, T = B * N, L text tokens, D width, H heads, K key and value heads, I head width, F hidden width, A
assignments, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .. import counts
from ..config import InitConfig, Recipe
from ..routing_rules import TokenChoiceRule
from .memory import trained_parameters

FLOAT32, INT64 = 4, 8
"""Bytes of an element."""
KEEP_CAST_BELOW = 512
"""Rows an expert below which the experts keep their cast weights (`moe.expert_autograd`)."""


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept for the backward pass, without weights and their state."""

    outside: int
    """Embedders, output layer and loss."""
    blocks: tuple[int, ...]
    """Each block."""
    inputs: int
    """Inputs of all blocks, which are all that is kept if blocks are recomputed."""

    def total(self, recompute: str) -> int:
        """Bytes at the end of the forward pass; with `recompute: blocks`, those of one block while it is recomputed."""
        if recompute == "blocks":
            return self.outside + self.inputs + max(self.blocks)
        return self.outside + sum(self.blocks)


def kept_activations(recipe: Recipe, images: int, sharded: bool = False) -> Kept:
    """Count what autograd keeps of one micro-batch of so many images, in a step in which no token is dropped.

    With frozen weights or adapters the result is an upper bound, because autograd keeps nothing for frozen weights.

    Args:
        sharded: several processes, where FSDP2 gathers each block's weights in the dtype of the matmuls and frees them
            afterwards, so that no casts are kept.
    """
    counted = ForwardPass(recipe, images, sharded)
    outside = counted.outside()
    blocks = [counted.block(index) for index in range(recipe.model.depth)]
    blocks[0] += counted.shared_by_blocks()
    if context := counted.time_embedding():
        blocks[recipe.model.moe_blocks[0]] += context
        blocks[0] -= context if counted.condition_is_time else 0  # already kept by its norm
    for layer, kept in counted.adapters(recipe.init):
        if layer.startswith("blocks."):
            blocks[counts.block_index(layer)] += kept
        else:
            outside += kept
    return Kept(outside, tuple(blocks), counted.block_inputs())


class ForwardPass:
    """Kept bytes of each part of a forward pass."""

    def __init__(self, recipe: Recipe, images: int, sharded: bool) -> None:
        self.config, self.images = recipe.model, images
        self.recomputes_experts = recipe.training.recompute == "experts"
        self.low = 2 if recipe.training.precision == "bf16" else FLOAT32
        """Bytes of an element of ordinary activations."""
        self.sharded = sharded
        self.shapes = counts.parameter_shapes(recipe.model)

    def cast(self, *prefixes: str) -> int:
        """Matrices that autocast casts and keeps; where blocks are sharded, theirs are gathered in low precision."""
        if self.low == FLOAT32 or (self.sharded and prefixes[0].startswith("blocks.")):
            return 0
        matrices = [shape for name, shape in self.shapes.items() if name.startswith(prefixes) and len(shape) > 1]
        return sum(self.low * math.prod(shape) for shape in matrices)

    # Outside of the blocks

    def outside(self) -> int:
        """Embedders, output layer and loss."""
        config, B, D = self.config, self.images, self.config.hidden_size
        patches = B * counts.num_image_tokens(config) * config.in_channels * config.patch_size**2
        kept = self.low * patches
        if config.backbone == "jit":
            assert config.bottleneck_dim is not None
            kept += self.low * B * counts.num_image_tokens(config) * config.bottleneck_dim
            kept += self.cast("x_embedder.proj2.")
        kept += self.low * B * (counts.TIME_FREQUENCIES + 2 * D) + self.cast("t_embedder.mlp.2.")
        kept += INT64 * B if config.num_classes else 0
        kept += self.text_embedder() if config.text_dim else 0
        if config.fusion:  # the tokens that are joined
            tokens = counts.num_tokens(config, counts.middle_blocks(config)[-1])
            kept += self.low * B * tokens * 2 * D + self.cast("fusion.linear.")
        if context := self.time_embedding():
            kept += context + FLOAT32 * B  # the norm's input and inverse deviations
        loss = FLOAT32 * patches * (1 + config.learn_sigma)
        return kept + self.final_layer() + loss

    def text_embedder(self) -> int:
        """Bytes kept of the text embedder."""
        config, B, D, W, low = self.config, self.images, self.config.hidden_size, self.config.text_dim, self.low
        rows, pooled = B * config.text_length, config.text_pooled_dim
        kept = low * (rows * (W + 2 * D) + B * ((pooled or W) + 2 * D))
        kept += self.cast("text_embedder.mlp.2.", "text_embedder.pool.2.")
        if config.text_null == "empty":
            return kept  # nothing before the first layers learns
        joint = config.text_conditioning == "joint"
        masks = rows if joint else B  # where the null prompt is
        norm = FLOAT32 * rows * (W + 2)
        if pooled:
            pool = B if joint else 0  # another mask
        else:
            pool = FLOAT32 * (rows + B)  # the mean's weights and their sum
        return kept + masks + norm + pool + self.cast("text_embedder.mlp.0.", "text_embedder.pool.0.")

    def final_layer(self) -> int:
        config, B, D, low = self.config, self.images, self.config.hidden_size, self.low
        T = B * counts.num_image_tokens(config)
        kept = low * (2 * B * D + 2 * T * D)  # condition, scale, normed and modulated tokens
        kept += self.cast("final_layer.")
        rms = config.backbone == "jit" and config.norm == "rmsnorm"
        if rms and low < FLOAT32:
            return kept + self.norm(T, rms=True)
        # The norm keeps the tokens of text and class too, because it gets a part of one tensor.
        others = counts.num_tokens(config, config.depth - 1) - counts.num_image_tokens(config)
        return kept + self.norm(T, rms) + low * B * others * D

    def norm(self, tokens: int, rms: bool) -> int:
        """Norm over D: its input, and mean and inverse deviation, or for RMSNorm all in float32 with its result."""
        D = self.config.hidden_size
        return FLOAT32 * tokens * (2 * D + 1) if rms else self.low * tokens * (D + 2)

    # Blocks

    def block_inputs(self) -> int:
        """Tokens of each block, and what all share: the condition, the text and its mask, the masks of a window, what
        routers look at."""
        config = self.config
        tokens = [counts.num_tokens(config, index) for index in range(config.depth)]
        masks = self.images * config.text_length if counts.has_cross_attention(config) else 0
        if config.sliding_window:  # a mask for each length of the sequence
            masks += sum(N * (N + config.attention_sinks) for N in set(tokens))
        times = FLOAT32 * self.images if self.routers_see("time_B") else 0
        unconditional = self.images if self.routers_see("unconditional_B") else 0
        context = self.time_embedding() + times + unconditional
        return self.low * self.images * sum(tokens) * config.hidden_size + self.shared_by_blocks() + context + masks

    def shared_by_blocks(self) -> int:
        """The condition, in float32 with a table of classes, and the text."""
        config, D = self.config, self.config.hidden_size
        text = self.low * self.images * config.text_length * D if counts.has_cross_attention(config) else 0
        return (FLOAT32 if config.num_classes else self.low) * self.images * D + text

    def routers_see(self, name: str) -> bool:
        """True if the model has routers that look at this field of their context."""
        config = self.config
        return config.rule is not None and name in config.rule.sees and bool(config.moe_blocks)

    def time_embedding(self) -> int:
        """The normalised embedding of time that routers share, in float32."""
        return FLOAT32 * self.images * self.config.hidden_size if self.routers_see("time_embedding_BD") else 0

    @property
    def condition_is_time(self) -> bool:
        """True where the condition is the embedding of time itself, in float32."""
        return self.low == FLOAT32 and not self.config.num_classes and not self.config.text_dim

    def block(self, index: int) -> int:
        """Block `index`, without what it shares with others."""
        config, B, D, low = self.config, self.images, self.config.hidden_size, self.low
        name, T = f"blocks.{index}", B * counts.num_tokens(config, index)
        rms = config.norm == "rmsnorm"
        kept = low * 7 * B * D + self.cast(f"{name}.adaln.")  # condition, then shifts, scales and gates
        # Twice: norm, scale, normed tokens, result before the gate.
        kept += 2 * (self.norm(T, rms) + low * (B * D + 2 * T * D))
        kept += self.attention(f"{name}.attn", index)
        if counts.has_cross_attention(config):
            kept += self.norm(T, rms) + self.cross_attention(f"{name}.cross_attn", index)
        if counts.is_moe_block(config, index):
            return kept + self.moe_layer(f"{name}.mlp", T, counts.num_assignments(config, index, B))
        dropout = bool(config.dropout) and counts.in_middle_half(config, index)
        return kept + low * T * D + self.feed_forward(f"{name}.mlp", T, config.mlp_activation, dropout)

    def attention(self, name: str, index: int) -> int:
        """Self-attention."""
        config, B, N = self.config, self.images, counts.num_tokens(self.config, index)
        H, K, I, T = config.num_heads, config.num_kv_heads or config.num_heads, config.head_width, B * N  # noqa: E741
        kept = self.attention_ends(name, index)
        if config.qk_norm:
            kept += self.head_norm(T * H) + self.head_norm(T * K)
        has_dropout = config.attention_dropout and counts.in_middle_half(config, index)
        kernel_keeps = self.plain_kernel if has_dropout else self.fused_kernel
        return kept + kernel_keeps(T, N, H, K, I)

    def fused_kernel(self, T: int, N: int, H: int, K: int, I: int) -> int:  # noqa: E741
        """Queries, keys, values and what a fused kernel of attention keeps, by tokens, heads and their width."""
        config, B, low = self.config, self.images, self.low
        M, width = N + config.attention_sinks, config.attended_width
        copied = bool(config.sliding_window) and K < H  # heads repeated for the mask
        kept = low * T * H * width + FLOAT32 * T * H  # the result, and the sums of exponentials
        kept += low * N * M if config.sliding_window else 0  # the mask
        if config.attention_sinks:
            kept += low * T * H * I if H > 1 else 0  # the result's channels that are projected
        else:
            kept += self.other_layout(T, N)
        has_new_queries = bool(config.attention_sinks or config.qk_norm or config.rotary_axes)
        kept += low * T * H * width if has_new_queries else 0
        if copied:
            kept += low * 2 * B * H * M * width
        elif config.attention_sinks:
            kept += low * 2 * B * K * M * width
        elif has_new_queries:
            kept += low * T * K * I
        has_views = not config.attention_sinks and not (copied and has_new_queries)
        return kept + (self.projected(T, H, K, I) if has_views or self.norm_keeps_projected else 0)

    def plain_kernel(self, T: int, N: int, H: int, K: int, I: int) -> int:  # noqa: E741
        """The same of the plain formula in float32, which runs with dropout of the attention weights."""
        config, B, low = self.config, self.images, self.low
        M, width = N + config.attention_sinks, config.attended_width
        kept = FLOAT32 * B * H * (N + M) * width  # queries and keys
        kept += low * T * H * (I if H > 1 else width)  # the result
        kept += FLOAT32 * B * H * N * M * 3  # attention weights
        has_views = low == FLOAT32 and K == H and not config.attention_sinks and 1 in (B, H)
        kept += 0 if has_views else FLOAT32 * B * H * M * width  # values
        return kept + (self.projected(T, H, K, I) if has_views or self.norm_keeps_projected else 0)

    @property
    def norm_keeps_projected(self) -> bool:
        """True where a norm of heads keeps the projected queries, keys and values."""
        return self.config.qk_norm and self.low == FLOAT32

    def projected(self, T: int, H: int, K: int, I: int) -> int:  # noqa: E741
        """Projected queries, keys and values."""
        return self.low * T * (H + 2 * K) * I

    def attention_ends(self, name: str, index: int) -> int:
        """Input, projections' casts and dropout of either attention."""
        config, T = self.config, self.images * counts.num_tokens(self.config, index)
        has_dropout = bool(config.dropout) and counts.in_middle_half(config, index)
        return self.low * T * config.hidden_size * (1 + has_dropout) + self.cast(f"{name}.")

    def cross_attention(self, name: str, index: int) -> int:
        """Attention to the text."""
        config, B, N, low = self.config, self.images, counts.num_tokens(self.config, index), self.low
        H, K, I, T = config.num_heads, config.num_kv_heads or config.num_heads, config.head_width, B * N  # noqa: E741
        L = config.text_length
        kept = self.attention_ends(name, index)
        kept += low * (2 * T * H * I + B * L) + FLOAT32 * T * H
        copied = K < H  # heads repeated for the mask
        kept += low * 2 * B * L * (H if copied else K) * I
        if config.qk_norm:
            kept += self.head_norm(T * H) + self.head_norm(B * L * K)
            kept += low * B * L * K * I if not copied else 0
            kept += low * T * H * I if low == FLOAT32 else 0
            kept += low * B * L * 2 * K * I if copied and low == FLOAT32 else 0
        return kept + self.other_layout(T, N)

    def head_norm(self, rows: int) -> int:
        """RMSNorm of heads, in float32; in low precision also its input in float32 and its cast weight."""
        width = self.config.head_width
        kept = FLOAT32 * rows * (width + 1)
        return kept if self.low == FLOAT32 else kept + FLOAT32 * rows * width + self.low * width

    def other_layout(self, T: int, N: int) -> int:
        """After a norm of heads, attention's result has another layout than its projection's input."""
        config = self.config
        if config.qk_norm and config.num_heads > 1 and N > 1:
            return self.low * T * config.num_heads * config.head_width
        return 0

    def moe_layer(self, name: str, T: int, A: int) -> int:
        """Router, experts and shared expert."""
        config, D, low = self.config, self.config.hidden_size, self.low
        assert config.rule is not None
        kept = low * T * D  # the input
        if low < FLOAT32 and config.rule.parameter_shapes(config, D):
            kept += FLOAT32 * T * D  # routers with weights read it in float32
        kept += config.rule.kept_bytes(config, D, T, A)
        dropout = bool(config.expert_dropout)
        kept += self.dropped_experts(name, T, A) if dropout else self.experts(name, T, A)
        if config.shared in ("gelu", "swiglu"):
            if not self.recomputes_experts:
                kept += self.feed_forward(f"{name}.shared", T, config.shared, dropout)
        elif dropout and low < FLOAT32:
            kept -= low * T * D
        return kept

    def experts(self, name: str, T: int, A: int) -> int:
        """Experts: what dispatch and combine keep, and the first matmul's result."""
        kept = self.dispatch(T, A)
        if not self.recomputes_experts:
            kept += self.low * A * self.shapes[f"{name}.experts.w_in"][2]
        if KEEP_CAST_BELOW * self.config.num_experts > A:
            kept += self.cast(f"{name}.experts.w_")
        return kept

    def dropped_experts(self, name: str, T: int, A: int) -> int:
        """Experts with dropout: also the rows, their activations after dropout, its mask, and the cast matrices."""
        config, columns = self.config, self.shapes[f"{name}.experts.w_in"][2]
        kept = self.low * A * (config.hidden_size + columns + 2 * config.expert_dim)
        if config.expert_bias and self.sharded and self.low < FLOAT32:  # the output biases back in float32
            kept += FLOAT32 * config.num_experts * config.hidden_size
        return kept + self.dispatch(T, A) + FLOAT32 * config.num_experts + self.cast(f"{name}.experts.w_")

    def dispatch(self, T: int, A: int) -> int:
        """Weights and tokens of rows, first rows of tokens, and with biases the weights as a matrix."""
        assert self.config.rule is not None
        kept = A * (FLOAT32 + INT64) + INT64 * T
        if not issubclass(self.config.rule, TokenChoiceRule):  # whose router keeps the rows of tokens too
            kept += INT64 * A
        if self.config.expert_bias:
            kept += INT64 * A + FLOAT32 * T * self.config.num_experts
        return kept

    def feed_forward(self, name: str, T: int, activation: str, dropout: bool) -> int:
        """A dense feed-forward layer without its input: the first projection, or with dropout each operator's input."""
        hidden, gated = self.low * T * self.shapes[f"{name}.up_proj.weight"][0], activation == "swiglu"
        return hidden * (5 if gated else 3) + self.cast(f"{name}.") if dropout else hidden * (2 if gated else 1)

    def adapters(self, init: InitConfig) -> Iterator[tuple[str, int]]:
        """Each layer with an adapter, and at most what is kept more because of that."""
        for p in trained_parameters(self.config, init):
            layer, found, _ = p.name.partition(".lora_A.")
            if found and counts.is_expert_matrix(layer):
                experts, inputs, outputs = self.shapes[layer]
                merged = FLOAT32 * experts * inputs * outputs
                yield layer, merged + self.low * p.shape[0] * (inputs + outputs)  # and casts of the adapter
            elif found:
                rank, rows = p.shape[0], self.images * counts.matmul_rows(self.config, f"{layer}.weight")
                outputs, inputs = self.shapes[f"{layer}.weight"]
                kept = self.low * rows * rank
                if ".mlp." in layer:  # each operator of the network keeps its input
                    kept += self.low * rows * (inputs + outputs)
                if self.low < FLOAT32:  # peft casts the input to float32, autocast casts it again
                    kept += (FLOAT32 + self.low) * rows * inputs + self.low * rank * (inputs + outputs)
                yield layer, kept
