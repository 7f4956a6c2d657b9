"""What autograd keeps of a real forward pass, by block: the oracle of `planning.activations`."""

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from diffusion_moe.moe import recompute_experts
from diffusion_moe.moe.precision import use_cpu_matmul
from diffusion_moe.planning.activations import Kept
from diffusion_moe.training.initialization import make_trainable
from diffusion_moe.training.parallelize import computes_in_float32


def traced(recipe, images, sharded=False):
    """The `Kept` of a micro-batch, from the tensors that autograd packs; each storage counts once."""
    model = make_trainable(recipe).train()
    recompute_experts(model, recipe.training.recompute == "experts")
    bf16 = recipe.training.precision == "bf16"
    if sharded and bf16:
        cast_as_fsdp(model)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    seen, input_storages, alive = set(own), set(own), []
    kept, inputs, running = [0] * (1 + len(model.blocks)), 0, 0  # number 0 is outside of the blocks

    def new_bytes(tensor, seen):
        alive.append(tensor)  # so that no storage's identity is given out twice
        storage = tensor.untyped_storage()
        size = 0 if storage._cdata in seen else storage.nbytes()
        seen.add(storage._cdata)
        return size

    def pack(tensor):
        kept[running] += new_bytes(tensor, seen)
        return tensor

    def enter(block, values):
        nonlocal running, inputs
        running = 1 + next(i for i, other in enumerate(model.blocks) if other is block)
        leaves = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
        inputs += sum(new_bytes(value, input_storages) for value in leaves)

    def leave(*_):
        nonlocal running
        running = 0

    for block in model.blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), use_cpu_matmul("low_precision"):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(*blank_inputs(recipe.model, images))
        _ = (out.sample.float() - 1).square().mean()
    return Kept(kept[0], tuple(kept[1:]), inputs)


def cast_as_fsdp(model):
    """Give the blocks' weights the dtype in which FSDP2 gathers them."""
    modules = [module for block in model.blocks for module in block.modules()]
    float32 = {id(p) for module in modules if computes_in_float32(module) for p in module.parameters()}
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in float32:
                setattr(module, name, nn.Parameter(parameter.to(torch.bfloat16), parameter.requires_grad))


def blank_inputs(config, images):
    """The arguments of a model's `forward` in their order: zeros, and texts of the greatest length."""
    x = torch.zeros(images, config.in_channels, config.sample_size, config.sample_size)
    t = torch.zeros(images, dtype=torch.long if config.process == "ddpm" else torch.float32)
    labels = torch.zeros(images, dtype=torch.long) if config.num_classes else None
    text = torch.zeros(images, config.text_length, config.text_dim) if config.text_dim else None
    pooled = torch.zeros(images, config.text_pooled_dim) if config.text_pooled_dim else None
    return x, t, labels, text, None, pooled
