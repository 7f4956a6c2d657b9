"""Recipes: everything that defines a run, as frozen dataclasses.

A recipe is a YAML file whose sections are the fields of `Recipe`; every field is also an option of the command, under
the same dotted name. This file imports nothing heavy, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

Router = Literal["dense", "tc", "ec", "diffmoe", "dsmoe"]
Balance = Literal["none", "aux", "bias"]
Activation = Literal["gelu", "silu", "swiglu"]
Position = Literal["sincos", "rope1d", "rope2d", "sincos+rope2d"]
Process = Literal["flow", "ddpm"]
Prediction = Literal["velocity", "x", "epsilon"]
FLOW_SOLVERS = ("euler", "heun", "heun_euler", "dopri5", "sde")
DDPM_SOLVERS = ("ddpm", "ddim")
Solver = Literal["euler", "heun", "heun_euler", "dopri5", "sde", "ddpm", "ddim"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


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
    num_groups: int = 1
    """Groups the experts are divided into (dsmoe)."""
    top_groups: int = 1
    """Groups a token may choose its experts from (dsmoe)."""
    routed_scale: float = 1.0
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
    interleave: bool = True
    """Experts in the odd-numbered blocks only (1, 3, ...); false: in all blocks."""
    skip_first: int = 0
    """The first blocks stay dense."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices, value = get_args(hint), getattr(self, name)
            if get_origin(hint) is Literal:
                _require(value in choices, f"model.{name} is {value!r}; choose one of {', '.join(choices)}")
        for name in ("sample_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            _require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        _require(
            self.sample_size % self.patch_size == 0,
            f"model.sample_size {self.sample_size} is not divisible by model.patch_size {self.patch_size}",
        )
        _require(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}",
        )
        kv_heads = self.num_kv_heads
        _require(
            kv_heads is None or (kv_heads > 0 and self.num_heads % kv_heads == 0),
            f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {kv_heads}",
        )
        self._check_positions()
        self._check_backbone()
        for name in ("dropout", "attention_dropout", "expert_dropout"):
            _require(0 <= getattr(self, name) < 1, f"model.{name} is {getattr(self, name)}; choose from 0 to below 1")
        for name in ("sliding_window", "skip_first"):
            _require(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; use 0 for none")
        for name in ("head_dim", "mlp_dim", "shared_dim"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"model.{name} is {value}; it must be positive, or null")
        _require(self.num_classes >= 0, f"model.num_classes is {self.num_classes}; use 0 for an unconditional model")
        if self.router != "dense":
            self._check_experts()

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
        _require(
            not self.adds_sincos or self.hidden_size % 4 == 0,
            f"model.hidden_size {self.hidden_size} is not divisible by 4, as model.position {self.position} needs",
        )
        _require(
            not self.rotary_axes or self.head_width % (2 * self.rotary_axes) == 0,
            f"a head is {self.head_width} wide (model.head_dim, or hidden_size / num_heads), not divisible by "
            f"{2 * self.rotary_axes}, as model.position {self.position} needs",
        )

    def _check_backbone(self) -> None:
        if self.process == "ddpm":
            _require(
                self.prediction == "epsilon",
                f"model.prediction is {self.prediction!r}, but model.process ddpm predicts epsilon; set it to epsilon",
            )
        for name in ("min_gap", "noise_scale"):
            _require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        if self.backbone == "dit":
            for name, none in (("bottleneck_dim", None), ("class_tokens", 0), ("class_tokens_from", 0)):
                _require(
                    getattr(self, name) == none,
                    f"model.{name} is {getattr(self, name)}, but only model.backbone jit has it; leave it out",
                )
            return
        _require(
            self.bottleneck_dim is not None and self.bottleneck_dim > 0,
            f"model.bottleneck_dim is {self.bottleneck_dim}; model.backbone jit needs a positive one",
        )
        _require(self.class_tokens >= 0, f"model.class_tokens is {self.class_tokens}; use 0 for none")
        _require(
            self.class_tokens == 0 or self.num_classes > 0,
            f"model.class_tokens is {self.class_tokens}, but model.num_classes is 0; use 0 for an unconditional model",
        )
        _require(
            0 <= self.class_tokens_from < self.depth,
            f"model.class_tokens_from is {self.class_tokens_from}; choose 0 to below model.depth {self.depth}",
        )

    def _check_experts(self) -> None:
        for name in ("num_experts", "expert_dim", "top_k", "capacity"):
            _require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        for name in ("top_k", "capacity"):
            _require(
                getattr(self, name) <= self.num_experts,
                f"model.{name} is {getattr(self, name)}, more than model.num_experts {self.num_experts}",
            )
        if self.router == "dsmoe":
            _require(
                self.num_groups > 0 and self.num_experts % self.num_groups == 0,
                f"model.num_experts {self.num_experts} is not divisible by model.num_groups {self.num_groups}",
            )
            _require(
                0 < self.top_groups <= self.num_groups,
                f"model.top_groups is {self.top_groups}; choose 1 to model.num_groups {self.num_groups}",
            )
            reachable = self.top_groups * self.num_experts // self.num_groups
            _require(
                self.top_k <= reachable,
                f"model.top_k is {self.top_k}, but model.top_groups {self.top_groups} leaves {reachable} experts",
            )


@dataclass(frozen=True)
class DiffusionConfig:
    """How times and labels are drawn in training, and what the loss compares."""

    loss: Prediction | None = None
    """What the mean squared error compares, after converting to it: velocity, x or epsilon; null: what the model
    predicts. JiT predicts x and compares velocities."""
    time: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the training time t in [0, 1] (0 is noise, 1 is data); of ddpm's step, uniform only."""
    time_mean: float = 0.0
    """Mean of the normal under the logistic function (time: logit_normal)."""
    time_std: float = 1.0
    """Standard deviation of that normal."""
    class_dropout: float = 0.1
    """Share of training samples whose class is replaced by the null class, for guidance."""

    def __post_init__(self) -> None:
        _require(self.time_std > 0, f"diffusion.time_std is {self.time_std}; it must be positive")
        _require(0 <= self.class_dropout <= 1, f"diffusion.class_dropout is {self.class_dropout}; choose from 0 to 1")


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    kind: Literal["digits", "folder"] = "digits"
    """digits: scikit-learn's 1,797 handwritten digits; folder: a folder of images, one sub-folder a class."""
    path: str | None = None
    """The folder (kind: folder)."""
    image_size: int = 8
    """Height and width that images are resized and center-cropped to, in pixels (kind: folder)."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour (kind: folder)."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    on_corrupt: Literal["error", "skip"] = "error"
    """An unreadable image ends the run with its name, or is counted and replaced by the next one in the folder."""
    test_fraction: float = 0.2
    """Share of each class held out from training; the split is the same for every seed."""
    num_workers: int = 0
    """Processes that load images; the batches are the same for any number."""

    def __post_init__(self) -> None:
        _require(self.kind != "folder" or self.path is not None, "data.path is missing; data.kind folder needs it")
        _require(self.image_size > 0, f"data.image_size is {self.image_size}; it must be positive")
        _require(0 <= self.test_fraction < 1, f"data.test_fraction is {self.test_fraction}; choose from 0 to below 1")
        _require(self.num_workers >= 0, f"data.num_workers is {self.num_workers}; use 0 for none")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (not on biases, norms and embeddings)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine down to 0 at the last step."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient's norm to this; null: never."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        _require(
            all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas are {self.betas}; choose from 0 to below 1"
        )
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}; use 0 for none")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; use 0 for none")
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"optimizer.max_grad_norm is {self.max_grad_norm}; use null for no clipping",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    steps: int = 10000
    """Optimizer steps."""
    batch_size: int = 256
    """Images of one optimizer step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches a step is split into; batch_size must be divisible by it."""
    ema_decay: float = 0.9999
    """Decay of the moving average of weights and routing state."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast, weights in float32; routers always compute in float32."""
    seed: int = 0
    """Seed of the initial weights, the order, the noise and every other draw."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; there is always one after the last step."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) > 0, f"training.{name} is {getattr(self, name)}; it must be positive")
        _require(
            self.batch_size % self.accumulation == 0,
            f"training.batch_size {self.batch_size} is not divisible by training.accumulation {self.accumulation}",
        )
        _require(0 <= self.ema_decay < 1, f"training.ema_decay is {self.ema_decay}; choose from 0 to below 1")
        _require(0 <= self.seed < 2**63, f"training.seed is {self.seed}; choose from 0 to 2^63 - 1")


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is spread over processes. This version trains on one."""

    replicate: int = 1
    """Copies of the model, each on its share of the batch."""
    shard: int = 1
    """Processes that share one copy's weights."""
    experts: int = 1
    """Processes that share the experts."""

    def __post_init__(self) -> None:
        product = self.replicate * self.shard * self.experts
        _require(
            self.replicate == self.shard == self.experts == 1,
            f"parallel.replicate x shard x experts is {self.replicate} x {self.shard} x {self.experts} = {product}; "
            "this version trains on one process, so each must be 1",
        )


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 20
    """Steps between lines of metrics.jsonl, TensorBoard points and progress lines."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""

    def __post_init__(self) -> None:
        _require(self.every > 0, f"logging.every is {self.every}; it must be positive")


@dataclass(frozen=True)
class EvaluationConfig:
    """How images are generated and scored."""

    num_samples: int = 1000
    """Images generated for the scores, spread evenly over the classes."""
    batch_size: int = 250
    """Images generated at a time; the images are the same for any number (but with model.inference_pool batch)."""
    solver: Solver = "euler"
    """For flow models euler, heun, heun_euler (the last step an Euler step, as JiT), dopri5 (adaptive) or sde; for ddpm
    models ddpm (ancestral) or ddim."""
    steps: int = 50
    """Solver steps (Heun evaluates the model twice a step); dopri5 chooses its own."""
    rtol: float = 1e-3
    """Relative tolerance (solver: dopri5)."""
    atol: float = 1e-6
    """Absolute tolerance (solver: dopri5)."""
    guidance_scale: float = 1.5
    """Classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times t between which guidance is on (0 is noise, 1 is data)."""
    guidance_channels: int | None = None
    """Guide the first channels only; null: all. The published DDPM scores guided three of four."""
    threshold_scale: float = 1.0
    """Factor on the thresholds (diffmoe): below 1 more compute for each token, above 1 less."""
    seed: int = 0
    """Image number i is a function of this seed and i."""

    def __post_init__(self) -> None:
        _require(
            self.solver in get_args(Solver),
            f"evaluation.solver is {self.solver!r}; choose one of {', '.join(get_args(Solver))}",
        )
        for name in ("num_samples", "batch_size", "steps", "rtol", "atol", "threshold_scale"):
            _require(getattr(self, name) > 0, f"evaluation.{name} is {getattr(self, name)}; it must be positive")
        low, high = self.guidance_interval
        _require(0 <= low <= high <= 1, f"evaluation.guidance_interval is {low}, {high}; give 0 <= low <= high <= 1")
        _require(self.guidance_scale >= 0, f"evaluation.guidance_scale is {self.guidance_scale}; use 1 for no guidance")
        channels = self.guidance_channels
        _require(channels is None or channels > 0, f"evaluation.guidance_channels is {channels}; use null for all")
        _require(0 <= self.seed < 2**63, f"evaluation.seed is {self.seed}; choose from 0 to 2^63 - 1")


@dataclass(frozen=True)
class Recipe:
    """One run: what is trained, on what, how, and how it is judged."""

    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.model.process == "ddpm":
            _require(
                self.diffusion.loss in (None, "epsilon"),
                f"diffusion.loss is {self.diffusion.loss!r}, but model.process ddpm compares epsilon; leave it out",
            )
            _require(
                self.diffusion.time == "uniform",
                f"diffusion.time is {self.diffusion.time!r}, but model.process ddpm draws uniform steps; leave it out",
            )
        _require(
            self.model.null_class or self.diffusion.class_dropout == 0 or self.model.num_classes == 0,
            f"diffusion.class_dropout is {self.diffusion.class_dropout}, but model.null_class is false; set it to 0",
        )


SECTIONS: dict[str, type] = {name: value.default_factory for name, value in Recipe.__dataclass_fields__.items()}  # type: ignore[misc]

# Fields that leave the course of training as it is: a run may be continued with other values of these.
CHANGEABLE = {
    "training.steps",  # under a constant schedule only; see `difference`
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "data.num_workers",
}
CHANGEABLE_SECTIONS = {"logging", "evaluation"}


def to_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The recipe as nested plain values, ready for YAML or JSON."""
    sections = dataclasses.asdict(recipe)
    return {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        for section, fields in sections.items()
    }


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def flatten(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested recipe."""
    for section, fields in sections.items():
        for key, value in fields.items():
            yield f"{section}.{key}", value


def difference(old: Recipe, new: Recipe) -> list[str]:
    """Lines `name: old -> new` for every field that may not change while a run continues."""
    fixed = set() if new.optimizer.schedule == "constant" else {"training.steps"}
    before, after = dict(flatten(to_dict(old))), dict(flatten(to_dict(new)))
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in after
        if before[name] != after[name]
        and (name in fixed or (name not in CHANGEABLE and name.split(".")[0] not in CHANGEABLE_SECTIONS))
    ]
