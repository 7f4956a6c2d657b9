"""Settings of training: the loop, the loss, the optimizer, the initial weights, the processes and the logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fields import (
    BELOW_ONE,
    EMA_STD,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_NULL,
    SEED,
    UP_TO_ONE,
    Settings,
    setting,
)
from .model import Prediction


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """The training loop."""

    steps: int = setting(10000, change="constant", common=True, valid=POSITIVE)
    """Optimizer steps."""
    batch_size: int = setting(256, common=True, valid=POSITIVE)
    """Images of one optimizer step, over all processes and micro-batches."""
    accumulation: int = setting(1, valid=POSITIVE)
    """Micro-batches a step is split into; batch_size must be divisible by it."""
    capacity_full_steps: int = setting(0, valid=NOT_NEGATIVE)
    """First steps in which every expert serves every token (model.router: ec, diffmoe, nucleus)."""
    capacity_fall_steps: int = setting(0, valid=NOT_NEGATIVE)
    """Steps after them in which the experts a token fall linearly to model.capacity (model.router: ec, diffmoe,
    nucleus)."""
    ema_decay: float = setting(0.9999, common=True, valid=BELOW_ONE)
    """Decay of the EMA of weights and routing state; the EMA is the model that the run exports."""
    extra_ema_decays: tuple[float, ...] = setting((), valid=BELOW_ONE)
    """Decays of further EMAs."""
    ema_warmup: bool = setting(True, before=False)
    """Warm up the EMAs: at update n their decay is at most (1 + n) / (10 + n)."""
    posthoc_ema_stds: tuple[float, ...] = setting((), change="never", valid=EMA_STD)
    """Widths of EMAs kept in snapshots, of which `diffusion-moe ema` makes EMAs of any other width after training, in
    shares of the training time; EDM2 keeps 0.05 and 0.1. Empty: no snapshots."""
    posthoc_ema_every: int = setting(1000, change="always", valid=POSITIVE)
    """Steps between these snapshots; the last step always saves one."""
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", common=True)
    """bf16: autocast with float32 weights; routers always compute in float32. auto: as a resumed run began, else bf16
    on GPUs that have it and processors that are fast in it, else fp32."""
    recompute: Literal["none", "experts", "blocks"] = setting("none", change="always")
    """Activations that the backward pass recomputes instead of keeping: none, the hidden layers of routed and shared
    experts (a fifth more expert FLOPs), or whole blocks (a third more of all FLOPs)."""
    compile: bool = setting(False, change="always")
    """Compile each block by torch.compile."""
    deterministic: bool = setting(False, change="always")
    """Use deterministic algorithms: a run on GPUs then resumes bit for bit, and is slower. On CPUs it changes
    nothing."""
    max_nonfinite_steps: int = setting(3, change="always", valid=NOT_NEGATIVE)
    """Consecutive steps whose loss or gradient may be non-finite; each is skipped. One more returns to the last
    checkpoint and skips their batches; if that does not help, the run stops and names the images."""
    seed: int = setting(0, common=True, valid=SEED)
    """Seed of the initial weights, the order, the noise and every other random number."""
    checkpoint_every: int = setting(1000, change="always", valid=POSITIVE)
    """Steps between checkpoints; the last step always saves one."""
    keep_checkpoints: int = setting(2, change="always", valid=POSITIVE)
    """Number of newest checkpoints to keep."""
    keep_every: int = setting(0, change="always", valid=NOT_NEGATIVE)
    """Steps between checkpoints that are never deleted; 0: none."""
    stop_seconds: int = setting(600, change="always", valid=POSITIVE)
    """Seconds that SIGTERM or Ctrl-C leaves for the current step and a checkpoint; after them the run ends without
    one."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto")
    """auto: the GPU if there is one."""
    token_drop_rate: float = setting(0.0, valid=BELOW_ONE)
    """Share of an image's tokens that the middle blocks (model.first_k_full, last_k_full) do not see. They skip these
    blocks (TREAD), or with model.fusion are a mask token after them (SPRINT drops 0.75)."""
    token_selection: Literal["random", "squares"] = setting("random")
    """Tokens that are kept (token_drop_rate above 0): any, or of each square of 2 x 2 or 4 x 4 tokens as many, any of
    them (SPRINT)."""
    full_token_share: float = setting(0.0, valid=FRACTION)
    """Share of the steps, the last ones, in which no token is dropped (token_drop_rate above 0)."""
    path_drop_rate: float = setting(0.0, valid=FRACTION)
    """Share of training samples whose middle blocks are ignored in all steps, for path-drop guidance (model.fusion;
    SPRINT: 0.1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_divisible("batch_size", "accumulation")
        decays = self.extra_ema_decays
        if len({self.ema_decay, *decays}) != 1 + len(decays):
            remedy = "they must differ from each other and from ema_decay"
            raise ValueError(f"training.extra_ema_decays are {decays}; {remedy}")
        if not self.token_drop_rate:
            for name in ("token_selection", "full_token_share"):
                self.require_default(name, "but training.token_drop_rate is 0")

    @property
    def dropping_steps(self) -> int:
        """Number of the last step in which tokens are dropped; 0 if there is none."""
        return self.steps - round(self.full_token_share * self.steps) if self.token_drop_rate else 0

    def drop_rate_at(self, step: int) -> float:
        """Share of an image's tokens that the middle blocks do not see in a step, counted from 1."""
        return self.token_drop_rate if step <= self.dropping_steps else 0.0


