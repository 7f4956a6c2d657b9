"""The discrete diffusion of DDPM (arXiv 2006.11239), iDDPM (arXiv 2102.09672), ADM and DiT: schedule, losses, samplers.

Step 0 lies next to the data and the last step next to noise. A network answers with epsilon, (B, C, H, W), or with
epsilon and a learned variance, (B, 2C, H, W). Shape suffixes: S steps of the schedule, B images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .guidance import Model
from .loss import mean_square
from .path import Noise, spread

DDPM_STEPS = 1000
"""Steps from data to noise in training."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """Variances of the steps, float64, (S,); alpha is 1 - beta and alpha_bar their running product."""

    betas_S: Tensor
    numbers_S: Tensor
    """What the network is told of each step: its number in the schedule that it was trained on, int64."""

    def __len__(self) -> int:
        return len(self.betas_S)

    @cached_property
    def alpha_bars_S(self) -> Tensor:
        return (1 - self.betas_S).cumprod(dim=0)

    @cached_property
    def previous_alpha_bars_S(self) -> Tensor:
        """alpha_bar one step nearer to the data, 1 for step 0."""
        return torch.cat((self.alpha_bars_S.new_ones(1), self.alpha_bars_S[:-1]))

    @cached_property
    def posterior_variances_S(self) -> Tensor:
        """Of x_{t-1} given x_t and x_0; 0 for step 0."""
        # DDPM eq. 7.
        return self.betas_S * (1 - self.previous_alpha_bars_S) / (1 - self.alpha_bars_S)

    @cached_property
    def posterior_log_variances_S(self) -> Tensor:
        """Logarithms of the posterior variances, with step 1's also for step 0, whose own is minus infinity."""
        if len(self) == 1:
            return self.betas_S.log()
        return torch.cat((self.posterior_variances_S[1:2], self.posterior_variances_S[1:])).log()


class Gaussian(NamedTuple):
    """A normal distribution for each number of an image; both broadcast to (B, C, H, W)."""

    mean: Tensor
    log_variance: Tensor


class Losses(NamedTuple):
    """Terms of iDDPM's hybrid loss, to be added, each (B,), float32."""

    mse: Tensor
    """Mean squared error of epsilon."""
    vb: Tensor
    """Term of the variational bound, bits per dimension; its gradient reaches the variance only."""


@cache
def linear_schedule(steps: int = DDPM_STEPS) -> Schedule:
    """Betas from 1e-4 to 0.02 in equal steps (DDPM, section 4)."""
    return Schedule(torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), torch.arange(steps))


def respaced(schedule: Schedule, steps: int) -> Schedule:
    """`steps` of the schedule's steps, evenly spaced with the first and the last among them (iDDPM, section 4).

    Raises:
        ValueError: fewer than one step, or more than there are.
    """
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"steps is {steps}; the schedule has {len(schedule)}, choose from 1 to that")
    last = len(schedule) - 1
    # One step alone has to be the last: sampling starts in pure noise.
    kept = torch.linspace(0, last, steps, dtype=torch.float64).round().long() if steps > 1 else torch.tensor([last])
    alpha_bars = schedule.alpha_bars_S[kept]
    # iDDPM eq. 19: betas that lead through the same alpha_bars.
    betas = 1 - alpha_bars / torch.cat((alpha_bars.new_ones(1), alpha_bars[:-1]))
    return Schedule(betas, schedule.numbers_S[kept])


