"""The discrete process against Bayes' rule, torch.distributions and data whose best network is known."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_moe.diffusion import ddpm

FULL = ddpm.linear_schedule()
STEPS = torch.tensor([1, 17, 250, 600, 999])


def images(count, channels=2):
    return torch.randn(count, len(STEPS), channels, 3, 3, dtype=torch.float64)


def test_noise_added_step_by_step_adds_up():
    signal, variance = 1.0, 0.0
    for step, beta in enumerate(FULL.betas_S.tolist()):
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
        if step in (0, 17, 999):
            one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
            assert ddpm.noised(FULL, one, zero, torch.tensor([step])).item() == pytest.approx(signal, rel=1e-9)
            assert ddpm.noised(FULL, zero, one, torch.tensor([step])).item() ** 2 == pytest.approx(variance, rel=1e-9)
    assert (FULL.betas_S[0].item(), FULL.betas_S[-1].item()) == pytest.approx((1e-4, 0.02))


def test_the_noise_tells_the_data_even_at_the_last_step():
    x, noise = images(2)
    torch.testing.assert_close(ddpm.denoised(FULL, ddpm.noised(FULL, x, noise, STEPS), noise, STEPS), x)


def test_tables_are_copied_once_to_a_device_and_serve_autograd_later():
    table, x = ddpm.Table(FULL.betas_S), torch.ones(5, 1)
    with torch.inference_mode():
        found = table.at(STEPS, x)
    assert torch.equal(found, FULL.betas_S[STEPS].float()[:, None])
    (copied,) = table.copies.values()
    x.requires_grad_()
    (table.at(STEPS, x) * x).sum().backward()
    assert torch.equal(x.grad, found)
    assert [id(copy) for copy in table.copies.values()] == [id(copied)]
    assert table.at(STEPS, x.double()).dtype == torch.float64 and len(table.copies) == 2
    assert table.at(torch.tensor(3), x) == FULL.betas_S[3].float()


def test_all_steps_respaced_are_the_same_schedule():
    same = ddpm.respaced(FULL, 1000)
    torch.testing.assert_close(same.betas_S, FULL.betas_S, rtol=0, atol=1e-13)
    assert torch.equal(same.timesteps_S, FULL.timesteps_S)


def test_respacing_keeps_the_noise_and_the_number_of_each_kept_step():
    ten = ddpm.respaced(FULL, 10)
    assert ten.timesteps_S.tolist() == list(range(0, 1000, 111))
    torch.testing.assert_close(ten.alpha_bars_S, FULL.alpha_bars_S[ten.timesteps_S], rtol=1e-12, atol=0)
    four = ddpm.respaced(ten, 4)
    assert four.timesteps_S.tolist() == [0, 333, 666, 999]
    torch.testing.assert_close(four.alpha_bars_S, FULL.alpha_bars_S[four.timesteps_S], rtol=1e-12, atol=0)
    assert ddpm.respaced(FULL, 1).timesteps_S.tolist() == [999]


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}"):
        ddpm.respaced(FULL, steps)


@pytest.mark.parametrize("schedule", [FULL, ddpm.respaced(FULL, 10)], ids=len)
def test_the_posterior_follows_from_bayes_rule(schedule):
    x, x_t = images(2)
    step = STEPS.clamp(max=len(schedule) - 1)
    before, beta = (table[step].view(-1, 1, 1, 1) for table in (schedule.previous_alpha_bars_S, schedule.betas_S))
    # x_{t-1} ~ N(sqrt(before) x, 1 - before), seen through x_t ~ N(sqrt(1 - beta) x_{t-1}, beta).
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x / (1 - before) + (1 - beta).sqrt() * x_t / beta) / precision
    posterior = ddpm.posterior(schedule, x, x_t, step)
    torch.testing.assert_close(posterior.mean, mean)
    torch.testing.assert_close(posterior.log_variance.exp(), 1 / precision)


def test_step_0_has_the_data_for_mean_and_the_next_variance():
    x, x_t = images(2)
    posterior = ddpm.posterior(FULL, x, x_t, torch.zeros(len(x), dtype=torch.long))
    torch.testing.assert_close(posterior.mean, x)
    expected = FULL.posterior_variances_S[1].log().expand(len(x), 1, 1, 1)
    torch.testing.assert_close(posterior.log_variance, expected)


def test_the_learned_range_runs_from_the_posterior_variance_to_beta():
    epsilon, x_t = images(2)
    beta, smallest = (table[STEPS].view(-1, 1, 1, 1) for table in (FULL.betas_S, FULL.posterior_variances_S))
    for place, variance in ((-1.0, smallest), (1.0, beta), (0.0, (beta * smallest).sqrt())):
        q = ddpm.reverse(FULL, epsilon, torch.full_like(x_t, place), x_t, STEPS)
        torch.testing.assert_close(q.log_variance.exp(), variance.expand_as(x_t))
    fixed = ddpm.reverse(FULL, epsilon, None, x_t, STEPS)
    torch.testing.assert_close(fixed.log_variance.exp(), smallest)


def test_the_bound_is_the_divergence_in_bits_per_dimension():
    x, x_t, epsilon, place = images(4)
    q = ddpm.reverse(FULL, epsilon, place.tanh(), x_t, STEPS)
    p = ddpm.posterior(FULL, x, x_t, STEPS)
    nats = kl_divergence(*(Normal(g.mean, (g.log_variance / 2).exp().expand_as(x)) for g in (p, q)))
    bits = nats.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(ddpm.variational_bound(FULL, x, x_t, q, STEPS), bits)


def test_a_perfect_network_adds_nothing_to_the_bound():
    x, noise = images(2)
    output = torch.cat((noise, torch.full_like(noise, -1)), dim=1)
    losses = ddpm.ddpm_losses(output, x, noise, STEPS, FULL)
    assert losses.mse.tolist() == [0] * len(STEPS)
    assert losses.vb.abs().max() < 1e-5


@pytest.mark.parametrize(("mean", "deviation"), [(0.1, 0.02), (-0.97, 0.05), (0.6, 0.5), (2.0, 0.3)])
def test_the_bins_of_all_256_values_share_a_probability_of_1(mean, deviation):
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    q = ddpm.Gaussian(torch.tensor(mean), torch.tensor(2 * math.log(deviation)))
    assert (-ddpm.discretised_nll(values, q)).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_the_first_step_counts_the_probability_of_the_bin():
    x, x_t, epsilon, place = images(4, channels=1)
    x, step = (x.tanh() * 127.5).round() / 127.5, torch.zeros(len(x), dtype=torch.long)
    x_t = x + 0.003 * x_t  # the approximate normal cdf is a few percent off in its tails
    q = ddpm.reverse(FULL, 0.3 * epsilon, place.tanh(), x_t, step)
    exact = Normal(q.mean, (q.log_variance / 2).exp())
    probability = exact.cdf(x + 1 / 255) - exact.cdf(x - 1 / 255)
    bits = -probability.log2().flatten(1).mean(1)
    torch.testing.assert_close(ddpm.variational_bound(FULL, x, x_t, q, step), bits, rtol=0.01, atol=0)


def test_the_bound_teaches_the_variance_alone_and_the_square_epsilon_alone():
    x, noise = images(2, channels=3)
    output = torch.randn(len(x), 6, 3, 3, dtype=torch.float64, requires_grad=True)
    step = torch.tensor([0, 1, 17, 250, 999])
    losses = ddpm.ddpm_losses(output, x, noise, step, FULL)
    (of_vb,) = torch.autograd.grad(losses.vb.sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(losses.mse.sum(), output)
    assert of_vb[:, :3].abs().max() == 0 < of_vb[:, 3:].abs().max()
    assert of_mse[:, 3:].abs().max() == 0
    torch.testing.assert_close(of_mse[:, :3], 2 * (output[:, :3] - noise) / 27, check_dtype=False)


def test_without_learned_variance_the_loss_is_the_square():
    x, noise, output = images(3)
    losses = ddpm.ddpm_losses(output, x, noise, STEPS, FULL)
    torch.testing.assert_close(losses.mse, ((output - noise) ** 2).mean((1, 2, 3)).float())
    assert losses.vb.tolist() == [0] * len(STEPS)


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match="3 channels; give 2, or 4"):
        ddpm.split(torch.zeros(1, 3, 2, 2), channels=2)


def alpha_bar(number):
    return FULL.alpha_bars_S[number]


def normal_model(schedule, mean, variance):
    """The network that is right about normal data: E[epsilon | x_t], and the variance of x_{t-1} given x_t."""
    place_of = {int(number): place for place, number in enumerate(schedule.timesteps_S)}

    def model(x, number):
        step = place_of[int(number)]
        after, before, beta = alpha_bar(number), schedule.previous_alpha_bars_S[step], schedule.betas_S[step]
        total = after * variance + 1 - after
        epsilon = (1 - after).sqrt() * (x - after.sqrt() * mean) / total
        log_variance = -(1 / (before * variance + 1 - before) + (1 - beta) / beta).log()
        low, high = schedule.posterior_log_variances_S[step], beta.log()
        return torch.cat((epsilon, torch.full_like(x, 2 * float((log_variance - low) / (high - low)) - 1)), dim=1)

    return model


@pytest.mark.parametrize("steps", [10, 200])
def test_ancestral_sampling_of_normal_data_has_their_moments(steps):
    generator = torch.Generator().manual_seed(0)
    count, mean, deviation = 20_000, 1.5, 0.5
    schedule = ddpm.respaced(FULL, steps)
    # Of the draws as of the start, in float64: the last steps' variances lie close together.
    draws = torch.randn(steps + 1, count, 1, generator=generator, dtype=torch.float64)
    model = normal_model(schedule, mean, deviation**2)
    x = ddpm.ddpm_ancestral(model, draws[-1], schedule, lambda k: draws[k])
    assert x.mean().item() == pytest.approx(mean, abs=4 * deviation / count**0.5)
    assert x.std().item() == pytest.approx(deviation, rel=0.02)


def single_image_model(image, seen=None):
    """The network that knows that all data are one image; it records the numbers it is told."""

    def model(x, number):
        if seen is not None:
            seen.append(int(number))
        return (x - alpha_bar(number).sqrt() * image) / (1 - alpha_bar(number)).sqrt()

    return model


def test_ddim_finds_a_single_image_in_any_number_of_steps():
    image, start = images(2)
    for steps in (1, 2, 10):
        x = ddpm.ddim(single_image_model(image), start, ddpm.respaced(FULL, steps))
        torch.testing.assert_close(x, image, rtol=0, atol=1e-9)


def test_ddim_keeps_the_noise_that_it_finds():
    """Deterministic DDIM moves x_t along sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) epsilon with both fixed."""
    image, noise = images(2)
    points = []
    model = single_image_model(image)
    start = ddpm.noised(FULL, image, noise, torch.tensor(999))
    ddpm.ddim(lambda x, number: points.append(x) or model(x, number), start, ddpm.respaced(FULL, 4))
    expected = [ddpm.noised(FULL, image, noise, torch.tensor(number)) for number in (999, 666, 333, 0)]
    torch.testing.assert_close(points, expected)


def test_samplers_tell_the_network_the_numbers_it_was_trained_on():
    image, start = images(2)
    seen, drawn = [], []
    model, ten = single_image_model(image, seen), ddpm.respaced(FULL, 10)
    ddpm.ddpm_ancestral(model, start, ten, lambda k: drawn.append(k) or torch.zeros_like(start))
    ddpm.ddim(model, start, ten)
    assert seen == list(range(999, -1, -111)) * 2
    assert drawn == list(range(9))


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_posterior_variance():
    image, start = images(2)
    draws, ten = images(9), ddpm.respaced(FULL, 10)

    def model(x, number):
        return torch.sin(single_image_model(image)(x, number))

    ancestral = ddpm.ddpm_ancestral(model, start, ten, lambda k: draws[k])
    torch.testing.assert_close(ddpm.ddim(model, start, ten, eta=1.0, noise=lambda k: draws[k]), ancestral)


def test_ddim_leaves_a_learned_variance_out():
    image, start = images(2)
    model, ten = single_image_model(image), ddpm.respaced(FULL, 10)
    wider = ddpm.ddim(lambda x, number: torch.cat((model(x, number), torch.randn_like(x)), dim=1), start, ten)
    torch.testing.assert_close(wider, ddpm.ddim(model, start, ten), rtol=0, atol=0)


def test_ddim_with_eta_needs_noise():
    with pytest.raises(ValueError, match="there is no noise"):
        ddpm.ddim(single_image_model(torch.zeros(1, 1)), torch.zeros(1, 1), FULL, eta=0.5)
