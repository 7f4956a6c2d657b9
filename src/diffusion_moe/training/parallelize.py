"""Sharding of a model over processes: replicas, shards of weights, and expert parallelism.

Three mesh dimensions, whose product is the number of processes; every process has its own images. Weights of ordinary
layers are sharded over shard x experts by FSDP2 and replicated over the rest; expert weights are sharded by expert over
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
from ..distributed import is_main, world_size
from ..models import Backbone
from ..moe import GroupedExperts, MoEFeedForward, Router, routers_of
from ..moe.precision import choose_precision
from .initialization import make_trainable


@dataclass(frozen=True)
class Meshes:
    """Device meshes of the running processes."""

    dense: DeviceMesh
    """(replicate, shard x experts), or (shard x experts,) with one replica: for the ordinary layers."""
    all: DeviceMesh
    """(replicate, shard, experts), for the experts."""

    @property
    def replicas(self) -> int:
        """Number of processes that hold the same weights."""
        return self.all["replicate"].size()

    @property
    def of_expert_columns(self) -> DeviceMesh:
        """(replicate, shard), or (shard,) with one replica: the part of `all` that FSDP2 shards experts over."""
        return self.all["shard"] if self.replicas == 1 else self.all["replicate", "shard"]

    def __deepcopy__(self, memo: object) -> Meshes:
        return self


def make_meshes(config: ParallelConfig, device: torch.device) -> Meshes | None:
    """Device meshes of the running processes; None for a single one.

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
    # On a mesh of two dimensions FSDP2 all-reduces every gradient over the first, also if it has a single process
    # (torch 2.13, `foreach_reduce`: all_reduce_group is not None). On one dimension it only reduce-scatters.
    sizes, names = ((replicate, shard * experts), ("replicate", "dense")) if replicate > 1 else ((world,), ("dense",))
    return Meshes(
        dense=init_device_mesh(device.type, sizes, mesh_dim_names=names),
        all=init_device_mesh(
            device.type, (replicate, shard, experts), mesh_dim_names=("replicate", "shard", "experts")
        ),
    )


def parallelize(model: Backbone, recipe: Recipe, meshes: Meshes) -> None:
    """Shard a model in place. Its forward pass is called as before, by all processes at the same time."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # For head norms and pools, whose outputs nobody changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    bf16 = choose_precision(recipe.training.precision, torch.device(meshes.all.device_type)).precision == "bf16"
    # Gathered in the dtype that autocast would cast to anyway; gradients are summed in float32.
    low_precision = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    float32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    shard = partial(fully_shard, mesh=meshes.dense)
    for block in model.blocks:
        if isinstance(block.mlp, MoEFeedForward):
            _shard_experts(block.mlp.experts, meshes, low_precision)
        in_float32 = [module for module in block.modules() if computes_in_float32(module)]
        if in_float32:
            shard(in_float32, mp_policy=float32)
        shard(block, mp_policy=low_precision)
    # Resharded after the forward pass: an EMA has no backward pass and would keep outdated gathered weights.
    shard(model, mp_policy=float32, reshard_after_forward=True)
    if meshes.all.device_type == "cpu":
        for module in model.modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo supports sums alone
    if recipe.parallel.pool == "global":
        for router in routers_of(model):
            router.group = dist.group.WORLD


def computes_in_float32(module: nn.Module) -> bool:
    """True for routers and norms with parameters."""
    return isinstance(module, Router | nn.LayerNorm | nn.RMSNorm) and bool(list(module.parameters()))


def _shard_experts(experts: GroupedExperts, meshes: Meshes, policy: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = meshes.all
    if mesh["experts"].size() > 1:
        for name, weight in list(experts.named_parameters()):
            # Every process has initialized the same weights: each takes its shard, nothing is sent.
            sharded = distribute_tensor(weight.data, mesh["experts"], [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(sharded, weight.requires_grad))
        experts.group = mesh.get_group("experts")
    fully_shard(
        experts,
        mesh=meshes.of_expert_columns,
        shard_placement_fn=lambda weight: Shard(1),
        mp_policy=policy,
    )


def whole_model(model: Backbone, recipe: Recipe) -> Backbone | None:
    """A model with whole weights: itself on one process, else a copy on the CPU of the main process; None elsewhere.

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
        if name not in tensors:  # constant tables that are not saved
            module, _, own_name = name.rpartition(".")
            setattr(whole.get_submodule(module), own_name, buffer.cpu())
    return whole


def _whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.cpu() if is_main() else full.new_empty(0)
