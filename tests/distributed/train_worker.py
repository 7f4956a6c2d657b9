"""One of several gloo processes: takes some training steps in each of several cases, and saves what came of them.

Usage: train_worker.py CASES.json, a list of objects with `result` (a file), `steps`, `options`, and perhaps `backend`
(of torch.compile, for `training.compile`).
"""

import functools
import json
import sys
from pathlib import Path

import torch

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


def train(options, steps):
    """The numbers of each step, and weights and EMAs at the end; None but on the main process."""
    recipe = read_recipe("digits", options)
    check_parallel(recipe, world_size())
    state = make_state(recipe, CPU, make_meshes(recipe.parallel, CPU))
    numbers = []
    for batch in batches(recipe, load_dataset(recipe.data, "train", recipe.training.seed), 0):
        numbers.append(train_step(state, recipe, batch, detailed=True).numbers.read())
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
    with torchrun_processes():
        for case in cases:
            Backbone.compile_blocks = functools.partialmethod(compile_blocks, case.get("backend", "inductor"))
            found = train(case["options"], case["steps"])
            if found is not None:
                torch.save(found, case["result"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
