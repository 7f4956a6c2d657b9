"""Checks that a number of processes can train a recipe. They need no torch, so that plans can ask them too."""

from __future__ import annotations

from ..config import Recipe
from ..counts import images_per_process


def check_parallel(recipe: Recipe, world: int) -> None:
    """Check that batch and model can be divided.

    Raises:
        ValueError: the batch or the experts cannot be divided, or the experts have dropout.
    """
    model, experts, shard = recipe.model, recipe.parallel.experts, recipe.parallel.shard
    images_per_process(recipe.training.batch_size, recipe.training.accumulation, world)
    for name in ("hidden_size", "expert_dim"):
        if model.router != "dense" and getattr(model, name) % shard:
            raise ValueError(f"model.{name} {getattr(model, name)} is not divisible by parallel.shard {shard}")
    if experts > 1 and model.router == "dense":
        raise ValueError(f"parallel.experts is {experts}, but the model is dense; use parallel.shard")
    if experts > 1 and model.num_experts % experts:
        raise ValueError(f"model.num_experts {model.num_experts} is not divisible by parallel.experts {experts}")
    if experts > 1 and model.expert_dropout:
        raise ValueError(f"model.expert_dropout is {model.expert_dropout}; with parallel.experts it must be 0")


def check_adapters(recipe: Recipe, world: int) -> None:
    """Check that adapters can be trained as the recipe says.

    Raises:
        ValueError: adapters of experts are compiled or trained by several processes.
    """
    stacked = [name for name in recipe.init.lora_targets if name.endswith(("w_in", "w_out"))]
    if recipe.init.lora_rank is None or not stacked:
        return
    if world > 1:
        raise ValueError(
            f"init.lora_targets has {stacked[0]}, but adapters of experts train on one process, and there are "
            f"{world}; remove it"
        )
    if recipe.training.compile:
        raise ValueError(
            f"init.lora_targets has {stacked[0]}, but peft's adapters of experts cannot be compiled; set "
            "training.compile to false"
        )
