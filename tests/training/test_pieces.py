"""EMA, optimizer and schedule against their formulas."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from diffusion_moe.config import OptimizerConfig, read_recipe, recipe_names
from diffusion_moe.data import load_dataset
from diffusion_moe.training.dataloader import batches
from diffusion_moe.training.ema import ema_decay, update_ema
from diffusion_moe.training.optimizer import LocalAdamW, learning_rate
from diffusion_moe.training.state import make_state
from diffusion_moe.training.step import train_step

PLACE = {"image-folder": ("--data.path=photos",)}


def test_the_warm_up_of_the_ema_is_that_of_diffusers_from_the_second_update_on():
    theirs = EMAModel([torch.zeros(1)], decay=0.995)
    for updates in range(1, 3000):
        assert ema_decay(0.995, updates, warmup=True) == theirs.get_decay(updates + 1)
    assert [ema_decay(0.995, updates, warmup=True) for updates in (0, 1, 90)] == [1 / 10, 2 / 11, 91 / 100]
    assert ema_decay(0.995, 1789, warmup=True) < ema_decay(0.995, 1790, warmup=True) == 0.995  # 1791 / 1800
    assert ema_decay(0.05, 0, warmup=True) == 0.05
    assert ema_decay(0.995, 0, warmup=False) == 0.995


@pytest.mark.parametrize(("warmup", "decays"), [(True, [1 / 10, 2 / 11, 3 / 12, 0.3]), (False, [0.3] * 4)])
def test_emas_over_a_few_steps_are_their_closed_form(tiny, warmup, decays):
    """Of the weights after each step, in double precision; another EMA of decay 0.15 beside it."""
    options = [f"--training.ema_warmup={warmup}", "--training.ema_decay=0.3", "--training.extra_ema_decays=[0.15]"]
    recipe = read_recipe("digits", [*tiny, *options])
    state, data = make_state(recipe, torch.device("cpu")), load_dataset(recipe.data, "train")
    ema = more = {name: weight.double() for name, weight in state.model.named_parameters()}
    for decay, batch in zip(decays, batches(recipe, data, 0)):
        train_step(state, recipe, batch)
        now = {name: weight.detach().double() for name, weight in state.model.named_parameters()}
        ema = {name: decay * ema[name] + (1 - decay) * weight for name, weight in now.items()}
        more = {name: min(decay, 0.15) * more[name] + (1 - min(decay, 0.15)) * weight for name, weight in now.items()}
    for expected, model in ((ema, state.ema), (more, state.extra_emas[0.15])):
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("router", "buffer"), [("diffmoe", "threshold"), ("dsmoe", "e_score_correction_bias")])
def test_the_ema_covers_parameters_and_routing_state(tiny, router, buffer):
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
    decayed, plain = LocalAdamW(model, recipe.optimizer).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    plain_names = {names[id(parameter)] for parameter in plain["params"]}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {"blocks.1.mlp.experts.w_in", "blocks.0.attn.qkv.weight"} <= decayed_names
    assert {"y_embedder.weight", "blocks.0.attn.qkv.bias", "blocks.1.mlp.router.weight"} <= plain_names
    assert decayed_names | plain_names == set(names.values())


def test_steps_are_those_of_torchs_optimizer_and_can_be_left_out(tiny):
    """Bit for bit: weights and moments. The fourth step is not taken."""
    recipe = read_recipe("digits", [*tiny, "--optimizer.weight_decay=0.1"])
    model, other = (make_state(recipe, torch.device("cpu")).model for _ in range(2))
    ours, config = LocalAdamW(model, recipe.optimizer), recipe.optimizer
    same = dict(zip(model.parameters(), other.parameters()))
    groups = [{**group, "params": [same[part] for part in group["params"]]} for group in ours.param_groups]
    theirs = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
    for step in range(6):
        taken = torch.tensor(step != 3)
        for parameter, twin in same.items():
            twin.grad = torch.randn_like(parameter)
            parameter.grad = twin.grad.clone()
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = 0.001 * (step + 1)
        ours.take_gradients()
        ours.step_if(taken)
        theirs.found_inf = (~taken).float()
        theirs.step()
    for parameter, twin in same.items():
        assert torch.equal(parameter, twin) and parameter.grad is None
        assert all(torch.equal(ours.state[parameter][name], moment) for name, moment in theirs.state[twin].items())
    assert ours.state[ours.local[0]]["step"] == 5


def test_the_initial_model_is_a_function_of_the_seed(tiny):
    def weights(seed):
        return make_state(read_recipe("digits", [*tiny, f"--training.seed={seed}"]), torch.device("cpu")).model

    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(first.x_embedder.weight, again.x_embedder.weight)
    assert not torch.equal(first.x_embedder.weight, other.x_embedder.weight)


def test_recipes_of_papers_keep_their_constant_decay():
    warm = {name for name in recipe_names() if read_recipe(name, PLACE.get(name, ())).training.ema_warmup}
    assert warm == {"digits", "image-folder", "pictures", "shapes-t2i"}
