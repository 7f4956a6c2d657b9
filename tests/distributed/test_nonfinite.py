"""Two processes agree on which steps are left out, when to go back and when to stop."""

import json

import pytest
import torch
from poisoned_digits import poison_digits

from diffusion_moe.cli import main
from diffusion_moe.config import read_recipe
from diffusion_moe.data import load_dataset
from diffusion_moe.training.checkpoint import Checkpoints, state_tensors
from diffusion_moe.training.dataloader import images_of_step
from diffusion_moe.training.state import make_state

STEPS = 12


def final_state(folder):
    state = make_state(read_recipe(folder / "recipe.yaml"), torch.device("cpu"))
    checkpoints = Checkpoints(folder / "checkpoints", read_recipe(folder / "recipe.yaml").training)
    checkpoints.load_latest(state)
    return state


@pytest.mark.slow
def test_two_processes_agree(tiny, tmp_path, run_processes, monkeypatch):
    """Image 0 of a batch is the first process', the last one the other's: one process alone sees what is wrong."""
    options = [*tiny, f"--training.steps={STEPS}", "--training.max_nonfinite_steps=1", "--training.checkpoint_every=4"]
    options += ["--optimizer.eps=1e-5", "--logging.every=1"]
    recipe = read_recipe("digits", options)
    dataset = load_dataset(recipe.data, "train")
    first, last = ([images_of_step(recipe, dataset, step)[i] for step in range(1, STEPS + 1)] for i in (0, -1))
    goes_back, stops = [first[5], last[6]], [last[0], last[1], first[2], last[3]]
    todo = [
        {
            "poisoned": goes_back,
            "arguments": [*options, "--output_dir", str(tmp_path / "spread"), "--parallel.experts=2"],
        },
        {
            "poisoned": stops,
            "arguments": [*options, "--output_dir", str(tmp_path / "stopped"), "--parallel.shard=2"],
            "status": 1,
        },
    ]
    (tmp_path / "runs.json").write_text(json.dumps(todo))
    said = run_processes(2, "run_worker.py", tmp_path / "runs.json")
    assert sum(text.count("rolled back to step 4; the batches of steps 6 to 7") for text in said) == 1
    assert sum(text.count("stopped: ") for text in said) == 1
    assert json.loads((tmp_path / "stopped" / "nonfinite-steps.json").read_text())["steps"] == [3, 4]

    poison_digits(monkeypatch, goes_back)
    assert main(["train", "digits", *options, "--output_dir", str(tmp_path / "alone")]) == 0
    alone, spread = final_state(tmp_path / "alone"), final_state(tmp_path / "spread")
    assert alone.skipped_steps == spread.skipped_steps == {6, 7}
    expected, found = state_tensors(alone), state_tensors(spread)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-6)
