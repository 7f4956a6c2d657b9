"""Recipes: everything that defines a run, as frozen dataclasses.

A recipe is a YAML file whose sections are the fields of `Recipe`; every field is also an option of the command, under
the same dotted name. This file imports nothing heavy, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import yaml

from .model_config import ModelConfig, Prediction, require

FLOW_SOLVERS = ("euler", "heun", "heun_euler", "dopri5", "sde")
DDPM_SOLVERS = ("ddpm", "ddim")
Solver = Literal["euler", "heun", "heun_euler", "dopri5", "sde", "ddpm", "ddim"]


@dataclass(frozen=True)
class DiffusionConfig:
    """How times and labels are drawn in training, and what the loss compares."""

    loss: Prediction | None = None
    """What the mean squared error compares, after converting to it: velocity, x or epsilon; null: what the model
    predicts. JiT predicts x and compares velocities."""
    loss_min_gap: float | None = None
    """The least 1 - t (out of x) or t (out of epsilon) that this conversion divides by; null: model.min_gap. Velocities
    weigh errors of x by 1 / max(1 - t, loss_min_gap)^2: with 0.4, late ones 6 times as much as early ones."""
    time: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the training time t in [0, 1] (0 is noise, 1 is data); of ddpm's step, uniform only."""
    time_mean: float = 0.0
    """Mean of the normal under the logistic function (time: logit_normal)."""
    time_std: float = 1.0
    """Standard deviation of that normal."""
    class_dropout: float = 0.1
    """Share of training samples whose class is replaced by the null class, for guidance."""
    caption_dropout: float = 0.1
    """Share of training samples whose caption is replaced by the null prompt, for guidance (model.text_dim); decided by
    the same draw as class_dropout."""

    def __post_init__(self) -> None:
        gap = self.loss_min_gap
        require(gap is None or 0 < gap <= 1, f"diffusion.loss_min_gap is {gap}; it must be above 0 and at most 1")
        require(self.time_std > 0, f"diffusion.time_std is {self.time_std}; it must be positive")
        require(0 <= self.class_dropout <= 1, f"diffusion.class_dropout is {self.class_dropout}; choose from 0 to 1")
        require(
            0 <= self.caption_dropout <= 1, f"diffusion.caption_dropout is {self.caption_dropout}; choose from 0 to 1"
        )


FolderClasses = Literal["top", "leaf", "none"]
"""Which folders of a folder of images are its classes."""
ShapesLayout = Literal["free", "grid"]
"""Where scenes of coloured shapes have their objects."""

