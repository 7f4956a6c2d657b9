"""One of several gloo processes: takes some training steps and saves losses and final weights.

Usage: torchrun ... train_worker.py RESULT STEPS OPTION ...
"""

import sys

import torch

from diffusion_moe.data import load_dataset
from diffusion_moe.distributed import is_main, torchrun_processes
from diffusion_moe.parsing import read_recipe
from diffusion_moe.training.feed import batches
from diffusion_moe.training.parallelize import check_parallel, make_layout, whole_model
from diffusion_moe.training.step import make_state, train_step


def run(result: str, steps: int, options: list[str]) -> None:
    torch.set_num_threads(1)
    recipe = read_recipe("digits", options)
    check_parallel(recipe)
    device = torch.device("cpu")
    state = make_state(recipe, device, make_layout(recipe.parallel, device))
    numbers = []
    for batch in batches(recipe, load_dataset(recipe.data, "train", recipe.training.seed), 0):
        out = train_step(state, recipe, batch, detailed=True)
        numbers.append(out.numbers.read())
        if state.step == steps:
            break
    found = {
        f"{kind}.{name}": tensor for kind in ("model", "ema") for name, tensor in whole(state, recipe, kind).items()
    }
    if is_main():
        torch.save({"numbers": numbers, "tensors": found}, result)


def whole(state, recipe, kind):
    model = whole_model(getattr(state, kind), recipe)
    return {} if model is None else {name: t.detach().clone() for name, t in model.state_dict().items()}


if __name__ == "__main__":
    with torchrun_processes():
        run(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
