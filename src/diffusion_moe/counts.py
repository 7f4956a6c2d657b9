"""Parameters, buffers and matmuls of a model by formula, from its settings alone: no torch, no model is built.

Tests compare all of it with built models, name by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .config import ModelConfig, Recipe
from .config.token_drop import num_kept

PAPER_MILLION = 2**20
"""The papers' "M" parameters."""
TIME_FREQUENCIES = 256
"""Width of the sinusoidal embedding of time."""

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class Size(NamedTuple):
    """Number of parameters of one model."""

    total: int
    """Parameters, and the fixed sine-cosine table if the model has one, as the papers' code counts."""
    activated: float
    """The same with only the routed experts that serve a token on average."""


class Flops(NamedTuple):
    """Floating-point operations of matmuls (two a multiply-add), forward, for one image and one step."""

    outside: int
    """Embedders and output layer."""
    blocks: tuple[int, ...]
    """Each block."""

    @property
    def total(self) -> int:
        """Whole model."""
        return self.outside + sum(self.blocks)


def model_size(config: ModelConfig) -> Size:
    """Count the parameters of a model."""
    shapes = parameter_shapes(config)
    experts = sum(math.prod(shape) for name, shape in shapes.items() if is_expert(name))
    total = sum(math.prod(shape) for shape in shapes.values())
    total += num_image_tokens(config) * config.hidden_size if config.adds_sincos else 0
    return Size(total, total - experts * (1 - config.experts_per_token / config.num_experts))


def model_flops(config: ModelConfig, drop_rate: float = 0.0) -> Flops:
    """Count the matmuls of a model in training, where DiffMoE's experts take their share of the one image's tokens.

    Args:
        config: the model.
        drop_rate: share of the image's tokens that the middle blocks do not see.
    """
    outside, blocks = 0, [0] * config.depth
    for name, shape in parameter_shapes(config).items():
        flops = 2 * matmul_rows(config, name, drop_rate) * math.prod(shape[1:] if is_expert_matrix(name) else shape)
        if name.startswith("blocks."):
            blocks[block_index(name)] += flops
        else:
            outside += flops
    for index in range(config.depth):
        tokens, heads = num_tokens(config, index, drop_rate), config.num_heads
        # Query times key, and weight times value.
        blocks[index] += 4 * tokens * (tokens + config.attention_sinks) * heads * config.attended_width
        if has_cross_attention(config):
            blocks[index] += 4 * tokens * config.text_length * heads * config.head_width
        if config.rule is not None and is_moe_block(config, index):
            blocks[index] += config.rule.loss_flops(config, config.hidden_size, tokens)
    return Flops(outside, tuple(blocks))


def training_flops(recipe: Recipe) -> float:
    """FLOPs of the forward pass of an image, mean over all steps of training."""
    training = recipe.training
    dropping = training.dropping_steps / training.steps
    fewer, full = (model_flops(recipe.model, rate).total for rate in (training.token_drop_rate, 0.0))
    return dropping * fewer + (1 - dropping) * full


def matmul_rows(config: ModelConfig, name: str, drop_rate: float = 0.0) -> int:
    """Rows of one image that are multiplied by a parameter; 0 if it is no matrix of a matmul."""
    if is_expert_matrix(name):
        return num_assignments(config, block_index(name), drop_rate=drop_rate)
    if name.endswith(".router.time_weight"):
        return 1
    if name.startswith("fusion."):
        return num_tokens(config, middle_blocks(config)[-1]) if name.endswith(".weight") else 0
    if name.endswith("experts.b_out"):
        return num_tokens(config, block_index(name), drop_rate)  # the routing weights, as a matrix, times the biases
    if not name.endswith(".weight") or name == "y_embedder.weight" or "norm" in name:
        return 0
    if name.startswith("text_embedder.mlp.") or ".cross_attn.kv." in name:
        return config.text_length
    if name.startswith(("t_embedder.", "text_embedder.pool.")) or ".adaln." in name:
        return 1
    return num_tokens(config, block_index(name), drop_rate) if name.startswith("blocks.") else num_image_tokens(config)


# Tokens and assignments


