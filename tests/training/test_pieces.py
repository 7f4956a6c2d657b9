"""Moving average, optimizer and schedule against their formulas."""

import pytest
import torch

from diffusion_moe.config import OptimizerConfig
from diffusion_moe.parsing import read_recipe
from diffusion_moe.training.ema import update_ema
from diffusion_moe.training.optimizer import learning_rate, make_optimizer
from diffusion_moe.training.step import make_state


@pytest.mark.parametrize(("router", "buffer"), [("diffmoe", "threshold"), ("dsmoe", "correction")])
def test_the_average_covers_parameters_and_routing_state(tiny, router, buffer):
    state = make_state(read_recipe("digits", [*tiny, f"--model.router={router}"]), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}
    with torch.no_grad():
        for tensor in state.model.state_dict().values():
            tensor.add_(torch.randn_like(tensor))
    update_ema(state.ema, state.model, decay=0.9)
    assert any(name.endswith(buffer) for name in before)
    for name, tensor in state.ema.state_dict().items():
        torch.testing.assert_close(tensor, 0.9 * before[name] + 0.1 * state.model.state_dict()[name])


def test_warm_up_is_linear_and_the_cosine_ends_at_zero():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule="cosine")
    assert [learning_rate(config, step, 110) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])
    assert [learning_rate(config, step, 110) for step in (60, 110)] == pytest.approx([1.0, 0.0])
    assert learning_rate(OptimizerConfig(learning_rate=2.0), 77, 110) == 2.0


def test_weight_decay_acts_on_matrices_only(tiny):
    recipe = read_recipe("digits", [*tiny, "--optimizer.weight_decay=0.1"])
    model = make_state(recipe, torch.device("cpu")).model
    decayed, plain = make_optimizer(model, recipe.optimizer).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    plain_names = {names[id(parameter)] for parameter in plain["params"]}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {"blocks.1.mlp.experts.w_in", "blocks.0.attn.qkv.weight"} <= decayed_names
    assert {"y_embedder.weight", "blocks.0.attn.qkv.bias", "blocks.1.mlp.router.weight"} <= plain_names
    assert decayed_names | plain_names == set(names.values())


def test_the_initial_model_is_a_function_of_the_seed(tiny):
    def weights(seed):
        return make_state(read_recipe("digits", [*tiny, f"--training.seed={seed}"]), torch.device("cpu")).model

    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(first.x_embedder.weight, again.x_embedder.weight)
    assert not torch.equal(first.x_embedder.weight, other.x_embedder.weight)
