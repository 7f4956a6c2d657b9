"""A whole training step and the sampler on a CUDA device: the host never waits."""

import json
from dataclasses import replace

import pytest
import torch

from diffusion_moe.benchmarks.options import BenchOptions
from diffusion_moe.benchmarks.wait_trace import Gpu
from diffusion_moe.benchmarks.waits import pinned, random_batch, small, waits
from diffusion_moe.cli import main
from diffusion_moe.config import read_recipe
from diffusion_moe.models import make_model
from diffusion_moe.training.state import state_from_model
from diffusion_moe.training.step import train_step

pytestmark = pytest.mark.gpu

RULES = {
    "dense": "dit-s",
    "tc": "tc-dit-l-e16",
    "ec": "ec-dit-l-e16",
    "diffmoe": "diffmoe-s-e16",
    "dsmoe": "dsmoe-s-e48",
    "ddpm": "diffmoe-l-e8-ddpm",
    "jit": "jitmoe-b-16-e16",
    "text": "t2i-dsmoe-s-e16",
    "joint text": "shapes-t2i",
}


@pytest.mark.parametrize("name", RULES.values(), ids=RULES)
def test_a_step_of_two_micro_batches_raises_no_synchronisation(name):
    """bfloat16, on compute capability 9.0 and newer; elsewhere torch's grouped matmul waits."""
    recipe = small(read_recipe(name), "bf16")
    state = state_from_model(make_model(recipe.model), recipe, torch.device("cuda"))
    batch = pinned(random_batch(recipe.model))
    train_step(state, recipe, batch, detailed=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = train_step(state, recipe, batch, detailed=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.finite and result.step == 2


@pytest.mark.parametrize("name", RULES.values(), ids=RULES)
def test_the_list_of_waits_is_as_on_the_stand_in(name):
    """One wait a layer and evaluation of DiffMoE's network, for its number of rows."""
    found = waits(BenchOptions(recipe=name, device="cuda"))
    assert found["waits"] == 0, found["places"]
    expected = waits(BenchOptions(recipe=name, device="cpu"))
    assert [place["at"] for place in found["places"]] == [place["at"] for place in expected["places"]]


def test_planted_waits_are_found():
    x = torch.ones(4, device="cuda")
    copied = torch.ones(4)
    plants = [lambda: x[0].item(), lambda: x.nonzero(), lambda: copied.to("cuda", non_blocking=True)]
    for plant in plants:
        plant()
        with Gpu(x.device).trace() as found:
            plant()
        assert {(wait.file, wait.line) for wait in found} == {(__file__, plant.__code__.co_firstlineno)}
    with Gpu(x.device).trace() as found:
        copied.pin_memory().to("cuda", non_blocking=True)
    assert found == []


def test_the_command_names_the_device(capsys):
    assert main(["bench", "waits", "--recipe=digits", "--device=cuda"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["waits"], record["device"]) == (0, torch.cuda.get_device_name())


def test_dropout_waits_for_nothing():
    """Its generators are seeded for each micro-batch."""
    recipe = small(read_recipe("digits"), "bf16")
    recipe = replace(recipe, model=replace(recipe.model, dropout=0.1, attention_dropout=0.1, expert_dropout=0.1))
    state = state_from_model(make_model(recipe.model), recipe, torch.device("cuda"))
    batch = pinned(random_batch(recipe.model))
    train_step(state, recipe, batch)
    with Gpu(state.model.device).trace() as found:
        train_step(state, recipe, batch)
    assert found == []
