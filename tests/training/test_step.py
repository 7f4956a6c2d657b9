"""One training step."""

import math

import pytest
import torch

from diffusion_moe.config import read_recipe
from diffusion_moe.data import Batch, batches_from, load_dataset
from diffusion_moe.diffusion.ddpm import ddpm_losses, linear_schedule
from diffusion_moe.diffusion.times import sample_steps, sample_times
from diffusion_moe.moe import routers_of
from diffusion_moe.randomness import normal
from diffusion_moe.routing_rules import RULES
from diffusion_moe.text import TextFeatures
from diffusion_moe.training.loss import micro_batch_loss
from diffusion_moe.training.state import make_state
from diffusion_moe.training.step import train_step

CPU = torch.device("cpu")


def first_batch(recipe):
    data = load_dataset(recipe.data, "train")
    return data.__getitems__(next(batches_from(0, 1, len(data), recipe.training.batch_size, recipe.training.seed)))


def snapshot(state):
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in (("model", state.model), ("ema", state.ema))
        for name, tensor in module.state_dict().items()
    }


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(tiny):
    """Without routing over the batch, splitting a step changes rounding only."""
    states = []
    for accumulation in (1, 4):
        recipe = read_recipe("digits", [*tiny, "--model.router=dsmoe", f"--training.accumulation={accumulation}"])
        state = make_state(recipe, CPU)
        result = train_step(state, recipe, first_batch(recipe), detailed=True)
        states.append((state, result))
    (whole, one), (split, two) = states
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-4)
    assert one.finite and not one.stop
    assert one.numbers.read() == pytest.approx(two.numbers.read(), rel=1e-4, nan_ok=True)
    for name, tensor in whole.model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, split.model.state_dict()[name])
    grads = zip(whole.model.parameters(), split.model.parameters(), strict=True)
    for a, b in grads:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("accumulation", "sizes"), [(1, [16]), (2, [8, 8]), (3, [6, 6, 4]), (5, [4, 4, 4, 4])])
def test_micro_batches_are_views_of_the_batch(tiny, accumulation, sizes):
    """So they stay in the memory that the loader pinned."""
    batch = first_batch(read_recipe("digits", tiny))
    features, pooled = torch.randn(16, 3, 5), torch.randn(16, 2)
    batch = batch._replace(text=TextFeatures(features, features[..., 0] > 0, pooled))
    parts = batch.micro_batches(accumulation)
    assert [len(part.images) for part in parts] == sizes
    for part, start in zip(parts, torch.tensor([0, *sizes]).cumsum(0), strict=False):
        whole = (batch.images, batch.labels, *batch.text)
        for tensor, of in zip((part.images, part.labels, *part.text), whole, strict=True):
            assert torch.equal(tensor, of[start : start + len(tensor)])
            assert tensor.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()
    assert batch.positions.is_contiguous()
    assert torch.equal(batch.samples(CPU), torch.arange(16))
    assert torch.equal(batch._replace(positions=None).samples(CPU), torch.arange(16))


@pytest.mark.parametrize("router", ["dense", *RULES])
def test_every_rule_learns_one_batch(tiny, router):
    recipe = read_recipe(
        "digits", [*tiny, f"--model.router={router}", "--optimizer.learning_rate=3e-3", "--optimizer.schedule=constant"]
    )
    state, batch = make_state(recipe, CPU), first_batch(recipe)
    losses = [train_step(state, recipe, batch).loss for _ in range(60)]
    assert sum(losses[-10:]) / 10 < 0.75 * sum(losses[:5]) / 5


@pytest.mark.parametrize("router", ["diffmoe", "dsmoe"])
def test_routing_state_moves_once_a_step_and_only_then(tiny, router):
    recipe = read_recipe("digits", [*tiny, f"--model.router={router}", "--training.accumulation=2"])
    state, batch = make_state(recipe, CPU), first_batch(recipe)
    first = routers_of(state.model)[0]
    buffer = first.threshold if router == "diffmoe" else first.e_score_correction_bias
    micro_batch_loss(state.model, recipe, batch, 1, torch.arange(16))
    assert buffer.abs().max() == 0
    train_step(state, recipe, batch)
    if router == "dsmoe":  # one step of the sign rule, whatever the number of micro-batches, then centred
        moves = (buffer - buffer.min()) / recipe.model.balance_rate
        torch.testing.assert_close(moves, moves.round(), rtol=0, atol=1e-3)
        assert moves.max().round() in (1, 2) and abs(float(buffer.mean())) < 1e-9
    assert buffer.abs().max() > 0


