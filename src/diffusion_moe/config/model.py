"""The settings of a model. This file imports nothing heavy, as `config.py` does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from ..routing_rules import RoutingRule, rule_of
from .require import require

Router = str
"""dense, or a name in `routing_rules.RULES`."""
Balance = Literal["none", "aux", "bias"]
Activation = Literal["gelu", "silu", "swiglu"]
Position = Literal["sincos", "rope1d", "rope2d", "sincos+rope2d"]
Process = Literal["flow", "ddpm"]
Prediction = Literal["velocity", "x", "epsilon"]

TEXT_FIELDS = ("text_dim", "text_length", "text_pooled_dim", "text_conditioning", "text_null")
"""Fields of `ModelConfig` that say how text conditions."""


@dataclass(frozen=True)
class ModelConfig:
    """The diffusion transformer. The fields are the arguments of `diffusion_moe.DiT` and `diffusion_moe.JiT`."""

    backbone: Literal["dit", "jit"] = "dit"
    """dit: latents or small images; jit: large pixel patches through a bottleneck, and class tokens in the sequence."""
    process: Process = "flow"
    """What t means: flow, from 0 (noise) to 1 (data) on a straight path; ddpm, the step 0 (data) to 999 (noise) of the
    linear schedule."""
    prediction: Prediction = "velocity"
    """What the network answers: the velocity x - epsilon, the clean image x, or the noise epsilon."""
    min_gap: float = 0.05
    """Lowest 1 - t (and t) by which an answer is divided to become another prediction (process: flow)."""
    noise_scale: float = 1.0
    """Standard deviation of the noise at t = 0 (process: flow)."""
    sample_size: int = 32
    """Height and width of the image or latent, in its own pixels."""
    patch_size: int = 2
    """Side of the square of pixels that makes one token."""
    in_channels: int = 4
    """Channels of the image or latent."""
    learn_sigma: bool = False
    """Predict twice the channels, as the published models do; the second half is the variance (process: ddpm) or
    unused."""
    hidden_size: int = 384
    """Width D of a token."""
    depth: int = 12
    """Number of transformer blocks."""
    bottleneck_dim: int | None = None
    """Width that a patch is squeezed to before D (backbone: jit)."""
    class_tokens: int = 0
    """Tokens made of the class, put before those of the image (backbone: jit)."""
    class_tokens_from: int = 0
    """The first block that sees the class tokens (backbone: jit)."""
    num_heads: int = 6
    """Attention heads."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); null: as many as num_heads."""
    head_dim: int | None = None
    """Width of a head; null: hidden_size / num_heads."""
    qk_norm: bool = False
    """Normalise queries and keys (RMSNorm over each head)."""
    attention_sinks: bool = False
    """A learned number a head that joins the softmax, so that a head may attend to nothing."""
    sliding_window: int = 0
    """Attend to tokens whose number (row by row) is less than this away; 0: to all."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention and feed-forward: LayerNorm without, or RMSNorm with a learned scale."""
    position: Position = "rope2d"
    """Positions: a fixed sine-cosine table added once, rotary over one or two axes, or both."""
    rotary_pairs: Literal["halves", "neighbours"] = "halves"
    """Which two numbers rotary positions turn together: i and i + half of the axis' share, or 2i and 2i + 1."""
    mlp_ratio: float = 4.0
    """Hidden width of a dense feed-forward layer over D."""
    mlp_dim: int | None = None
    """Hidden width of a dense feed-forward layer; null: mlp_ratio times hidden_size."""
    mlp_activation: Activation = "gelu"
    """Activation of the dense feed-forward layers (gelu is the tanh form)."""
    mlp_bias: bool = True
    """Whether the dense feed-forward layers have biases."""
    dropout: float = 0.0
    """Dropout after attention and inside dense feed-forward layers, in the middle half of the blocks."""
    attention_dropout: float = 0.0
    """Dropout of attention weights, in the middle half of the blocks."""
    num_classes: int = 1000
    """Number of classes; 0 for an unconditional model."""
    null_class: bool = True
    """Whether there is one class more, for no class, as guidance needs."""
    text_dim: int = 0
    """Width of the text encoder's features; 0: no text."""
    text_length: int = 77
    """Most tokens of a prompt (text_dim above 0)."""
    text_pooled_dim: int = 0
    """Width of the text encoder's pooled feature, which modulates the blocks beside time; 0: it has none, and the mean
    over the tokens takes its place (text_dim above 0)."""
    text_conditioning: Literal["cross", "joint"] = "cross"
    """cross: image tokens attend to text tokens after each self-attention, and routers see image tokens alone; joint:
    text and image tokens are one sequence, which attends and is routed as one (text_dim above 0)."""
    text_null: Literal["learned", "empty"] = "learned"
    """What stands for no prompt, in guidance and dropout: a learned sequence, or the encoder's features of the empty
    prompt (text_dim above 0)."""
    router: Router = "dsmoe"
    """Routing rule: dense (no experts), tc (token choice), ec (expert choice per image), diffmoe (batch pool with a
    capacity predictor), dsmoe (sigmoid grouped top-k)."""
    num_experts: int = 16
    """Routed experts of a layer."""
    expert_dim: int = 768
    """Hidden width of one expert."""
    expert_activation: Literal["gelu", "swiglu"] = "swiglu"
    """Activation of the experts."""
    expert_bias: bool = False
    """Whether the experts' two projections have biases."""
    expert_dropout: float = 0.0
    """Dropout inside routed and shared experts."""
    top_k: int = 2
    """Experts a token is sent to (tc, dsmoe)."""
    capacity: float = 1.0
    """Experts a token is sent to on average (ec, diffmoe)."""
    n_group: int = 1
    """Groups the experts are divided into (dsmoe)."""
    topk_group: int = 1
    """Groups a token may choose its experts from (dsmoe)."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed experts' weights (dsmoe)."""
    shared: Literal["none", "identity", "gelu", "swiglu"] = "swiglu"
    """What every token gets beside its routed experts: nothing, itself, or a shared expert of that activation."""
    shared_dim: int | None = None
    """Hidden width of the shared expert; null: expert_dim."""
    shared_bias: bool = False
    """Whether the shared expert has biases."""
    balance: Balance = "none"
    """How token-choice routers (tc, dsmoe) keep experts evenly loaded: not at all, by an auxiliary loss, or by moving
    the correction bias after each step (DeepSeek-V3)."""
    balance_weight: float = 0.01
    """Weight of the auxiliary loss (balance: aux)."""
    balance_rate: float = 0.001
    """Step of the correction bias (balance: bias)."""
    capacity_loss_weight: float = 1.0
    """Weight of the capacity predictor's loss (diffmoe)."""
    threshold_decay: float = 0.95
    """Decay of the moving average of the thresholds (diffmoe)."""
    inference_pool: Literal["image", "batch"] = "image"
    """Over what tokens thresholds decide at inference (diffmoe): each image for itself, or the paper's whole batch."""
    moe_layer_freq: int = 2
    """Every how many blocks one is an MoE block, the last of each group: 2: blocks 1, 3, ...; 1: all blocks."""
    first_k_dense: int = 0
    """Number of first blocks that are dense whatever moe_layer_freq says."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices, value = get_args(hint), getattr(self, name)
            if get_origin(hint) is Literal:
                require(value in choices, f"model.{name} is {value!r}; choose one of {', '.join(choices)}")
        for name in ("sample_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        require(
            self.sample_size % self.patch_size == 0,
            f"model.sample_size {self.sample_size} is not divisible by model.patch_size {self.patch_size}",
        )
        require(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}",
        )
        kv_heads = self.num_kv_heads
        require(
            kv_heads is None or (kv_heads > 0 and self.num_heads % kv_heads == 0),
            f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {kv_heads}",
        )
        self._check_positions()
        self._check_backbone()
        self._check_text()
        for name in ("dropout", "attention_dropout", "expert_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name} is {getattr(self, name)}; choose from 0 to below 1")
        for name in ("sliding_window", "first_k_dense"):
            require(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; use 0 for none")
        for name in ("head_dim", "mlp_dim", "shared_dim"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name} is {value}; it must be positive, or null")
        require(self.num_classes >= 0, f"model.num_classes is {self.num_classes}; use 0 for an unconditional model")
        if self.rule is not None:
            self._check_experts()

    @property
    def rule(self) -> type[RoutingRule] | None:
        """The routing rule; None for dense."""
        return rule_of(self.router)

    @property
    def experts_per_token(self) -> float:
        """Routed experts that serve a token of an MoE layer, on average."""
        return 0.0 if self.rule is None else self.rule.experts_per_token(self)

    @property
    def pools_batch(self) -> bool:
        """True where images of a batch depend on each other at inference."""
        return self.rule is not None and self.rule.pools_batch(self)

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

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
        """Whether the sine-cosine table is added to the tokens."""
        return self.position in ("sincos", "sincos+rope2d")

    def _check_positions(self) -> None:
        require(
            not self.adds_sincos or self.hidden_size % 4 == 0,
            f"model.hidden_size {self.hidden_size} is not divisible by 4, as model.position {self.position} needs",
        )
        require(
            not self.rotary_axes or self.head_width % (2 * self.rotary_axes) == 0,
            f"a head is {self.head_width} wide (model.head_dim, or hidden_size / num_heads), not divisible by "
            f"{2 * self.rotary_axes}, as model.position {self.position} needs",
        )

    def _check_backbone(self) -> None:
        if self.process == "ddpm":
            require(
                self.prediction == "epsilon",
                f"model.prediction is {self.prediction!r}, but model.process ddpm predicts epsilon; set it to epsilon",
            )
        for name in ("min_gap", "noise_scale"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        if self.backbone == "dit":
            for name, none in (("bottleneck_dim", None), ("class_tokens", 0), ("class_tokens_from", 0)):
                require(
                    getattr(self, name) == none,
                    f"model.{name} is {getattr(self, name)}, but only model.backbone jit has it; leave it out",
                )
            return
        require(
            self.bottleneck_dim is not None and self.bottleneck_dim > 0,
            f"model.bottleneck_dim is {self.bottleneck_dim}; model.backbone jit needs a positive one",
        )
        require(self.class_tokens >= 0, f"model.class_tokens is {self.class_tokens}; use 0 for none")
        require(
            self.class_tokens == 0 or self.num_classes > 0,
            f"model.class_tokens is {self.class_tokens}, but model.num_classes is 0; use 0 for an unconditional model",
        )
        require(
            0 <= self.class_tokens_from < self.depth,
            f"model.class_tokens_from is {self.class_tokens_from}; choose 0 to below model.depth {self.depth}",
        )

    def _check_text(self) -> None:
        for name in ("text_dim", "text_pooled_dim"):
            require(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; use 0 for none")
        if not self.text_dim:
            for name in TEXT_FIELDS[1:]:
                usual = type(self).__dataclass_fields__[name].default
                require(
                    getattr(self, name) == usual,
                    f"model.{name} is {getattr(self, name)}, but model.text_dim is 0 (no text); leave it out",
                )
        require(self.text_length > 0, f"model.text_length is {self.text_length}; it must be positive")
        require(
            self.text_conditioning == "cross" or self.sliding_window == 0,
            f"model.sliding_window is {self.sliding_window}, but in one sequence with the text tokens are no "
            "neighbours; set it to 0, or model.text_conditioning to cross",
        )

    @property
    def guidable(self) -> bool:
        """Whether the model has an answer for no class or no prompt, as guidance needs."""
        return self.text_dim > 0 or (self.num_classes > 0 and self.null_class)

    def _check_experts(self) -> None:
        for name in ("expert_dim", "moe_layer_freq"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        if self.rule is not None:
            self.rule.check(self, "model.")
