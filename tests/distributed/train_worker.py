"""One of several gloo processes: takes some training steps in each of several cases, and saves what came of them.

Usage: train_worker.py CASES.json, a list of objects with `result` (a file), `steps`, `options`, and perhaps `backend`
(of torch.compile, for `training.compile`).
"""

import functools
import gc
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from diffusion_moe.config import read_recipe
from diffusion_moe.data import load_dataset
from diffusion_moe.distributed import is_main, torchrun_processes, world_size
from diffusion_moe.models import Backbone
from diffusion_moe.training.dataloader import batches
from diffusion_moe.training.layout_checks import check_parallel
from diffusion_moe.training.parallelize import make_meshes, whole_model
from diffusion_moe.training.state import make_state
from diffusion_moe.training.step import train_step

CPU = torch.device("cpu")


def note_gradients(optimizer):
    """A list that holds weak references to the memory of the last step's gradients."""
    storages, take_gradients = [], optimizer.take_gradients

    def take_and_note():
        gradients = take_gradients()
        storages[:] = [StorageWeakRef(gradient.untyped_storage()) for gradient in gradients if gradient.numel()]
        return gradients

    optimizer.take_gradients = take_and_note
    return storages


def are_freed(storages, seconds=5):
    """True if nothing holds the memory. Gloo's threads may hold what they exchanged a moment longer."""
    end = time.monotonic() + seconds
    while not all(storage.expired() for storage in storages) and time.monotonic() < end:
        gc.collect()
    return all(storage.expired() for storage in storages)


def all_reduce_with_others(tensor, *arguments, group=None, **options):
    """`dist.all_reduce`, which must not be asked to sum over one process."""
    assert dist.get_world_size(group) > 1, "an all-reduce of a single process"
    return all_reduce(tensor, *arguments, group=group, **options)


all_reduce = dist.all_reduce


def train(options, steps):
    """The numbers of each step, and weights and EMAs at the end; None but on the main process."""
    recipe = read_recipe("digits", options)
    check_parallel(recipe, world_size())
    state = make_state(recipe, CPU, make_meshes(recipe.parallel, CPU))
    numbers, storages = [], note_gradients(state.optimizer)
    for batch in batches(recipe, load_dataset(recipe.data, "train", recipe.training.seed), 0):
        numbers.append(train_step(state, recipe, batch, detailed=True).numbers.read())
        assert storages and are_freed(storages), "gradients outlive their step"
        if state.step == steps:
            break
    wholes = {kind: whole_model(getattr(state, kind), recipe) for kind in ("model", "ema")}
    if not is_main():
        return None
    tensors = {
        f"{kind}.{name}": tensor.detach().clone()
        for kind, whole in wholes.items()
        for name, tensor in whole.state_dict().items()
    }
    return {"numbers": numbers, "tensors": tensors}


def main(cases):
    """All cases, one after another."""
    torch.set_num_threads(1)
    compile_blocks = Backbone.compile_blocks
    dist.all_reduce = all_reduce_with_others
    with torchrun_processes():
        for case in cases:
            Backbone.compile_blocks = functools.partialmethod(compile_blocks, case.get("backend", "inductor"))
            found = train(case["options"], case["steps"])
            if found is not None:
                torch.save(found, case["result"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