_OF_FILES = ("folder", "huggingface", "webdataset")
"""Values of data.kind whose images are files to decode."""
_OF_ONE_KIND = {
    "classes": "folder",
    **dict.fromkeys(("split", "subset", "revision", "image_column", "label_column"), "huggingface"),
    "normalize": "latents",
    "shapes_layout": "shapes",
}
"""Fields of `DataConfig` that one kind alone reads."""


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    kind: Literal["digits", "shapes", "folder", "huggingface", "webdataset", "latents"] = "digits"
    """digits: scikit-learn's 1,797 handwritten digits; shapes: 100,000 drawn scenes of coloured shapes with captions;
    folder: a folder of images, with classes (see classes) or captions in metadata.jsonl; huggingface: a data set of
    the hub or one saved on the disk; webdataset: tars; latents: a cache that `diffusion-moe encode` wrote."""
    path: str | None = None
    """The folder (kind: folder, latents), or a tar or a folder of tars (webdataset). For huggingface a hub id, a folder
    that save_to_disk made, a folder of parquet files, or one parquet file."""
    classes: FolderClasses | None = None
    """top: every folder at the top is a class, with all images below it; leaf: every innermost folder is one, named by
    its path; none: no classes; null: top, or none with data.caption_column (kind: folder). Folders train and val (or
    test) at the top that hold the same classes are the training and the held-out split."""
    split: str = "train"
    """Split to train on, as the data set names it; also a part, as train[:10%] (kind: huggingface)."""
    subset: str | None = None
    """Configuration of a data set that has several (kind: huggingface)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id (kind: huggingface)."""
    image_column: str = "image"
    """Column of the images (kind: huggingface)."""
    label_column: str | None = "label"
    """Column of the classes: names, or numbers with or without names; null: no classes (kind: huggingface)."""
    caption_column: str | None = None
    """Captions, a text or a list of texts an image: column (kind: huggingface), key of metadata.jsonl (folder), or txt
    or a key of the json files (webdataset); null: none."""
    text_encoder: str | None = None
    """Hub id or folder of the text encoder for the captions, which are encoded once in memory; null: captions are not
    read, or (kind: latents) are in the cache."""
    text_length: int = 77
    """Tokens that captions are cut to (text_encoder)."""
    text_precision: Literal["fp32", "bf16"] = "fp32"
    """What the text encoder computes in (text_encoder)."""
    image_size: int = 8
    """Height and width that images are resized and center-cropped to, in pixels (kind: folder, huggingface,
    webdataset), or that shapes are drawn at (kind: shapes)."""
    buckets: tuple[str, ...] = ()
    """Sizes HEIGHTxWIDTH in pixels, in place of image_size: each image is resized and cropped to the one of the nearest
    aspect ratio, and a batch is of one size (kind: folder, huggingface, webdataset)."""
    shapes_layout: ShapesLayout = "free"
    """free: shapes anywhere; grid: each at one of nine places, which is learned faster (kind: shapes)."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour (kind: folder, huggingface, webdataset, shapes)."""
    background: str = "white"
    """Colour under transparent images, a name or #rrggbb (kind: folder, huggingface, webdataset)."""
    normalize: Literal["scaling", "channel"] = "scaling"
    """scaling: as the VAE's config says; channel: each channel to mean 0 and standard deviation 1 by the cache's
    statistics (kind: latents)."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    on_corrupt: Literal["error", "skip"] = "error"
    """An unreadable image ends the run with its name, or is counted, listed and replaced by the next one
    (in a latent cache: left out)."""
    test_fraction: float = 0.2
    """Share of each class held out from training; the split is the same for every seed."""
    num_workers: int = 0
    """Processes that load images; the batches are the same for any number."""

    def __post_init__(self) -> None:
        # Latents need it too, but their recipes cannot know it.
        require(
            self.kind not in _OF_FILES or self.path is not None, f"data.path is missing; data.kind {self.kind} needs it"
        )
        of_kinds: dict[str, tuple[str, ...]] = {name: (kind,) for name, kind in _OF_ONE_KIND.items()}
        of_kinds |= dict.fromkeys(("caption_column", "background", "buckets"), _OF_FILES)
        for name, kinds in of_kinds.items():
            value, usual = getattr(self, name), type(self).__dataclass_fields__[name].default
            shown = ", ".join(value) if isinstance(value, tuple) else value
            require(
                self.kind in kinds or value == usual,
                f"data.{name} is {shown}, but data.kind {self.kind} has no use for it; leave it out",
            )
        require(
            self.text_encoder is None or self.kind != "latents",
            f"data.text_encoder is {self.text_encoder}, but data.kind latents has its captions encoded; leave it out",
        )
        for text in self.buckets:
            height, _, width = text.partition("x")
            require(
                height.isdecimal() and width.isdecimal() and int(height) * int(width) > 0,
                f"data.buckets holds {text!r}; give sizes such as 256x384",
            )
        require(self.text_length > 0, f"data.text_length is {self.text_length}; it must be positive")
        require(self.image_size > 0, f"data.image_size is {self.image_size}; it must be positive")
        require(0 <= self.test_fraction < 1, f"data.test_fraction is {self.test_fraction}; choose from 0 to below 1")
        require(self.num_workers >= 0, f"data.num_workers is {self.num_workers}; use 0 for none")

    @property
    def bucket_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each bucket."""
        pairs = [text.split("x") for text in self.buckets]
        return tuple((int(height), int(width)) for height, width in pairs)


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
        require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        require(
            all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas are {self.betas}; choose from 0 to below 1"
        )
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}; use 0 for none")
        require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; use 0 for none")
        require(
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
    """Decay of the moving average of weights and routing state: the model that the run gives."""
    more_ema_decays: tuple[float, ...] = ()
    """Further averages to keep beside it."""
    ema_warmup: bool = True
    """Let averages forget the first weights sooner: at update n their decay is at most (1 + n) / (10 + n)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: autocast, weights in float32; routers always compute in float32. auto: as a run that is resumed has begun,
    else bf16 on GPUs that have it and processors that are fast in it, else fp32."""
    recompute: Literal["none", "experts", "blocks"] = "none"
    """What the backward pass makes again instead of keeping: nothing, the hidden layers of routed and shared experts (a
    fifth more of their products), or whole blocks (a third more of everything)."""
    compile: bool = False
    """Compile each block by torch.compile."""
    max_bad_steps: int = 3
    """Steps in a row whose loss or gradient may be not finite; each is left out. One more goes back to the last
    checkpoint and leaves their batches out; if that does not help, the run stops and names the images."""
    seed: int = 0
    """Seed of the initial weights, the order, the noise and every other draw."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; there is always one after the last step."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Steps whose multiples keep their checkpoints for good; 0: none."""
    stop_seconds: int = 600
    """Time that SIGTERM or Ctrl-C leaves for the step in progress and a checkpoint; after it the run ends as it is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "stop_seconds"):
            require(getattr(self, name) > 0, f"training.{name} is {getattr(self, name)}; it must be positive")
        require(
            self.batch_size % self.accumulation == 0,
            f"training.batch_size {self.batch_size} is not divisible by training.accumulation {self.accumulation}",
        )
        require(0 <= self.ema_decay < 1, f"training.ema_decay is {self.ema_decay}; choose from 0 to below 1")
        decays = self.more_ema_decays
        require(all(0 <= d < 1 for d in decays), f"training.more_ema_decays are {decays}; choose from 0 to below 1")
        require(
            len({self.ema_decay, *decays}) == 1 + len(decays),
            f"training.more_ema_decays are {decays}; they must differ from each other and from ema_decay",
        )
        require(self.keep_every >= 0, f"training.keep_every is {self.keep_every}; use 0 for none")
        require(self.max_bad_steps >= 0, f"training.max_bad_steps is {self.max_bad_steps}; use 0 for none")
        require(0 <= self.seed < 2**63, f"training.seed is {self.seed}; choose from 0 to 2^63 - 1")


@dataclass(frozen=True)
class StartConfig:
    """The model that training begins from, and which of its weights learn; see docs/training.md."""

    source: str | None = None
    """A run, a folder that `diffusion-moe convert` made, a model's folder, or a published checkpoint (file, folder or
    hub id); null: fresh weights. The model section then need only name what differs from it."""
    weights: Literal["ema", "ema2", "model"] = "ema"
    """Which of a run's or a published file's: an average (JiT's files have two), or the last weights."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by name with * and ? as for files: blocks.0.*, *.attn.*, *.mlp.router.*"""
    lora_rank: int | None = None
    """Train adapters of this rank and nothing else (LoRA; needs the package peft); null: the weights themselves."""
    lora_alpha: float | None = None
    """Adapters are multiplied by alpha / rank; null: alpha is the rank."""
    lora_targets: tuple[str, ...] = ("attn.qkv", "attn.proj")
    """Layers that get adapters, by the ends of their names; mlp.experts.w_in and mlp.experts.w_out are the stacked
    experts. y_embedder, the label table, has none and is trained whole."""
    upcycle: bool = False
    """Make experts of a dense model's feed-forward layers."""
    upcycle_noise: float = 0.0
    """Noise on upcycled experts, in standard deviations of their weights."""

    def __post_init__(self) -> None:
        fields = type(self).__dataclass_fields__
        for name in (name for name in fields if name != "source"):
            value = getattr(self, name)
            require(
                self.source is not None or value == fields[name].default,
                f"start.{name} is {value}, but start.source is missing; give the model to start from",
            )
        rank, alpha, noise = self.lora_rank, self.lora_alpha, self.upcycle_noise
        require(rank is None or rank > 0, f"start.lora_rank is {rank}; it must be positive, or null")
        require(alpha is None or alpha > 0, f"start.lora_alpha is {alpha}; it must be positive, or null")
        require(noise >= 0, f"start.upcycle_noise is {noise}; use 0 for none")
        for name in ("lora_alpha", "lora_targets"):
            value = getattr(self, name)
            require(
                rank is not None or value == fields[name].default,
                f"start.{name} is {value}, but start.lora_rank is null; give a rank",
            )
        require(bool(self.lora_targets), "start.lora_targets are empty; name layers, or set start.lora_rank to null")
        require(
            rank is None or not self.freeze,
            f"start.freeze is {self.freeze}, but with start.lora_rank only adapters learn; leave it out",
        )
        require(
            rank is None or not self.upcycle,
            "start.upcycle is true, but adapters cannot train its new routers; set start.lora_rank to null",
        )
        require(self.upcycle or not noise, f"start.upcycle_noise is {noise}, but start.upcycle is false; leave it out")


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is spread over processes: replicate x shard x experts must be as many as torchrun started."""

    replicate: int = 1
    """Copies of the model, each on its share of the batch."""
    shard: int = 1
    """Processes that share one copy's weights (FSDP2)."""
    experts: int = 1
    """Processes that share the experts, each holding some of them whole; tokens travel."""
    pool: Literal["rank", "global"] = "rank"
    """Tokens that DiffMoE's experts choose from: those of a process, or of all of them. Global costs a gathering of all
    scores in each mixture layer."""

    def __post_init__(self) -> None:
        for name in ("replicate", "shard", "experts"):
            require(getattr(self, name) > 0, f"parallel.{name} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 20
    """Steps between lines of metrics.jsonl, TensorBoard points and progress lines."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb: str | None = None
    """Project of Weights & Biases to send the same numbers to (needs the package wandb); null: none."""
    validate_every: int = 0
    """Steps between losses on held-out images with fixed noise, for the weights and each average; 0: never."""
    validate_images: int = 512
    """Held-out images for it, the first of their split."""
    sample_every: int = 0
    """Steps between pictures of generated images, in previews/; 0: never."""

    def __post_init__(self) -> None:
        for name in ("every", "validate_images"):
            require(getattr(self, name) > 0, f"logging.{name} is {getattr(self, name)}; it must be positive")
        for name in ("validate_every", "sample_every"):
            require(getattr(self, name) >= 0, f"logging.{name} is {getattr(self, name)}; use 0 for never")


@dataclass(frozen=True)
class EvaluationConfig:
    """How images are generated and scored."""

    num_samples: int = 1000
    """Images generated for the scores, spread evenly over the classes, or over the prompts; of coloured shapes over
    their categories, seen and held out, so a multiple of 12."""
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
    capacity_limit: float | None = None
    """Experts a token on average that a batch has room for (diffmoe); null: as many as the thresholds choose. With a
    limit the shapes are fixed and nothing waits for the device; choices of least weight beyond it are dropped and
    counted."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: autocast; routers always compute in float32. auto: bf16 on GPUs that have it and processors that are fast
    in it, else fp32."""
    acceleration: Literal["none", "compile", "graph"] = "none"
    """compile: every block by torch.compile, slow at the first call; graph: replay a CUDA graph."""
    seed: int = 0
    """Image number i is a function of this seed and i."""

    def __post_init__(self) -> None:
        require(
            self.solver in get_args(Solver),
            f"evaluation.solver is {self.solver!r}; choose one of {', '.join(get_args(Solver))}",
        )
        for name in ("num_samples", "batch_size", "steps", "rtol", "atol", "threshold_scale"):
            require(getattr(self, name) > 0, f"evaluation.{name} is {getattr(self, name)}; it must be positive")
        low, high = self.guidance_interval
        require(0 <= low <= high <= 1, f"evaluation.guidance_interval is {low}, {high}; give 0 <= low <= high <= 1")
        require(self.guidance_scale >= 0, f"evaluation.guidance_scale is {self.guidance_scale}; use 1 for no guidance")
        limit = self.capacity_limit
        require(limit is None or limit > 0, f"evaluation.capacity_limit is {limit}; use null for none")
        channels = self.guidance_channels
        require(channels is None or channels > 0, f"evaluation.guidance_channels is {channels}; use null for all")
        require(0 <= self.seed < 2**63, f"evaluation.seed is {self.seed}; choose from 0 to 2^63 - 1")


@dataclass(frozen=True)
class Recipe:
    """One run: what is trained, on what, how, and how it is judged."""

    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    start: StartConfig = field(default_factory=StartConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require(
            not self.start.upcycle or self.model.router != "dense",
            "start.upcycle is true, but model.router is dense; choose a routing rule",
        )
        if self.model.process == "ddpm":
            require(
                self.diffusion.loss in (None, "epsilon"),
                f"diffusion.loss is {self.diffusion.loss!r}, but model.process ddpm compares epsilon; leave it out",
            )
            require(
                self.diffusion.time == "uniform",
                f"diffusion.time is {self.diffusion.time!r}, but model.process ddpm draws uniform steps; leave it out",
            )
        loss = self.diffusion.loss or self.model.prediction
        divides = self.model.process == "flow" and self.model.prediction != "velocity" and loss != self.model.prediction
        require(
            divides or self.diffusion.loss_min_gap is None,
            f"diffusion.loss_min_gap is {self.diffusion.loss_min_gap}, but from {self.model.prediction} to {loss} "
            "nothing is divided; leave it out",
        )
        require(
            self.model.null_class or self.diffusion.class_dropout == 0 or self.model.num_classes == 0,
            f"diffusion.class_dropout is {self.diffusion.class_dropout}, but model.null_class is false; set it to 0",
        )

    @property
    def loss_min_gap(self) -> float:
        """The least 1 - t or t that the loss divides by."""
        gap = self.diffusion.loss_min_gap
        return self.model.min_gap if gap is None else gap


SECTIONS: dict[str, type] = {name: value.default_factory for name, value in Recipe.__dataclass_fields__.items()}  # type: ignore[misc]

# Fields that leave the course of training as it is: a run may be continued with other values of these.
CHANGEABLE = {
    "training.steps",  # under a constant schedule only; see `difference`
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_every",
    "training.max_bad_steps",
    "training.stop_seconds",
    "training.recompute",
    "training.compile",
    "data.num_workers",
    "data.on_corrupt",
}
CHANGEABLE_SECTIONS = {"logging", "evaluation", "parallel"}


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
    fixed = {"parallel.pool"} | (set() if new.optimizer.schedule == "constant" else {"training.steps"})
    before, after = dict(flatten(to_dict(old))), dict(flatten(to_dict(new)))
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in after
        if before[name] != after[name]
        and (name in fixed or (name not in CHANGEABLE and name.split(".")[0] not in CHANGEABLE_SECTIONS))
    ]