def test_a_sample_keeps_its_noise_time_and_dropout_in_any_micro_batch(tiny):
    recipe = read_recipe("digits", [*tiny, "--model.router=dense"])
    state, batch = make_state(recipe, CPU), first_batch(recipe)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        whole = micro_batch_loss(state.model, recipe, batch, 3, torch.arange(16)).diffusion
        parts = [
            micro_batch_loss(state.model, recipe, Batch(batch.images[rows], batch.labels[rows]), 3, rows).diffusion
            for rows in torch.arange(16).split(4)
        ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", ["dense", "diffmoe", "dsmoe", "race", "threshold"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_changes_no_weights_moments_or_routing_state(tiny, where, router):
    options = [f"--model.router={router}", f"--model.balance={'bias' if router == 'dsmoe' else 'none'}"]
    recipe = read_recipe("digits", [*tiny, *options])
    state, batch = make_state(recipe, CPU), first_batch(recipe)
    assert train_step(state, recipe, batch).finite
    spoiled = batch
    if where == "loss":
        spoiled = batch._replace(images=torch.full_like(batch.images, torch.nan))
    else:
        hook = state.model.x_embedder.weight.register_hook(lambda grad: grad * torch.inf)
    before, moments = snapshot(state), {n: t.clone() for n, t in state.optimizer.named_moments().items()}
    result = train_step(state, recipe, spoiled)
    assert not result.finite and result.step == state.step == 2
    assert math.isfinite(result.loss) == (where == "gradient") and not math.isfinite(result.grad_norm)
    for name, tensor in snapshot(state).items():
        if name.startswith("model"):
            assert torch.equal(tensor, before[name]), name
        else:  # the EMA moves towards unchanged weights
            expected = torch.lerp(before[name], before[name.replace("ema", "model", 1)], 1 - recipe.training.ema_decay)
            torch.testing.assert_close(tensor, expected)
    for name, moment in state.optimizer.named_moments().items():
        assert torch.equal(moment, moments[name]), name
    if where == "gradient":
        hook.remove()
    assert train_step(state, recipe, batch).finite
    assert any(not torch.equal(t, before[n]) for n, t in snapshot(state).items() if n.startswith("model"))


def test_a_request_to_stop_is_reported(tiny):
    recipe = read_recipe("digits", tiny)
    state, batch = make_state(recipe, CPU), first_batch(recipe)
    assert not train_step(state, recipe, batch).stop
    assert train_step(state, recipe, batch, stop=True).stop


def test_bf16_is_close_to_float32(tiny):
    losses = []
    for precision in ("fp32", "bf16"):
        recipe = read_recipe("digits", [*tiny, f"--training.precision={precision}", "--optimizer.schedule=constant"])
        state, batch = make_state(recipe, CPU), first_batch(recipe)
        losses.append([train_step(state, recipe, batch).loss for _ in range(10)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]


def test_label_dropout_replaces_the_given_share(tiny):
    """With all labels dropped the model sees the null class only: its embedding alone gets a gradient."""
    recipe = read_recipe("digits", [*tiny, "--diffusion.class_dropout=1.0"])
    state = make_state(recipe, CPU)
    batch, grads = first_batch(recipe), []
    state.model.y_embedder.weight.register_post_accumulate_grad_hook(lambda weight: grads.append(weight.grad))
    for _ in range(3):  # the zero-initialised layers let nothing through before they have moved
        train_step(state, recipe, batch)
    grad = grads[-1]
    assert grad[-1].abs().max() > 0
    assert grad[:-1].abs().max() == 0


OBJECTIVES = {
    "ddpm": ["--model.process=ddpm", "--model.prediction=epsilon", "--model.learn_sigma=true"],
    "ddpm, fixed variance": ["--model.process=ddpm", "--model.prediction=epsilon"],
    "x as velocity": ["--model.prediction=x", "--diffusion.loss=velocity", "--model.noise_scale=2.0"],
    "x as velocity, bounded": ["--model.prediction=x", "--diffusion.loss=velocity", "--diffusion.loss_min_gap=0.4"],
    "x": ["--model.prediction=x"],
    "epsilon as velocity": ["--model.prediction=epsilon", "--diffusion.loss=velocity"],
    "velocity as x": ["--diffusion.loss=x", "--diffusion.time=logit_normal"],
}


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_loss_of_every_objective_is_its_formula(tiny, options):
    """From the same draws, written out without the library's conversions."""
    recipe = read_recipe("digits", [*tiny, *options, "--diffusion.class_dropout=0"])
    state, batch, rows = make_state(recipe, CPU), first_batch(recipe), torch.arange(16)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        loss = micro_batch_loss(state.model, recipe, batch, 3, rows).diffusion
        x, noise = batch.images, normal(recipe.training.seed, "noise", 3, rows, (1, 8, 8))
        config = recipe.model
        if config.process == "ddpm":
            step = sample_steps(recipe.training.seed, 3, rows)
            kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[step].float()
            kept = kept.view(-1, 1, 1, 1)
            out = state.model(kept.sqrt() * x + (1 - kept).sqrt() * noise, step, batch.labels).sample
            expected = (out[:, :1] - noise).square().mean()
            assert (loss - expected) > (0 if config.learn_sigma else -1e-6)
            if config.learn_sigma:
                losses = ddpm_losses(out, x, noise, step, linear_schedule())
                expected = losses.mse.mean() + losses.vb.mean()
        else:
            noise = config.noise_scale * noise
            t = sample_times(recipe.diffusion, recipe.training.seed, 3, rows).view(-1, 1, 1, 1)
            z = t * x + (1 - t) * noise
            out = state.model(z, t.flatten(), batch.labels).sample
            least = recipe.diffusion.loss_min_gap or 0.05
            gap, gap_t = (1 - t).clamp_min(least), t.clamp_min(least)
            pairs = {
                ("x", "velocity"): ((out - z) / gap, (x - z) / gap),
                ("x", "x"): (out, x),
                ("epsilon", "velocity"): ((z - out) / gap_t, (z - noise) / gap_t),
                ("velocity", "x"): (z + (1 - t) * out, x),
            }
            answer, truth = pairs[config.prediction, recipe.diffusion.loss or config.prediction]
            expected = (answer - truth).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--diffusion.loss_min_gap=0"], "loss_min_gap is 0.0; it must be above 0 and at most 1"),
        (["--diffusion.loss_min_gap=0.4"], "loss_min_gap is 0.4, but from velocity to velocity nothing is divided"),
        (["--diffusion.loss_min_gap=0.4", "--model.prediction=x"], "but from x to x nothing is divided; remove it"),
        (["--diffusion.loss_min_gap=0.4", "--diffusion.loss=x"], "but from velocity to x nothing is divided"),
        (["--diffusion.loss_min_gap=0.4", *OBJECTIVES["ddpm"]], "but from epsilon to epsilon nothing is divided"),
        (["--diffusion.loss=x", *OBJECTIVES["ddpm"]], "loss is 'x', but model.process ddpm compares epsilon"),
    ],
)
def test_losses_that_mean_nothing_are_refused(tiny, options, expected):
    with pytest.raises(ValueError, match=expected):
        read_recipe("digits", [*tiny, *options])


