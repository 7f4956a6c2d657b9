"""A model spread over processes: replicas, shards of weights, and experts of their own for each process.

Three axes, whose product is the number of processes; every process has images of its own. Weights of the ordinary
layers are sharded over shard x experts by FSDP2 and replicated over the rest; expert weights are split by expert over
`experts` and by columns over `shard`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config import ParallelConfig, Recipe
from ..data import positions_of
from ..distributed import is_main, world_size
from ..models import Backbone
from ..moe import GroupedExperts, MoEFeedForward, Router
from ..moe.precision import choose_precision
from ..moe.routers import DiffMoERouter
from .initialization import make_trainable


@dataclass(frozen=True)
class Layout:
    """Where every process stands."""

    dense: DeviceMesh
    """(replicate, shard x experts): of the ordinary layers."""
    all: DeviceMesh
    """(replicate, shard, experts)."""

    def __deepcopy__(self, memo: object) -> Layout:
        return self


def make_layout(config: ParallelConfig, device: torch.device) -> Layout | None:
    """The axes of the running processes; None for a single one.

    Raises:
        ValueError: their product is not the number of processes.
    """
    replicate, shard, experts = config.replicate, config.shard, config.experts
    product, world = replicate * shard * experts, world_size()
    if product != world:
        raise ValueError(
            f"parallel.replicate x shard x experts is {replicate} x {shard} x {experts} = {product}, but there "
            f"{'is 1 process' if world == 1 else f'are {world} processes'}; make them equal (torchrun "
            f"--nproc-per-node starts processes)"
        )
    if world == 1:
        return None
    return Layout(
        dense=init_device_mesh(device.type, (replicate, shard * experts), mesh_dim_names=("replicate", "dense")),
        all=init_device_mesh(
            device.type, (replicate, shard, experts), mesh_dim_names=("replicate", "shard", "experts")
        ),
    )


def check_parallel(recipe: Recipe) -> None:
    """Whether batch and model can be spread in this way.

    Raises:
        ValueError: the batch or the experts cannot be divided, or the experts have dropout.
    """
    model, experts, shard = recipe.model, recipe.parallel.experts, recipe.parallel.shard
    positions_of(recipe.training.batch_size, recipe.training.accumulation, world=world_size())
    for name in ("hidden_size", "expert_dim"):
        if model.router != "dense" and getattr(model, name) % shard:
            raise ValueError(f"model.{name} {getattr(model, name)} is not divisible by parallel.shard {shard}")
    if experts > 1 and model.router == "dense":
        raise ValueError(f"parallel.experts is {experts}, but the model is dense; use parallel.shard")
    if experts > 1 and model.num_experts % experts:
        raise ValueError(f"model.num_experts {model.num_experts} is not divisible by parallel.experts {experts}")
    if experts > 1 and model.expert_dropout:
        raise ValueError(f"model.expert_dropout is {model.expert_dropout}; with parallel.experts it must be 0")


def parallelize(model: Backbone, recipe: Recipe, layout: Layout) -> None:
    """Spread a model in place. Its forward pass is called as before, by all processes at the same time."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Of head norms and pools, whose outputs nobody changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    bf16 = choose_precision(recipe.training.precision, torch.device(layout.all.device_type)).precision == "bf16"
    # Gathered in the dtype that autocast would cast to anyway; gradients are summed in float32.
    narrow = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    shard = partial(fully_shard, mesh=layout.dense)
    for block in model.blocks:
        if isinstance(block.mlp, MoEFeedForward):
            _spread_experts(block.mlp.experts, layout, narrow)
        kept = [module for module in block.modules() if stays_wide(module)]
        if kept:
            shard(kept, mp_policy=wide)
        shard(block, mp_policy=narrow)
    # Also after the forward pass: an average, which has no backward pass, must not keep gathered weights as they were.
    shard(model, mp_policy=wide, reshard_after_forward=True)
    if layout.all.device_type == "cpu":
        for module in model.modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    if recipe.parallel.pool == "global":
        for pool in [module for module in model.modules() if isinstance(module, DiffMoERouter)]:
            pool.group = dist.group.WORLD


def stays_wide(module: nn.Module) -> bool:
    """Routers and norms with parameters compute in float32."""
    return isinstance(module, Router) or (
        isinstance(module, nn.LayerNorm | nn.RMSNorm) and bool(list(module.parameters()))
    )


def _spread_experts(experts: GroupedExperts, layout: Layout, policy: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = layout.all
    if mesh["experts"].size() > 1:
        for name, weight in list(experts.named_parameters()):
            # Every process has drawn the same weights: each takes its part, nothing is sent.
            spread = distribute_tensor(weight.data, mesh["experts"], [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(spread))
        experts.group = mesh.get_group("experts")
    fully_shard(
        experts,
        mesh=mesh["replicate", "shard"],
        shard_placement_fn=lambda weight: Shard(1),
        mp_policy=policy,
    )


def whole_model(model: Backbone, recipe: Recipe) -> Backbone | None:
    """A model in one piece: itself if it is not spread, else a copy on the CPU of the main process; None elsewhere.

    All processes call this together.
    """
    if world_size() == 1:
        return model
    tensors = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    if not is_main():
        return None
    with torch.device("meta"):
        whole = make_trainable(recipe).train(model.training)
    whole.load_state_dict(tensors, assign=True)
    for name, buffer in model.named_buffers():
        if name not in tensors:  # fixed tables that no file holds
            module, _, own_name = name.rpartition(".")
            setattr(whole.get_submodule(module), own_name, buffer.cpu())
    return whole


def _whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.cpu() if is_main() else full.new_empty(0)
