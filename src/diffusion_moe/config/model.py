"""Settings of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from ..routing_rules import RULES, RoutingRule, rule_of
from .fields import BELOW_ONE, NOT_NEGATIVE, POSITIVE, POSITIVE_OR_NULL, Settings, names_where, setting

Activation = Literal["gelu", "silu", "swiglu"]
Position = Literal["sincos", "rope1d", "rope2d", "sincos+rope2d"]
Shared = Literal["none", "identity", "gelu", "swiglu"]
Process = Literal["flow", "ddpm"]
Prediction = Literal["velocity", "x", "epsilon"]


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The diffusion transformer. The fields are the arguments of `diffusion_moe.DiT` and `diffusion_moe.JiT`."""

    backbone: Literal["dit", "jit"] = setting("dit", affects="weights")
    """dit: latents or small images; jit: large pixel patches through a bottleneck, with class tokens in the
    sequence."""
    process: Process = setting("flow", affects="weights")
    """Meaning of t: flow, from 0 (noise) to 1 (data) on a straight path; ddpm, the step 0 (data) to 999 (noise) of the
    linear schedule."""
    prediction: Prediction = setting("velocity", affects="weights")
    """Output of the network: the velocity x - epsilon, the clean image x, or the noise epsilon."""
    min_gap: float = setting(0.05, affects="weights", reference=False, valid=POSITIVE)
    """Smallest 1 - t (and t) that an output is divided by to become another prediction (process: flow)."""
    noise_scale: float = setting(1.0, affects="weights", reference=False, valid=POSITIVE)
    """Standard deviation of the noise at t = 0 (process: flow)."""
    sample_size: int = setting(32, affects="positions", common=True, valid=POSITIVE)
    """Height and width of the image or latent, in its own pixels."""
    patch_size: int = setting(2, affects="weights", common=True, valid=POSITIVE)
    """Side of the square of pixels that makes one token."""
    in_channels: int = setting(4, affects="weights", valid=POSITIVE)
    """Channels of the image or latent."""
    learn_sigma: bool = setting(False, affects="weights")
    """Predict twice the channels, as the papers' models do; the second half is the variance (process: ddpm) or
    unused."""
    hidden_size: int = setting(384, affects="weights", common=True, valid=POSITIVE)
    """Width D of a token."""
    depth: int = setting(12, affects="weights", common=True, valid=POSITIVE)
    """Number of transformer blocks."""
    bottleneck_dim: int | None = setting(None, affects="weights")
    """Width that a patch is projected to before D (backbone: jit)."""
    class_tokens: int = setting(0, affects="weights", valid=NOT_NEGATIVE)
    """Tokens made of the class, before those of the image (backbone: jit)."""
    class_tokens_from: int = setting(0, affects="weights")
    """Index of the first block with class tokens (backbone: jit)."""
    num_heads: int = setting(6, affects="weights", common=True, valid=POSITIVE)
    """Attention heads."""
    num_kv_heads: int | None = setting(None, affects="weights", valid=POSITIVE_OR_NULL)
    """Key and value heads (grouped-query attention); null: as many as num_heads."""
    head_dim: int | None = setting(None, affects="weights", valid=POSITIVE_OR_NULL)
    """Width of a head; null: hidden_size / num_heads."""
    qk_norm: bool = setting(False, affects="weights")
    """Normalise queries and keys (RMSNorm over each head)."""
    attention_sinks: bool = setting(False, affects="weights")
    """Add a learned logit per head to the softmax, so that a head may attend to nothing."""
    sliding_window: int = setting(0, affects="weights", valid=NOT_NEGATIVE)
    """Attend to tokens whose index (row by row) differs by less than this; 0: to all tokens."""
    norm: Literal["layernorm", "rmsnorm"] = setting("layernorm", affects="weights")
    """Normalisation before attention and feed-forward: LayerNorm without a learned scale, or RMSNorm with one."""
    position: Position = setting("rope2d", affects="weights")
    """Position embedding: a fixed sine-cosine table added once, rotary over one or two axes, or both."""
    rotary_pairs: Literal["halves", "neighbours"] = setting("halves", affects="weights")
    """Pairs of elements that rotary positions rotate: i and i + half of the axis' share, or 2i and 2i + 1."""
    mlp_ratio: float = setting(4.0, affects="weights")
    """Hidden width of a dense feed-forward layer over D."""
    mlp_dim: int | None = setting(None, affects="weights", valid=POSITIVE_OR_NULL)
    """Hidden width of a dense feed-forward layer; null: mlp_ratio times hidden_size."""
    mlp_activation: Activation = setting("gelu", affects="weights")
    """Activation of the dense feed-forward layers (gelu is the tanh form)."""
    mlp_bias: bool = setting(True, affects="weights")
    """Biases in the dense feed-forward layers."""
    dropout: float = setting(0.0, affects="nothing", valid=BELOW_ONE)
    """Dropout after attention and inside dense feed-forward layers, in the middle half of the blocks."""
    attention_dropout: float = setting(0.0, affects="nothing", valid=BELOW_ONE)
    """Dropout of attention weights, in the middle half of the blocks."""
    num_classes: int = setting(
        1000, affects="labels", common=True, valid=NOT_NEGATIVE._replace(remedy="use 0 for an unconditional model")
    )
    """Number of classes; 0: an unconditional model."""
    null_class: bool = setting(True, affects="labels")
    """Add one class for no class, which guidance needs."""
    text_dim: int = setting(0, affects="weights", group="text", valid=NOT_NEGATIVE)
    """Width of the text encoder's features; 0: no text."""
    text_length: int = setting(77, affects="weights", group="text", valid=POSITIVE)
    """Maximum number of tokens of a prompt (text_dim above 0)."""
    text_pooled_dim: int = setting(0, affects="weights", group="text", valid=NOT_NEGATIVE)
    """Width of the text encoder's pooled feature, which modulates the blocks together with time; 0: the mean over the
    tokens is used instead (text_dim above 0)."""
    text_conditioning: Literal["cross", "joint"] = setting("cross", affects="weights", group="text")
    """cross: image tokens attend to text tokens after each self-attention, and only image tokens are routed; joint:
    text and image tokens form one sequence, which attends and is routed together (text_dim above 0)."""
    text_null: Literal["learned", "empty"] = setting("learned", affects="weights", group="text")
    """Text features without a prompt, for guidance and dropout: a learned sequence, or the encoder's features of the
    empty prompt (text_dim above 0)."""
    router: str = setting("dsmoe", affects="weights", group="experts", common=True)
    """Routing rule: dense (no experts), tc (token choice), ec (expert choice per image), diffmoe (expert choice over
    the batch with a capacity predictor), dsmoe (sigmoid grouped top-k), race (one top-k over all tokens and experts of
    the batch), threshold (tokens above each expert's moving threshold), promoe (prototypes by cosine, and the last
    expert for images without a class), nucleus (expert choice per image by token and time), time (an expert for each
    range of t)."""
    num_experts: int = setting(16, affects="weights", group="experts", common=True)
    """Routed experts of a layer."""
    expert_dim: int = setting(768, affects="weights", group="experts", common=True, valid=POSITIVE)
    """Hidden width of one expert."""
    expert_activation: Literal["gelu", "swiglu"] = setting("swiglu", affects="weights", group="experts")
    """Activation of the experts."""
    expert_bias: bool = setting(False, affects="weights", group="experts")
    """Biases in the experts' two projections."""
    expert_dropout: float = setting(0.0, affects="nothing", group="experts", valid=BELOW_ONE)
    """Dropout inside routed and shared experts."""
    top_k: int = setting(2, affects="weights", group="experts", common=True)
    """Experts per token (router: tc, dsmoe, promoe)."""
    capacity: float = setting(1.0, affects="weights", group="experts", common=True)
    """Experts per token, on average (router: ec, diffmoe, race, threshold, nucleus)."""
    layer_capacities: tuple[float, ...] | None = setting(None, affects="weights", group="experts")
    """Capacity of each MoE layer, in order, for rules that read capacity; null: capacity for all."""
    n_group: int = setting(1, affects="weights", group="experts")
    """Groups the experts are divided into (router: dsmoe)."""
    topk_group: int = setting(1, affects="weights", group="experts")
    """Groups a token may choose its experts from (router: dsmoe)."""
    routed_scaling_factor: float = setting(1.0, affects="weights", group="experts")
    """Factor on the routed experts' weights (router: dsmoe, promoe, nucleus)."""
    shared: Shared = setting("swiglu", affects="weights", group="experts")
    """Output added to that of a token's routed experts: none, the token itself (identity), or that of a shared expert
    with this activation."""
    shared_dim: int | None = setting(None, affects="weights", group="experts", valid=POSITIVE_OR_NULL)
    """Hidden width of the shared expert; null: expert_dim."""
    shared_bias: bool = setting(False, affects="weights", group="experts")
    """Biases in the shared expert."""
    balance: Literal["none", "aux", "bias"] = setting("none", affects="nothing", group="experts", reference=False)
    """Load balancing of token-choice routers (router: tc, dsmoe): none, an auxiliary loss, or the correction bias,
    moved after each step (DeepSeek-V3)."""
    balance_weight: float = setting(0.01, affects="nothing", group="experts", reference=False)
    """Weight of the auxiliary loss (balance: aux)."""
    balance_rate: float = setting(0.001, affects="nothing", group="experts", reference=False)
    """Step of the correction bias (balance: bias)."""
    capacity_loss_weight: float = setting(1.0, affects="nothing", group="experts", reference=False)
    """Weight of the capacity predictor's loss (router: diffmoe)."""
    threshold_decay: float = setting(0.95, affects="nothing", group="experts", reference=False)
    """Decay of the EMA of the thresholds (router: diffmoe, race, threshold)."""
    similarity_loss_weight: float = setting(1e-4, affects="nothing", group="experts", reference=False)
    """Weight of the loss on experts that score and take the same tokens (router: race)."""
    target_loss_weight: float = setting(1e-2, affects="nothing", group="experts", reference=False)
    """Weight of each MoE layer's loss of predicting the training target (router: race)."""
    inference_pool: Literal["image", "batch"] = setting("image", affects="nothing", group="experts", reference=False)
    """Tokens that thresholds choose from at inference (router: diffmoe): those of each image, or of the whole batch as
    in the paper."""
    contrastive_weight: float = setting(1.0, affects="nothing", group="experts", reference=False, valid=NOT_NEGATIVE)
    """Weight of the contrastive loss of prototypes (router: promoe)."""
    contrastive_temperature: float = setting(0.07, affects="nothing", group="experts", reference=False)
    """Temperature of that loss (router: promoe)."""
    time_boundaries: tuple[float, ...] | None = setting(None, affects="weights", group="experts")
    """Times between the ranges of t of the experts, ascending, one fewer than experts; 0 is noise, 1 is data (router:
    time). null: ranges of equal length."""
    moe_layer_freq: int = setting(2, affects="weights", group="experts", valid=POSITIVE)
    """Period of blocks with an MoE layer: 1: all blocks; 2: blocks 1, 3, ...; n: the last of every n."""
    first_k_dense: int = setting(0, affects="weights", group="experts", valid=NOT_NEGATIVE)
    """Number of first blocks that are dense whatever moe_layer_freq is."""
    last_k_dense: int = setting(0, affects="weights", group="experts", valid=NOT_NEGATIVE)
    """Number of last blocks that are dense whatever moe_layer_freq is."""
    fusion: bool = setting(False, affects="weights")
    """Fuse the tokens before and after the middle blocks by a linear layer, with a mask token where these saw none
    (SPRINT)."""
    first_k_full: int = setting(2, affects="nothing", reference=False, valid=NOT_NEGATIVE)
    """Number of first blocks that see all tokens; those between them and the last ones are the middle blocks (fusion,
    or training.token_drop_rate above 0)."""
    last_k_full: int = setting(2, affects="nothing", reference=False, valid=NOT_NEGATIVE)
    """Number of last blocks that see all tokens (fusion, or training.token_drop_rate above 0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_divisible("sample_size", "patch_size")
        if self.head_dim is None:
            self.require_divisible("hidden_size", "num_heads")
        if self.num_kv_heads is not None:
            self.require_divisible("num_heads", "num_kv_heads")
        if self.process == "ddpm" and self.prediction != "epsilon":
            reason = "but model.process ddpm predicts epsilon; set it to epsilon"
            raise ValueError(f"model.prediction is {self.prediction!r}, {reason}")
        self._check_positions()
        self._check_backbone()
        self._check_text()
        if self.fusion:
            self.check_middle_blocks("model.fusion is true")
        self._check_experts()

    @property
    def rule(self) -> type[RoutingRule] | None:
        """The routing rule; None for dense."""
        return rule_of(self.router)

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks with an MoE layer: the last of every `moe_layer_freq`, but for the first and last
        dense ones."""
        if self.rule is None:
            return ()
        inner = range(self.first_k_dense, self.depth - self.last_k_dense)
        return tuple(index for index in inner if (index + 1) % self.moe_layer_freq == 0)

    def of_moe_block(self, index: int) -> ModelConfig:
        """The settings with the capacity of MoE block `index`."""
        if self.layer_capacities is None:
            return self
        capacity = self.layer_capacities[self.moe_blocks.index(index)]
        return replace(self, capacity=capacity, layer_capacities=None)

    @property
    def experts_per_token(self) -> float:
        """Routed experts that serve a token of an MoE layer, on average over tokens and layers."""
        if self.rule is None:
            return 0.0
        if self.layer_capacities is None:
            return self.rule.experts_per_token(self)
        return fmean(self.rule.experts_per_token(self.of_moe_block(index)) for index in self.moe_blocks)

    @property
    def target_dim(self) -> int:
        """Values of the training target that an image token stands for."""
        return self.in_channels * self.patch_size**2

    @property
    def pools_batch(self) -> bool:
        """True where images of a batch depend on each other at inference."""
        return self.rule is not None and self.rule.pools_batch(self)

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def attended_width(self) -> int:
        """Width of a head in the matmuls of attention: sinks add channels (`nn.attention.with_sink_key`)."""
        return self.head_width + 8 * self.attention_sinks

    @property
    def mlp_width(self) -> int:
        """Hidden width of a dense feed-forward layer."""
        return self.mlp_dim or int(self.hidden_size * self.mlp_ratio)

    @property
    def rotary_axes(self) -> int:
        """Axes of rotary positions; 0 without."""
        return {"sincos": 0, "rope1d": 1, "rope2d": 2, "sincos+rope2d": 2}[self.position]

    @property
    def adds_sincos(self) -> bool:
        """True if the sine-cosine table is added to the tokens."""
        return self.position in ("sincos", "sincos+rope2d")

    @property
    def guidable(self) -> bool:
        """True if the model has an output for no class or no prompt, as guidance needs."""
        return self.text_dim > 0 or (self.num_classes > 0 and self.null_class)

    def check_middle_blocks(self, need: str) -> None:
        """Refuse a model without middle blocks; `need` says what needs them."""
        if self.first_k_full + self.last_k_full >= self.depth:
            full = f"model.first_k_full {self.first_k_full} and last_k_full {self.last_k_full}"
            raise ValueError(f"{need}, but {full} leave no middle blocks of model.depth {self.depth}; lower them")

    def _check_positions(self) -> None:
        need = f"as model.position {self.position} needs"
        if self.adds_sincos and self.hidden_size % 4:
            raise ValueError(f"model.hidden_size {self.hidden_size} is not divisible by 4, {need}")
        if self.rotary_axes and self.head_width % (2 * self.rotary_axes):
            head = f"a head is {self.head_width} wide (model.head_dim, or hidden_size / num_heads)"
            raise ValueError(f"{head}, not divisible by {2 * self.rotary_axes}, {need}")

    def _check_backbone(self) -> None:
        if self.backbone == "dit":
            for name in ("bottleneck_dim", "class_tokens", "class_tokens_from"):
                self.require_default(name, "but model.backbone is dit")
            return
        if not self.bottleneck_dim or self.bottleneck_dim < 0:
            raise ValueError(f"model.bottleneck_dim is {self.bottleneck_dim}; model.backbone jit needs a positive one")
        if not self.num_classes:
            self.require_default("class_tokens", "but model.num_classes is 0", "use 0 for an unconditional model")
        if not 0 <= self.class_tokens_from < self.depth:
            remedy = f"choose 0 to below model.depth {self.depth}"
            raise ValueError(f"model.class_tokens_from is {self.class_tokens_from}; {remedy}")

    def _check_experts(self) -> None:
        if self.rule is None:
            return
        self.rule.check(self, "model.")
        if "unconditional_B" in self.rule.sees and not self.guidable:
            remedy = "set model.num_classes and model.null_class, or model.text_dim"
            raise ValueError(f"model.router {self.router} needs images without class or prompt; {remedy}")
        if self.layer_capacities is None:
            return
        if len(self.layer_capacities) != len(self.moe_blocks):
            remedy = f"but the model has {len(self.moe_blocks)} MoE layers; give one for each, or null"
            raise ValueError(f"model.layer_capacities are {len(self.layer_capacities)}, {remedy}")
        for capacity in self.layer_capacities:
            if not 0 < capacity <= self.num_experts:
                remedy = f"choose above 0 up to model.num_experts {self.num_experts}"
                raise ValueError(f"model.layer_capacities has {capacity}; {remedy}")

    def _check_text(self) -> None:
        if not self.text_dim:
            for name in TEXT_FIELDS:
                self.require_default(name, "but model.text_dim is 0 (no text)")
        if self.text_conditioning == "joint":
            reason = "but in one sequence with the text tokens are no neighbours"
            self.require_default("sliding_window", reason, "set it to 0, or model.text_conditioning to cross")


TEXT_FIELDS = names_where(ModelConfig, group="text")
"""Fields that only models with text read."""


def unread_by(router: str) -> frozenset[str]:
    """Fields that a routing rule does not read."""
    if router == "dense":
        return names_where(ModelConfig, group="experts") - {"router"}
    read_by_some = frozenset().union(*(rule.reads for rule in RULES.values()))
    rule = rule_of(router)
    assert rule is not None
    return read_by_some - rule.reads
