"""Bytes that autograd keeps of a forward pass, traced with tensors that have shapes and no memory.

It is the only part of a plan that needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config import ModelConfig, Recipe
from ..models import Backbone
from ..moe import recompute_experts
from ..moe.precision import use_cpu_matmul
from ..training.initialization import make_trainable
from ..training.parallelize import computes_in_float32


@dataclass
class Saved:
    """Bytes that are kept for the backward pass, without weights and their state."""

    outside: int = 0
    """Embedders, output layer and loss."""
    blocks: list[int] = field(default_factory=list)
    """Each block."""
    inputs: int = 0
    """Inputs of all blocks, which are all that is kept if blocks are recomputed."""

    def kept(self, recompute: str) -> int:
        """Bytes at the end of the forward pass; with `recompute: blocks`, those of one block while it is recomputed."""
        if recompute == "blocks":
            return self.outside + self.inputs + max(self.blocks)
        return self.outside + sum(self.blocks)


def trace_saved(recipe: Recipe, images: int, spread: bool = False) -> Saved:
    """Trace one micro-batch of so many images, without allocating any memory; kernels are a CPU's.

    Args:
        spread: several processes, where FSDP2 gathers each block's weights in the dtype of the matmuls and frees them
            afterwards, so that no casts are kept.
    """
    with FakeTensorMode(), use_cpu_matmul("low_precision"):  # bfloat16 matmuls, as on a GPU
        model = make_trainable(recipe).train()
        recompute_experts(model, recipe.training.recompute == "experts")
        if spread and recipe.training.precision == "bf16":
            _narrow(model)
        return _saved_of(model, recipe, images)


def _saved_of(model: Backbone, recipe: Recipe, images: int) -> Saved:
    saved = Saved()
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    with _counted(model, saved, own):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.training.precision == "bf16"):
            out = model(*blank_inputs(recipe.model, images))
        _ = (out.sample.float() - 1).square().mean()
    return saved


@contextmanager
def _counted(model: Backbone, saved: Saved, own: set[int]) -> Iterator[None]:
    """Add up what autograd packs, every storage once, by the block that runs."""
    seen, block_inputs, kept = set(own), set(own), []
    saved.blocks, running = [0] * len(model.blocks), -1

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # so that no storage's identity is given out twice
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            if running < 0:
                saved.outside += storage.nbytes()
            else:
                saved.blocks[running] += storage.nbytes()
        return tensor

    def enter(block: nn.Module, inputs: tuple[object, ...]) -> None:
        nonlocal running
        running += 1
        for tensor in [value for value in inputs if isinstance(value, Tensor)]:
            kept.append(tensor)
            storage = tensor.untyped_storage()
            if storage._cdata not in block_inputs:
                block_inputs.add(storage._cdata)
                saved.inputs += storage.nbytes()

    def leave(*_: object) -> None:
        nonlocal running
        if running == len(model.blocks) - 1:
            running = -1

    hooks = [block.register_forward_pre_hook(enter) for block in model.blocks]
    hooks.append(model.blocks[-1].register_forward_hook(leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _narrow(model: Backbone) -> None:
    """Give the blocks' weights the dtype in which FSDP2 gathers them."""
    modules = [module for block in model.blocks for module in block.modules()]
    wide = {id(parameter) for module in modules if computes_in_float32(module) for parameter in module.parameters()}
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in wide:
                setattr(module, name, nn.Parameter(parameter.to(torch.bfloat16), parameter.requires_grad))


def blank_inputs(config: ModelConfig, images: int) -> tuple[Tensor | None, ...]:
    """The arguments of a model's `forward` in their order: zeros, and texts of the greatest length."""
    x = torch.zeros(images, config.in_channels, config.sample_size, config.sample_size)
    t = torch.zeros(images, dtype=torch.long if config.process == "ddpm" else torch.float32)
    labels = torch.zeros(images, dtype=torch.long) if config.num_classes else None
    text = torch.zeros(images, config.text_length, config.text_dim) if config.text_dim else None
    pooled = torch.zeros(images, config.text_pooled_dim) if config.text_pooled_dim else None
    return x, t, labels, text, None, pooled