def _at(table_S: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """Entries of a float64 table at steps (B,) or one, ready to multiply `like`: in its dtype, but at least float32."""
    table_S = table_S.to(torch.promote_types(like.dtype, torch.float32)).to(step.device)
    return spread(table_S[step], like)


def noised(schedule: Schedule, x: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    """x_t given x_0: data after the noise of steps 0 to `step`.

    Args:
        schedule: noise levels.
        x: data, (B, C, H, W).
        noise: standard normal, (B, C, H, W).
        step: indices into the schedule, (B,) or a scalar. So in all of this file; the network takes
            `schedule.numbers_S[step]`, which for a full schedule is the same.
    """
    # DDPM eq. 4.
    return _at(schedule.alpha_bars_S.sqrt(), step, x) * x + _at((1 - schedule.alpha_bars_S).sqrt(), step, x) * noise


def denoised(schedule: Schedule, x_t: Tensor, epsilon: Tensor, step: Tensor) -> Tensor:
    """The data x_0 that noise epsilon turned into x_t."""
    # DDPM eq. 15. Divided out in float64, as alpha_bar falls to 4e-5.
    scale, share = (1 / schedule.alpha_bars_S).sqrt(), (1 / schedule.alpha_bars_S - 1).sqrt()
    return _at(scale, step, x_t) * x_t - _at(share, step, x_t) * epsilon


def posterior(schedule: Schedule, x: Tensor, x_t: Tensor, step: Tensor) -> Gaussian:
    """The distribution of x_{t-1} given x_t and the data x_0; at step 0 its log variance is that of step 1."""
    # DDPM eq. 7.
    before, after = schedule.previous_alpha_bars_S, schedule.alpha_bars_S
    of_data = before.sqrt() * schedule.betas_S / (1 - after)
    of_noisy = (1 - schedule.betas_S).sqrt() * (1 - before) / (1 - after)
    mean = _at(of_data, step, x_t) * x + _at(of_noisy, step, x_t) * x_t
    return Gaussian(mean, _at(schedule.posterior_log_variances_S, step, x_t))


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Epsilon, (B, C, H, W), and where in its range the log variance is, alike, from -1 to 1; None if not learned.

    Raises:
        ValueError: the output has neither C nor 2C channels.
    """
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(f"the output has {output.shape[1]} channels; give {channels}, or {2 * channels} with variance")
    return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None


def reverse(schedule: Schedule, epsilon: Tensor, place: Tensor | None, x_t: Tensor, step: Tensor) -> Gaussian:
    """The network's distribution of x_{t-1} given x_t; what it answered comes from `split`.

    The variance is learned between the posterior's (place -1) and beta (place 1), or, without place, the posterior's.
    """
    mean, smallest = posterior(schedule, denoised(schedule, x_t, epsilon, step), x_t, step)
    if place is None:
        return Gaussian(mean, smallest)
    # iDDPM eq. 15. No torch.lerp: a sampler's scalars stay on the CPU.
    largest = _at(schedule.betas_S.log(), step, place)
    return Gaussian(mean, smallest + (place + 1) / 2 * (largest - smallest))


def kl_divergence(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p ‖ q) in nats, elementwise."""
    ratio = (p.log_variance - q.log_variance).exp()
    return (ratio - 1 + q.log_variance - p.log_variance + (p.mean - q.mean).square() * (-q.log_variance).exp()) / 2


def _normal_cdf(z: Tensor) -> Tensor:
    # The tanh form known from GELU (arXiv 1606.08415), exact to 3e-4. The published losses use it; the exact function
    # would move them by some thousandths.
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def discretised_nll(x: Tensor, q: Gaussian) -> Tensor:
    """Negative log likelihood in nats, elementwise, of 8-bit data x in [-1, 1]: of its bin, 2/255 wide, under q."""
    # DDPM eq. 13: the outermost bins reach to infinity.
    inverse_scale = (-q.log_variance / 2).exp()
    upper = _normal_cdf((x - q.mean + 1 / 255) * inverse_scale)
    lower = _normal_cdf((x - q.mean - 1 / 255) * inverse_scale)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    # The least probability that a bin may have, so that the logarithm and its gradient stay finite.
    return -(upper - lower).clamp(min=1e-12).log()


def variational_bound(schedule: Schedule, x: Tensor, x_t: Tensor, q: Gaussian, step_B: Tensor) -> Tensor:
    """The term of the bound on -log p(x) that step (B,) adds, in bits per dimension, (B,).

    Args:
        q: the network's distribution of x_{t-1}, from `reverse`.
    """
    # DDPM eq. 5: L_{t-1} for t > 0, L_0 for the last step to the data.
    kl = kl_divergence(posterior(schedule, x, x_t, step_B), q)
    nats = torch.where(spread(step_B == 0, x), discretised_nll(x, q), kl)
    return nats.flatten(1).mean(dim=1) / math.log(2)


def ddpm_losses(output: Tensor, x: Tensor, noise: Tensor, step_B: Tensor, schedule: Schedule) -> Losses:
    """iDDPM's hybrid loss of a network's answer to x_t = noised(schedule, x, noise, step_B).

    Without learned variance vb is zero.

    Args:
        output: (B, C or 2C, H, W). x, noise: (B, C, H, W). step_B: places in the schedule, int64, (B,).
    """
    x, noise = x.float(), noise.float()
    epsilon, place = split(output.float(), x.shape[1])
    mse = mean_square(epsilon - noise)
    if place is None:
        return Losses(mse, torch.zeros_like(mse))
    x_t = noised(schedule, x, noise, step_B)
    # iDDPM section 3.1: the bound teaches the variance alone.
    q = reverse(schedule, epsilon.detach(), place, x_t, step_B)
    return Losses(mse, variational_bound(schedule, x, x_t, q, step_B))


def _backwards(schedule: Schedule) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of the draw, place in the schedule, and the step's number for the network, from noise to data."""
    for draw, step in enumerate(reversed(range(len(schedule)))):
        yield draw, torch.tensor(step), schedule.numbers_S[step]


def ddpm_ancestral(model: Model, x: Tensor, schedule: Schedule, noise: Noise) -> Tensor:
    """Sampling from the reverse process, without clipping: S evaluations, S - 1 draws of noise (DDPM, algorithm 2).

    Args:
        model: (x, the step's number, a scalar int64 tensor on the CPU) to (B, C or 2C, H, W), guidance included.
        x: standard normal noise, (B, C, H, W).
    """
    for draw, step, number in _backwards(schedule):
        epsilon, place = split(model(x, number).to(x.dtype), x.shape[1])
        q = reverse(schedule, epsilon, place, x, step)
        x = q.mean if step == 0 else q.mean + (q.log_variance / 2).exp() * noise(draw)
    return x


def ddim(model: Model, x: Tensor, schedule: Schedule, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """DDIM (arXiv 2010.02502): S evaluations; a learned variance is left out. Model and x as for `ddpm_ancestral`.

    Args:
        eta: share of the noise; 0 is deterministic and draws none, 1 is DDPM with the posterior's variance.

    Raises:
        ValueError: eta is not 0 and there is no noise.
    """
    if eta != 0 and noise is None:
        raise ValueError(f"eta is {eta}, but there is no noise; give noise, or eta 0")
    before, betas = schedule.previous_alpha_bars_S, schedule.betas_S
    # DDIM eq. 16; 1 - alpha_bar_t / alpha_bar_{t-1} is beta. Step 0 draws no noise, since alpha_bar_{-1} is 1.
    sigmas = eta * ((1 - before) / (1 - schedule.alpha_bars_S) * betas).sqrt()
    for draw, step, number in _backwards(schedule):
        epsilon, _ = split(model(x, number).to(x.dtype), x.shape[1])
        data = denoised(schedule, x, epsilon, step)
        # DDIM eq. 12.
        x = _at(before.sqrt(), step, x) * data + _at((1 - before - sigmas.square()).sqrt(), step, x) * epsilon
        if noise is not None and sigmas[step] > 0:
            x = x + _at(sigmas, step, x) * noise(draw)
    return x