def test_dropout_repeats_itself_step_by_step_and_leaves_torchs_generator_alone(tiny):
    recipe = read_recipe("digits", [*tiny, "--model.dropout=0.3", "--model.expert_dropout=0.3", "--model.depth=4"])
    runs = []
    for wait in (0, 3):  # other draws in between change nothing
        state, batch = make_state(recipe, CPU), first_batch(recipe)
        losses = []
        for _ in range(5):
            torch.randn(wait)
            before = torch.random.get_rng_state()
            losses.append(train_step(state, recipe, batch).loss)
            assert torch.equal(torch.random.get_rng_state(), before)
        runs.append(losses)
    # Each step and each micro-batch has masks of its own.
    state, batch = make_state(recipe, CPU), first_batch(recipe)
    masks = []
    state.model.blocks[1].mlp.experts.dropout.register_forward_hook(
        lambda module, args, out: masks.append((out == 0)[:20])
    )
    halves = read_recipe("digits", [*tiny, "--model.expert_dropout=0.3", "--training.accumulation=2"])
    for _ in range(2):
        train_step(state, halves, batch)
    assert len(masks) == 4 and len({mask.numpy().tobytes() for mask in masks}) == 4
    without = read_recipe("digits", [*tiny, "--model.depth=4"])
    state = make_state(without, CPU)
    plain = [train_step(state, without, first_batch(without)).loss for _ in range(5)]
    assert runs[0] == runs[1] and runs[0][1:] != plain[1:]


def test_a_jit_trains(tiny):
    jit = ["--model.backbone=jit", "--model.prediction=x", "--model.bottleneck_dim=6", "--model.class_tokens=2"]
    jit += ["--model.class_tokens_from=1", "--model.norm=rmsnorm", "--model.qk_norm=true", "--model.shared_bias=true"]
    jit += ["--model.position=sincos+rope2d", "--model.rotary_pairs=neighbours", "--diffusion.loss=velocity"]
    recipe = read_recipe("digits", [*tiny, *jit, "--optimizer.schedule=constant"])
    state, batch = make_state(recipe, CPU), first_batch(recipe)
    grads = {}
    for name, parameter in state.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: grads.update({name: p.grad}))
    losses = [train_step(state, recipe, batch).loss for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    still = [name for name, _ in state.model.named_parameters() if name not in grads or grads[name].abs().max() == 0]
    assert [name for name in still if "y_embedder" not in name] == []
