"""The schedule of the capacity: all experts at first, then linearly down to the capacity."""

import pytest
import torch

from diffusion_moe.config import read_recipe
from diffusion_moe.data import batches_from, load_dataset
from diffusion_moe.moe import routers_of, set_training_capacity
from diffusion_moe.planning.options import PlanOptions
from diffusion_moe.planning.plan import compute_of, make_plan
from diffusion_moe.routing_rules import RULES
from diffusion_moe.training.checkpoint import Checkpoints, load_checkpoint, state_tensors
from diffusion_moe.training.state import make_state
from diffusion_moe.training.step import train_step

CPU = torch.device("cpu")
SCHEDULE = ["--training.capacity_full_steps=2", "--training.capacity_fall_steps=4", "--model.capacity=1"]
SCHEDULED = [name for name, rule in RULES.items() if rule.has_capacity_schedule]
OF_EACH_STEP = [4, 4, 3.25, 2.5, 1.75, 1, 1]
"""Experts a token of 4 experts."""


def recipe_of(tiny, *options):
    return read_recipe("digits", [*tiny, "--model.num_experts=4", *options])


def trained(state, recipe, steps):
    """Experts a token in each of these steps."""
    data, numbers = load_dataset(recipe.data, "train"), []
    for indices in batches_from(state.step, state.step + steps, len(data), recipe.training.batch_size, 0):
        result = train_step(state, recipe, data.__getitems__(indices), detailed=True)
        numbers.append(result.numbers.read()["moe_0/capacity"])
    return numbers


def test_the_schedule_in_closed_form(tiny):
    recipe = recipe_of(tiny, "--model.router=ec", *SCHEDULE)
    assert [recipe.capacity_at(step) for step in range(1, 8)] == OF_EACH_STEP
    sudden = recipe_of(tiny, "--model.router=ec", "--training.capacity_full_steps=2", "--model.capacity=1")
    assert [sudden.capacity_at(step) for step in range(1, 5)] == [4, 4, 1, 1]
    assert recipe_of(tiny, "--model.router=ec").capacity_at(1) is None


@pytest.mark.parametrize("router", SCHEDULED)
def test_training_serves_as_many_experts_and_inference_the_capacity(tiny, router):
    recipe = recipe_of(tiny, f"--model.router={router}", *SCHEDULE)
    state = make_state(recipe, CPU)
    assert trained(state, recipe, 7) == OF_EACH_STEP  # 16 tokens an image
    set_training_capacity(state.model, 4.0)
    for first in (routers_of(state.model)[0], routers_of(state.ema)[0]):
        assert first.eval().settings.capacity == 1


@pytest.mark.parametrize("router", SCHEDULED)
def test_a_resumed_run_repeats_the_schedule_bit_for_bit(tiny, router, tmp_path):
    recipe = recipe_of(tiny, f"--model.router={router}", *SCHEDULE)
    state = make_state(recipe, CPU)
    trained(state, recipe, 3)
    with Checkpoints(tmp_path, recipe.training) as checkpoints:
        checkpoints.save_state(state)
    resumed = make_state(recipe, CPU)
    load_checkpoint(tmp_path / "step-00000003", resumed)
    assert trained(state, recipe, 2) == trained(resumed, recipe, 2) == OF_EACH_STEP[3:5]
    expected, found = state_tensors(state), state_tensors(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--model.router=tc"], "training.capacity_full_steps is 2, but model.router tc has no capacity to schedule"),
        (["--model.router=dense"], "but model.router dense has no capacity to schedule"),
        (["--model.router=ec", "--training.compile=true"], "set it to 0, or training.compile to false"),
        (["--model.router=ec", "--model.layer_capacities=[1]"], "set it to 0, or model.layer_capacities to null"),
    ],
    ids=["tc", "dense", "compile", "capacities of layers"],
)
def test_impossible_schedules_are_refused(tiny, options, match):
    with pytest.raises(ValueError, match=match):
        recipe_of(tiny, *SCHEDULE, *options)


def test_a_plan_has_the_memory_of_the_fullest_step_and_the_operations_of_the_mean_one(tiny):
    options = ["--model.router=ec", "--training.steps=7", "--training.precision=bf16"]
    plan, full, least = (
        make_plan(recipe_of(tiny, *options, *more), PlanOptions())
        for more in (SCHEDULE, ["--model.capacity=4"], ["--model.capacity=1"])
    )
    assert plan.chosen.memory == full.chosen.memory != least.chosen.memory
    mean = recipe_of(tiny, *options, f"--model.capacity={sum(OF_EACH_STEP) / 7}")
    assert plan.compute == compute_of(mean) != least.compute
