"""The recipe: all sections of a run, their YAML, and the difference of two recipes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..routing_rules import rule_of
from .data import DataConfig
from .evaluation import EvaluationConfig
from .model import ModelConfig
from .token_drop import square_of
from .training import DiffusionConfig, InitConfig, LoggingConfig, OptimizerConfig, ParallelConfig, TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """One run: the model, its data, its training and its evaluation."""

    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    init: InitConfig = field(default_factory=InitConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.init.upcycle and self.model.router == "dense":
            raise ValueError("init.upcycle is true, but model.router is dense; choose a routing rule")
        if self.model.process == "ddpm":
            if self.diffusion.loss not in (None, "epsilon"):
                reason = "but model.process ddpm compares epsilon; remove it"
                raise ValueError(f"diffusion.loss is {self.diffusion.loss!r}, {reason}")
            self.diffusion.require_default("time", "but model.process ddpm samples uniform steps")
        loss = self.diffusion.loss or self.model.prediction
        if self.model.process == "ddpm" or self.model.prediction in ("velocity", loss):
            reason = f"but from {self.model.prediction} to {loss} nothing is divided"
            self.diffusion.require_default("loss_min_gap", reason)
        if self.optimizer.kind == "muon" and self.init.lora_rank is not None:
            reason = "but Muon is not made for the matrices of adapters (init.lora_rank)"
            raise ValueError(f"optimizer.kind is muon, {reason}; set it to adamw")
        if self.training.posthoc_ema_stds and self.init.lora_rank is not None:
            reason = "but snapshots are made of whole models only, not of adapters (init.lora_rank)"
            raise ValueError(f"training.posthoc_ema_stds are {self.training.posthoc_ema_stds}, {reason}; remove them")
        dropout = self.diffusion.class_dropout
        if dropout and self.model.num_classes and not self.model.null_class:
            raise ValueError(f"diffusion.class_dropout is {dropout}, but model.null_class is false; set it to 0")
        self._check_token_drop()
        self._check_capacity_schedule()

    def _check_token_drop(self) -> None:
        training, model = self.training, self.model
        if not model.fusion:
            training.require_default("path_drop_rate", "but model.fusion is false")
        if not training.token_drop_rate:
            return
        model.check_middle_blocks(f"training.token_drop_rate is {training.token_drop_rate}")
        reason = "but among kept tokens (training.token_drop_rate) an index tells no distance"
        model.require_default("sliding_window", reason, "set it to 0")
        rule = rule_of(model.router)
        if rule is not None and "target_loss_weight" in rule.reads and model.target_loss_weight:
            raise ValueError(
                f"model.target_loss_weight is {model.target_loss_weight}, but training.token_drop_rate is "
                f"{training.token_drop_rate}: routers of the middle blocks do not see every patch; set it to 0"
            )
        if training.token_selection == "squares":
            square_of(training.token_drop_rate, model.sample_size // model.patch_size)

    def _check_capacity_schedule(self) -> None:
        training, rule = self.training, self.model.rule
        for name in ("capacity_full_steps", "capacity_fall_steps"):
            if rule is None or not rule.has_capacity_schedule:
                training.require_default(name, f"but model.router {self.model.router} has no capacity to schedule")
            elif self.model.layer_capacities is not None:
                reason = "but model.layer_capacities gives each layer a capacity of its own"
                training.require_default(name, reason, "set it to 0, or model.layer_capacities to null")
            elif training.compile:
                reason = "but training.compile would compile again for each capacity"
                training.require_default(name, reason, "set it to 0, or training.compile to false")

    def capacity_at(self, step: int) -> float | None:
        """Experts a token on average in a training step, counted from 1; None without a schedule of the capacity.

        The schedule of the published DiffMoE code (stages I and II): all experts, then linearly down to the capacity.
        """
        full, fall = self.training.capacity_full_steps, self.training.capacity_fall_steps
        if not full + fall:
            return None
        left = min(max(full + fall - step, 0), fall) / fall if fall else float(step <= full)
        return self.model.capacity + (self.model.num_experts - self.model.capacity) * left

    @property
    def loss_min_gap(self) -> float:
        """The smallest 1 - t or t that the loss divides by."""
        gap = self.diffusion.loss_min_gap
        return self.model.min_gap if gap is None else gap


SECTIONS: dict[str, type] = {name: value.default_factory for name, value in Recipe.__dataclass_fields__.items()}  # type: ignore[misc]


def to_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The recipe as nested plain values, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))  # tuples become lists, which YAML has


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def difference(old: Recipe, new: Recipe) -> list[str]:
    """Lines `name: old -> new` for every field that may not change while a run resumes without --resume changed."""
    before, after = to_dict(old), to_dict(new)
    by_steps = new.optimizer.schedule != "constant" or new.training.full_token_share > 0
    free = ("always",) if by_steps else ("always", "constant")
    return [
        f"{section}.{field.name}: {before[section][field.name]} -> {after[section][field.name]}"
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
        if before[section][field.name] != after[section][field.name] and field.metadata["change"] not in free
    ]
