"""Muon against its closed form and `torch.optim.Muon`, and what every optimizer here promises."""

import copy

import pytest
import torch

from diffusion_moe.config import read_recipe
from diffusion_moe.data import load_dataset
from diffusion_moe.run_folder import RunFolder
from diffusion_moe.training.checkpoint import load_checkpoint, state_tensors
from diffusion_moe.training.dataloader import batches
from diffusion_moe.training.loop import train
from diffusion_moe.training.muon import COEFFICIENTS, LocalMuon, orthogonalize, scale
from diffusion_moe.training.optimizer import LocalAdamW
from diffusion_moe.training.state import make_state
from diffusion_moe.training.step import train_step

CPU = torch.device("cpu")
MUON = ["--optimizer.kind=muon", "--optimizer.weight_decay=0.1", "--optimizer.learning_rate=3e-3"]


@pytest.fixture
def recipe(tiny):
    return read_recipe("digits", [*tiny, *MUON, "--model.num_kv_heads=1", "--optimizer.schedule=constant"])


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (5, 8, 12), (5, 12, 8)])
def test_singular_values_go_through_the_polynomial_and_their_vectors_stay(shape):
    x = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    found = orthogonalize(x)
    torch.testing.assert_close(found, u * s[..., None, :] @ v)
    found_s = torch.linalg.svdvals(found)
    assert found_s.min() > 0.68 and found_s.max() < 1.21
    # A matrix of min(M, N) singular values of 1 has this root mean square.
    orthogonal = scale(*shape[-2:]) * (u @ v)
    torch.testing.assert_close(orthogonal.square().mean((-2, -1)).sqrt(), torch.full(shape[:-2], 0.2).double())


def test_zero_stays_zero_and_experts_do_not_heed_each_other():
    x = torch.randn(4, 6, 9)
    x[1], x[2] = 0, 1e4 * x[2]
    found = orthogonalize(x)
    assert found[1].abs().max() == 0
    for expert, alone in zip(found, x):
        torch.testing.assert_close(expert, orthogonalize(alone), rtol=1e-4, atol=1e-5)


def matrices_of(model, name, tensor):
    """The matrices that a parameter holds, as views."""
    if name.endswith("qkv.weight"):
        attention = model.get_submodule(name.removesuffix(".qkv.weight"))
        queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        return tensor.split([queries, keys, keys])
    if name.endswith("w_in"):
        return [half for expert in tensor for half in expert.chunk(2, dim=-1)]
    return list(tensor) if name.endswith("w_out") else [tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torchs_optimizers_matrix_by_matrix(recipe, dtype, monkeypatch):
    """torch always computes in bfloat16; for float32 this cast is taken from it."""
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    monkeypatch.setenv("DIFFUSION_MOE_CPU_MATMUL", "low_precision")
    config, lr = recipe.optimizer, 0.05
    model = make_state(recipe, CPU).model
    oracle, plain = copy.deepcopy(model), copy.deepcopy(model)
    ours, adamw = LocalMuon(model, config, dtype), LocalAdamW(plain, config)
    names = {name for name, p in model.named_parameters() if p in ours.matrices}
    views = {name: matrices_of(oracle, name, p.data) for name, p in oracle.named_parameters() if name in names}
    muon = torch.optim.Muon(
        [view for several in views.values() for view in several], lr, 0.1, 0.95, adjust_lr_fn="match_rms_adamw"
    )
    for group in [*ours.param_groups, *adamw.param_groups]:
        group["lr"] = lr
    for _ in range(3):
        for (name, p), other, third in zip(model.named_parameters(), plain.parameters(), oracle.parameters()):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
            if name in names:
                for view, gradient in zip(views[name], matrices_of(oracle, name, p.grad.clone())):
                    view.grad = gradient
            assert third.grad is None
        for optimizer in (ours, adamw):
            optimizer.take_gradients()
            optimizer.step_if(torch.tensor(True))
        muon.step()
    for (name, p), rest, matrix in zip(model.named_parameters(), plain.parameters(), oracle.parameters()):
        if name not in names:
            assert torch.equal(p, rest), name
        elif dtype == torch.float32:
            torch.testing.assert_close(p, matrix, rtol=1e-4, atol=1e-5)
        else:  # three updates of root mean square 0.2 lr
            assert (p - matrix).square().mean().sqrt() < 0.05 * 3 * 0.2 * lr, name


def test_matrices_of_blocks_that_take_tokens_are_muons(recipe):
    state = make_state(recipe, CPU)
    muons = {name for name, p in state.model.named_parameters() if p in state.optimizer.matrices}
    attention = {f"blocks.{i}.attn.{name}.weight" for i in (0, 1) for name in ("qkv", "proj")}
    dense = {f"blocks.0.mlp.{name}_proj.weight" for name in ("up", "down")}
    shared = {f"blocks.1.mlp.shared.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert muons == attention | dense | shared | {"blocks.1.mlp.experts.w_in", "blocks.1.mlp.experts.w_out"}


def test_a_step_left_out_changes_no_bit_and_frees_the_gradients(recipe):
    state = make_state(recipe, CPU)
    batch = next(batches(recipe, load_dataset(recipe.data, "train"), 0))
    train_step(state, recipe, batch)
    before = {name: tensor.clone() for name, tensor in state_tensors(state).items() if not name.startswith("ema")}
    spoiled = batch._replace(images=torch.full_like(batch.images, torch.nan))
    assert not train_step(state, recipe, spoiled).finite
    after = state_tensors(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in [*state.model.parameters(), *state.optimizer.local])
    assert train_step(state, recipe, batch).finite
    assert not torch.equal(state.model.blocks[1].mlp.experts.w_in, before["model.blocks.1.mlp.experts.w_in"])


def test_a_resumed_run_is_the_whole_one_bit_for_bit(tiny, tmp_path):
    def run(folder, steps):
        options = [*tiny, *MUON, "--optimizer.schedule=constant", f"--training.steps={steps}"]
        recipe = read_recipe("digits", [*options, "--training.checkpoint_every=3", "--training.deterministic=true"])
        train(recipe, tmp_path / folder, log=str)
        return recipe

    run("halves", 3)
    recipe = run("halves", 6)
    run("whole", 6)
    states = [make_state(recipe, CPU) for _ in range(2)]
    for state, folder in zip(states, ("whole", "halves")):
        load_checkpoint(tmp_path / folder / "checkpoints" / "step-00000006", state)
    whole, halves = map(state_tensors, states)
    names = dict(states[0].model.named_parameters())
    muons = {name for name, p in states[0].model.named_parameters() if p in states[0].optimizer.matrices}
    assert {name for name in names if f"optimizer.momentum.{name}" in whole} == muons
    assert {name for name in names if f"optimizer.exp_avg.{name}" in whole} == names.keys() - muons
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)


def test_what_does_not_go_with_it_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer.momentum is 0.9, but optimizer.kind is adamw.*; remove it"):
        read_recipe("digits", [*tiny, "--optimizer.momentum=0.9"])
    adapters = ["--init.from_checkpoint=another", "--init.lora_rank=2"]
    with pytest.raises(ValueError, match=r"optimizer.kind is muon, but .*\(init.lora_rank\); set it to adamw"):
        read_recipe("digits", [*tiny, *MUON, *adapters])
    RunFolder(tmp_path).claim(read_recipe("digits", tiny), "auto")
    with pytest.raises(ValueError, match=r"began otherwise \(optimizer.kind: adamw -> muon\)"):
        RunFolder(tmp_path).claim(read_recipe("digits", [*tiny, "--optimizer.kind=muon"]), "changed")