def num_image_tokens(config: ModelConfig) -> int:
    """Tokens of one image."""
    return (config.sample_size // config.patch_size) ** 2


def num_tokens(config: ModelConfig, index: int, drop_rate: float = 0.0) -> int:
    """Tokens of one image in block `index`, with those of its text and class that are in the same sequence."""
    image = num_image_tokens(config)
    if drop_rate and index in middle_blocks(config):
        image = num_kept(image, drop_rate)
    text = config.text_length if config.text_dim and config.text_conditioning == "joint" else 0
    return image + text + (config.class_tokens if index >= config.class_tokens_from else 0)


def num_assignments(config: ModelConfig, index: int, images: int = 1, drop_rate: float = 0.0) -> int:
    """Pairs of token and expert in MoE block `index`, for a batch of images in training."""
    assert config.rule is not None
    return config.rule.num_assignments(config.of_moe_block(index), num_tokens(config, index, drop_rate), images)


def images_per_process(batch_size: int, accumulation: int, world: int) -> int:
    """Images of a micro-batch of one process; a ValueError if the batch cannot be divided evenly."""
    parts = accumulation * world
    if batch_size % parts:
        product = f"training.accumulation {accumulation} x {world} processes = {parts}"
        raise ValueError(f"training.batch_size {batch_size} is not divisible by {product}")
    return batch_size // parts


def middle_blocks(config: ModelConfig) -> range:
    """Blocks that see a part of the tokens where tokens are dropped."""
    return range(config.first_k_full, config.depth - config.last_k_full)


def is_moe_block(config: ModelConfig, index: int) -> bool:
    """True for an MoE block."""
    return index in config.moe_blocks


def in_middle_half(config: ModelConfig, index: int) -> bool:
    """True for the blocks that have dropout, as in JiT."""
    quarter = config.depth // 4
    return quarter <= index < 3 * quarter


def has_cross_attention(config: ModelConfig) -> bool:
    """True where the blocks attend to a text beside their own tokens."""
    return config.text_dim > 0 and config.text_conditioning == "cross"


# Names of parameters


def block_index(name: str) -> int:
    """Number of the block in the name of its parameter."""
    return int(name.split(".", 2)[1])


def is_expert(name: str) -> bool:
    """True for stacked parameters of routed experts, whose first axis is the expert."""
    return ".mlp.experts." in name


def is_expert_matrix(name: str) -> bool:
    """True for stacked matrices of routed experts, (E, inputs, outputs)."""
    return name.endswith((".experts.w_in", ".experts.w_out"))


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """True for the matrices of a block that take its tokens: attention, feed-forward layers and experts.

    Not of them are routers and modulation.
    """
    is_matrix = is_expert_matrix(name) or (len(shape) == 2 and name.endswith(".weight"))
    return is_matrix and name.startswith("blocks.") and ".router." not in name and ".adaln." not in name


# Shapes


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Shape of every parameter of a model, by its name."""
    D, patch = config.hidden_size, config.in_channels * config.patch_size**2
    shapes: Shapes = {}
    if config.backbone == "jit":
        assert config.bottleneck_dim is not None
        shapes |= _linear("x_embedder.proj1", patch, config.bottleneck_dim, bias=False)
        shapes |= _linear("x_embedder.proj2", config.bottleneck_dim, D)
        if config.class_tokens:
            shapes["class_positions"] = (config.class_tokens, D)
    else:
        shapes |= _linear("x_embedder", patch, D)
    shapes |= _linear("t_embedder.mlp.0", TIME_FREQUENCIES, D) | _linear("t_embedder.mlp.2", D, D)
    if config.num_classes:
        shapes["y_embedder.weight"] = (config.num_classes + int(config.null_class), D)
    if config.text_dim:
        shapes |= {f"text_embedder.{name}": shape for name, shape in _text_embedder(config).items()}
    for index in range(config.depth):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in _block(config, index).items()}
    if config.fusion:
        shapes |= {"fusion.mask_token": (D,)} | _linear("fusion.linear", 2 * D, D)
    if config.backbone == "jit":
        shapes |= _norm(config, "final_layer.norm")
    shapes |= _linear("final_layer.linear", D, config.patch_size**2 * config.in_channels * (1 + config.learn_sigma))
    return shapes | _linear("final_layer.adaln.1", D, 2 * D)


def buffer_shapes(config: ModelConfig, persistent: bool = False) -> Shapes:
    """Shape of every buffer of a model, by its name.

    Args:
        persistent: only those that a file of the model holds.
    """
    shapes: Shapes = {}
    if config.rotary_axes and not persistent:
        rows = num_tokens(config, config.depth - 1)  # the last block has all tokens
        shapes |= dict.fromkeys(("rotary_cos", "rotary_sin"), (rows, config.head_width))
    if config.adds_sincos:
        shapes["pos_embed"] = (num_image_tokens(config), config.hidden_size)
    if config.text_dim:
        shapes["text_embedder.null_mask"] = (config.text_length,)
        if config.text_null == "empty":
            shapes |= {f"text_embedder.{name}": shape for name, shape in _null_prompt(config).items()}
    for index in range(config.depth):
        if config.rule is not None and is_moe_block(config, index):
            state = config.rule.buffer_shapes(config)
            shapes |= {f"blocks.{index}.mlp.router.{name}": shape for name, shape in state.items()}
    return shapes


def buffer_bytes(config: ModelConfig, persistent: bool = False) -> int:
    """Bytes of a model's buffers: all float32, but the text's mask, which is bool."""
    sizes = {name: math.prod(shape) for name, shape in buffer_shapes(config, persistent).items()}
    return sum(size * (1 if name.endswith("null_mask") else 4) for name, size in sizes.items())


def _text_embedder(config: ModelConfig) -> Shapes:
    D, W = config.hidden_size, config.text_dim
    mlp = _linear("mlp.0", W, D) | _linear("mlp.2", D, D)
    pool = _linear("pool.0", config.text_pooled_dim or W, D) | _linear("pool.2", D, D)
    return mlp | pool | (_null_prompt(config) if config.text_null == "learned" else {})


def _null_prompt(config: ModelConfig) -> Shapes:
    pooled: Shapes = {"null_pooled": (config.text_pooled_dim,)} if config.text_pooled_dim else {}
    return {"null_text": (config.text_length, config.text_dim)} | pooled


def _block(config: ModelConfig, index: int) -> Shapes:
    D, H, I = config.hidden_size, config.num_heads, config.head_width  # noqa: E741
    kv_heads = config.num_kv_heads or H
    head_norms = ("q_norm.weight", "k_norm.weight") if config.qk_norm else ()
    shapes = _norm(config, "norm1") | _norm(config, "norm2")
    shapes |= _linear("attn.qkv", D, (H + 2 * kv_heads) * I) | _linear("attn.proj", H * I, D)
    shapes |= {f"attn.{name}": (I,) for name in head_norms}
    if config.attention_sinks:
        shapes["attn.sinks"] = (H,)
    if has_cross_attention(config):
        shapes |= _norm(config, "cross_norm") | _linear("cross_attn.q", D, H * I)
        shapes |= _linear("cross_attn.kv", D, 2 * kv_heads * I) | _linear("cross_attn.proj", H * I, D)
        shapes |= {f"cross_attn.{name}": (I,) for name in head_norms}
    shapes |= _linear("adaln.1", D, 6 * D)
    if is_moe_block(config, index):
        return shapes | _moe_layer(config)
    return shapes | _feed_forward("mlp", D, config.mlp_width, config.mlp_activation, config.mlp_bias)


def _moe_layer(config: ModelConfig) -> Shapes:
    D, E, F = config.hidden_size, config.num_experts, config.expert_dim
    columns = F * (2 if config.expert_activation == "swiglu" else 1)
    assert config.rule is not None
    shapes = {f"mlp.router.{name}": shape for name, shape in config.rule.parameter_shapes(config, D).items()}
    shapes |= {"mlp.experts.w_in": (E, D, columns), "mlp.experts.w_out": (E, F, D)}
    if config.expert_bias:
        shapes |= {"mlp.experts.b_in": (E, columns), "mlp.experts.b_out": (E, D)}
    if config.shared in ("gelu", "swiglu"):
        shapes |= _feed_forward("mlp.shared", D, config.shared_dim or F, config.shared, config.shared_bias)
    return shapes


def _feed_forward(name: str, dim: int, width: int, activation: str, bias: bool) -> Shapes:
    gate = _linear(f"{name}.gate_proj", dim, width, bias) if activation == "swiglu" else {}
    return gate | _linear(f"{name}.up_proj", dim, width, bias) | _linear(f"{name}.down_proj", width, dim, bias)


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    biases: Shapes = {f"{name}.bias": (outputs,)} if bias else {}
    return {f"{name}.weight": (outputs, inputs)} | biases


def _norm(config: ModelConfig, name: str) -> Shapes:
    """A LayerNorm has no parameters here."""
    return {f"{name}.weight": (config.hidden_size,)} if config.norm == "rmsnorm" else {}