@dataclass(frozen=True)
class DiffusionConfig(Settings):
    """Sampling of training times, dropout of classes and captions, and the prediction that the loss compares."""

    loss: Prediction | None = setting(None)
    """Prediction that the mean squared error compares, after converting the model's output to it: velocity, x or
    epsilon; null: the model's own prediction. JiT predicts x and compares velocities."""
    loss_min_gap: float | None = setting(None, valid=UP_TO_ONE)
    """Smallest 1 - t (from x) or t (from epsilon) that this conversion divides by; null: model.min_gap. Velocities
    weight errors of x by 1 / max(1 - t, loss_min_gap)^2: with 0.4, late ones 6 times as much as early ones."""
    time: Literal["uniform", "logit_normal"] = setting("uniform")
    """Distribution of the training time t in [0, 1] (0 is noise, 1 is data); uniform for model.process ddpm."""
    time_mean: float = setting(0.0)
    """Mean of the normal under the logistic function (time: logit_normal)."""
    time_std: float = setting(1.0, valid=POSITIVE)
    """Standard deviation of that normal (time: logit_normal)."""
    class_dropout: float = setting(0.1, valid=FRACTION)
    """Share of training samples whose class is replaced by the null class, for guidance."""
    caption_dropout: float = setting(0.1, valid=FRACTION)
    """Share of training samples whose caption is replaced by the null prompt, for guidance (model.text_dim); decided by
    the same random number as class_dropout."""


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """The optimizer and its schedule."""

    kind: Literal["adamw", "muon"] = setting("adamw", change="never", common=True)
    """muon: Muon for the matrices of the blocks that take tokens, each expert's by itself, and AdamW for all other
    parameters, with one learning rate and weight decay; see docs/training.md."""
    momentum: float = setting(0.95, valid=BELOW_ONE)
    """Decay of Muon's momentum (kind: muon)."""
    learning_rate: float = setting(1e-4, common=True, valid=POSITIVE)
    """Peak learning rate."""
    betas: tuple[float, float] = setting((0.9, 0.999), valid=BELOW_ONE)
    """Decay of AdamW's first and second moment."""
    eps: float = setting(1e-8)
    """Added to the root of AdamW's second moment."""
    weight_decay: float = setting(0.0, valid=NOT_NEGATIVE)
    """Decoupled weight decay, on matrices only (not on biases, norms and embeddings)."""
    warmup_steps: int = setting(0, common=True, valid=NOT_NEGATIVE)
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = setting("constant", common=True)
    """Learning rate after the warm-up: constant, or a cosine down to 0 at the last step."""
    max_grad_norm: float | None = setting(1.0, valid=POSITIVE._replace(remedy="use null for no clipping"))
    """Maximum norm of the gradient, which is clipped to it; null: no clipping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "adamw":
            self.require_default("momentum", "but optimizer.kind is adamw, which reads betas")


@dataclass(frozen=True)
class InitConfig(Settings):
    """The checkpoint to start from, and which weights are trained; see docs/training.md."""

    from_checkpoint: str | None = setting(None, change="never", common=True)
    """Run, folder of `diffusion-moe convert`, model folder, or reference checkpoint (file, folder or hub id) to start
    from; null: random weights. The model section then need only have what differs from it."""
    weights: Literal["ema", "ema2", "model"] = setting("ema", change="never")
    """Weights of a run or a reference file to read: an EMA (JiT's files have two), or the last weights."""
    freeze: tuple[str, ...] = setting((), change="never")
    """Parameters that are not trained, by name with * and ? as for files: blocks.0.*, *.attn.*, *.mlp.router.*"""
    lora_rank: int | None = setting(None, change="never", valid=POSITIVE_OR_NULL)
    """Rank of adapters, which alone are trained (LoRA; needs the package peft); null: train the weights themselves."""
    lora_alpha: float | None = setting(None, change="never", valid=POSITIVE_OR_NULL)
    """Adapters are multiplied by alpha / rank; null: alpha is the rank."""
    lora_targets: tuple[str, ...] = setting(("attn.qkv", "attn.proj"), change="never")
    """Layers that get adapters, by the ends of their names; mlp.experts.w_in and mlp.experts.w_out are the stacked
    experts. y_embedder, the label table, gets no adapter and is trained whole."""
    upcycle: bool = setting(False, change="never")
    """Make experts of a dense model's feed-forward layers."""
    upcycle_noise: float = setting(0.0, change="never", valid=NOT_NEGATIVE)
    """Noise on upcycled experts, in standard deviations of their weights."""

    def __post_init__(self) -> None:
        if self.from_checkpoint is None:
            for name in type(self).__dataclass_fields__:
                reason = "but init.from_checkpoint is missing"
                self.require_default(name, reason, "give the model to start from")
        super().__post_init__()
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_targets"):
                self.require_default(name, "but init.lora_rank is null", "give a rank")
        elif not self.lora_targets:
            raise ValueError("init.lora_targets are empty; name layers, or set init.lora_rank to null")
        elif self.freeze:
            reason = "but with init.lora_rank only adapters are trained; remove it"
            raise ValueError(f"init.freeze is {self.freeze}, {reason}")
        elif self.upcycle:
            reason = "but adapters cannot train its new routers; set init.lora_rank to null"
            raise ValueError(f"init.upcycle is true, {reason}")
        if not self.upcycle:
            self.require_default("upcycle_noise", "but init.upcycle is false")


@dataclass(frozen=True)
class ParallelConfig(Settings):
    """Distribution over processes: replicate x shard x experts must be the number that torchrun started."""

    replicate: int = setting(1, change="always", common=True, valid=POSITIVE)
    """Copies of the model, each on its share of the batch."""
    shard: int = setting(1, change="always", common=True, valid=POSITIVE)
    """Processes that a copy's weights are sharded over (FSDP2)."""
    experts: int = setting(1, change="always", common=True, valid=POSITIVE)
    """Processes that the experts are distributed over; tokens are dispatched between them."""
    pool: Literal["rank", "global"] = setting("rank")
    """Tokens that experts choose from (router: diffmoe, race), and those of the contrastive loss (router: promoe): of a
    process, or of all processes. Global gathers all scores, or sums of tokens, in each MoE layer."""

    @property
    def processes(self) -> int:
        """Number of processes."""
        return self.replicate * self.shard * self.experts


@dataclass(frozen=True)
class LoggingConfig(Settings):
    """Logs, validation and previews while training."""

    every: int = setting(20, change="always", valid=POSITIVE)
    """Steps between lines of metrics.jsonl, TensorBoard points and progress lines."""
    tensorboard: bool = setting(True, change="always")
    """Write TensorBoard files next to metrics.jsonl."""
    wandb: str | None = setting(None, change="always")
    """Project of Weights & Biases to send the same values to (needs the package wandb); null: none."""
    validate_every: int = setting(
        0, change="always", common=True, valid=NOT_NEGATIVE._replace(remedy="use 0 for never")
    )
    """Steps between losses on held-out images with fixed noise, for the weights and each EMA; 0: never."""
    validate_images: int = setting(512, change="always", valid=POSITIVE)
    """Held-out images for validate_every, the first of their split."""
    sample_every: int = setting(0, change="always", common=True, valid=NOT_NEGATIVE._replace(remedy="use 0 for never"))
    """Steps between grids of generated images, in previews/; 0: never."""
