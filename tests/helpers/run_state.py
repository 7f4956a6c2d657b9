"""What a run has come to, read from its last checkpoint."""

import torch

from diffusion_moe.config import read_recipe
from diffusion_moe.training.checkpoint import Checkpoints, state_tensors
from diffusion_moe.training.state import make_state


def final_state(folder, step):
    """All tensors of a run's state, whole and on the CPU; its newest checkpoint must be good, and of that step."""
    recipe = read_recipe(folder / "recipe.yaml")
    state = make_state(recipe, torch.device("cpu"))
    with Checkpoints(folder / "checkpoints", recipe.training) as checkpoints:
        found = checkpoints.load_latest(state)
    assert found.path is not None and (found.path.name, found.problems) == (f"step-{step:08d}", [])
    assert state.step == step
    return {name: tensor.clone() for name, tensor in state_tensors(state).items()}
