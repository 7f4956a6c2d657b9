"""Which tokens are dropped, in which steps, and that a step with dropping is split over micro-batches as any other."""

import pytest
import torch

from diffusion_moe.config import difference, read_recipe
from diffusion_moe.config.token_drop import square_of
from diffusion_moe.counts import model_flops, training_flops
from diffusion_moe.data import Batch
from diffusion_moe.models.token_drop import NOTHING_DROPPED
from diffusion_moe.planning.plan import compute_of
from diffusion_moe.training.state import make_state
from diffusion_moe.training.step import train_step
from diffusion_moe.training.token_drop import choose_drop

CPU = torch.device("cpu")
DROP = ["--model.depth=3", "--model.first_k_full=1", "--model.last_k_full=1", "--training.token_drop_rate=0.75"]
SPRINT = [*DROP, "--model.fusion=true", "--training.path_drop_rate=0.2", "--training.token_selection=squares"]


def drop_of(recipe, step, samples, grid=(4, 4)):
    return choose_drop(recipe, step, torch.as_tensor(samples), grid)


@pytest.mark.parametrize("options", [DROP, SPRINT], ids=["TREAD", "SPRINT"])
def test_a_sample_drops_the_same_in_any_micro_batch_and_other_tokens_in_other_steps(tiny, options):
    recipe = read_recipe("digits", [*tiny, *options])
    whole, other = drop_of(recipe, 3, range(400)), drop_of(recipe, 4, range(400))
    some = drop_of(recipe, 3, [300, 7])
    assert torch.equal(some.kept_BK, whole.kept_BK[[300, 7]])
    assert whole.kept_BK.shape == (400, 4) and (whole.kept_BK.diff(dim=1) > 0).all()
    assert not torch.equal(other.kept_BK, whole.kept_BK)
    shares = torch.bincount(whole.kept_BK.flatten(), minlength=16) / 400
    assert (shares - 0.25).abs().max() < 4 * (0.25 * 0.75 / 400) ** 0.5
    if options is DROP:
        assert whole.path is False
        return
    assert torch.equal(some.path, whole.path[[300, 7]])
    assert abs(float(whole.path.float().mean()) - 0.2) < 4 * (0.2 * 0.8 / 400) ** 0.5


@pytest.mark.parametrize(
    ("rate", "grid", "side", "count"),
    [(0.75, (4, 6), 2, 1), (0.5, (4, 4), 2, 2), (0.625, (4, 8), 4, 6), (0.875, (8, 4), 4, 2)],
)
def test_every_square_keeps_as_many_tokens(tiny, rate, grid, side, count):
    """The drop rates and squares of the published code."""
    options = [option for option in SPRINT if "rate=0.75" not in option]
    recipe = read_recipe("digits", [*tiny, *options, f"--training.token_drop_rate={rate}"])
    assert square_of(rate, *grid) == (side, count)
    kept = drop_of(recipe, 1, range(50), grid).kept_BK
    rows, columns = kept // grid[1], kept % grid[1]
    square = rows // side * (grid[1] // side) + columns // side
    squares = grid[0] * grid[1] // side**2
    for of_image in square:
        assert torch.bincount(of_image, minlength=squares).tolist() == [count] * squares
    places = torch.bincount((rows % side * side + columns % side).flatten(), minlength=side**2)
    assert places.min() > 0


def test_the_last_steps_see_all_tokens(tiny):
    recipe = read_recipe("digits", [*tiny, *DROP, "--training.steps=10", "--training.full_token_share=0.2"])
    rates = [recipe.training.drop_rate_at(step) for step in range(1, 11)]
    assert rates == [0.75] * 8 + [0.0] * 2
    assert drop_of(recipe, 8, [0]).kept_BK.shape == (1, 4) and drop_of(recipe, 9, [0]) == NOTHING_DROPPED
    config = recipe.model
    full, fewer = model_flops(config).total, model_flops(config, 0.75).total
    assert training_flops(recipe) == pytest.approx(0.8 * fewer + 0.2 * full)
    compute = compute_of(recipe)
    assert compute.forward == pytest.approx(recipe.training.batch_size * (0.8 * fewer + 0.2 * full), abs=1)
    assert compute.backward == pytest.approx(2 * compute.forward, abs=1)


def test_more_steps_are_another_recipe_where_they_move_the_last_ones(tiny):
    constant = [*tiny, *DROP, "--optimizer.schedule=constant"]
    some, more = (read_recipe("digits", [*constant, f"--training.steps={steps}"]) for steps in (10, 20))
    assert difference(some, more) == []
    constant.append("--training.full_token_share=0.2")
    some, more = (read_recipe("digits", [*constant, f"--training.steps={steps}"]) for steps in (10, 20))
    assert difference(some, more) == ["training.steps: 10 -> 20"]


def test_without_dropping_nothing_is_chosen(tiny):
    assert drop_of(read_recipe("digits", tiny), 1, range(4)) == NOTHING_DROPPED
    recipe = read_recipe("digits", tiny)
    assert training_flops(recipe) == model_flops(recipe.model).total


@pytest.mark.parametrize("options", [DROP, SPRINT], ids=["TREAD", "SPRINT"])
def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(tiny, options):
    torch.manual_seed(0)
    batch, states = Batch(torch.randn(16, 1, 8, 8), torch.arange(16) % 10), []
    for accumulation in (1, 4):
        recipe = read_recipe("digits", [*tiny, *options, f"--training.accumulation={accumulation}"])
        state, numbers = make_state(recipe, CPU), []
        for _ in range(3):
            numbers.append(train_step(state, recipe, batch, detailed=True).numbers.read())
        states.append((state, numbers))
    (whole, one), (split, two) = states
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5, nan_ok=True)
    for (name, a), b in zip(whole.ema.named_parameters(), split.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--training.token_drop_rate=0.5"],
            "token_drop_rate is 0.5, but model.first_k_full 2 and last_k_full 2 leave",
        ),
        ([*DROP, "--model.sliding_window=3"], "model.sliding_window is 3, but among kept tokens"),
        (["--training.path_drop_rate=0.1"], "training.path_drop_rate is 0.1, but model.fusion is false"),
        (["--training.full_token_share=0.1"], "training.full_token_share is 0.1, but training.token_drop_rate is 0"),
        ([*SPRINT, "--training.token_drop_rate=0.7"], "training.token_drop_rate is 0.7, no multiple of 1/16"),
        ([*SPRINT, "--model.patch_size=8"], "squares of 2 x 2 tokens, but an image has 1 x 1; use random"),
    ],
)
def test_what_cannot_be_dropped_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        read_recipe("digits", [*tiny, *options])
