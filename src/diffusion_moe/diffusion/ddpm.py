"""Discrete diffusion of DDPM (arXiv 2006.11239), iDDPM (arXiv 2102.09672), ADM and DiT: schedule, losses, samplers.

Step 0 is next to the data and the last step next to noise. A network predicts epsilon, (B, C, H, W), or epsilon and a
learned variance, (B, 2C, H, W). A `step` is an index in the schedule, (B,) or a scalar; the network receives
`schedule.timesteps_S[step]`, which is the same for a full schedule. Shape suffixes: S steps of the schedule, B images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
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
class Table:
    """A number for each step, float64 on the CPU, (S,), copied once to each device that reads it."""

    values_S: Tensor
    copies: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def at(self, step: Tensor, like: Tensor) -> Tensor:
        """Numbers of the steps, shaped to multiply `like`, in its dtype or float32 if that is larger."""
        key = (step.device, torch.promote_types(like.dtype, torch.float32))
        if key not in self.copies:
            with torch.inference_mode(False):  # autograd may need the copy later
                self.copies[key] = self.values_S.to(key[1]).to(key[0])
        return spread(self.copies[key][step], like)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Variances of the steps, float64, (S,); alpha is 1 - beta and alpha_bar their running product."""

    betas_S: Tensor
    timesteps_S: Tensor
    """Index of each step in the schedule that the network was trained on, which it receives, int64."""

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
        """Variance of x_{t-1} given x_t and x_0; 0 for step 0."""
        # DDPM eq. 7.
        return self.betas_S * (1 - self.previous_alpha_bars_S) / (1 - self.alpha_bars_S)

    @cached_property
    def posterior_log_variances_S(self) -> Tensor:
        """Logarithms of the posterior variances; step 0 has that of step 1, as its own is minus infinity."""
        if len(self) == 1:
            return self.betas_S.log()
        return torch.cat((self.posterior_variances_S[1:2], self.posterior_variances_S[1:])).log()

    # DDPM eq. 4: x_t = data * x_0 + noise * epsilon.
    @cached_property
    def data(self) -> Table:
        return Table(self.alpha_bars_S.sqrt())

    @cached_property
    def noise(self) -> Table:
        return Table((1 - self.alpha_bars_S).sqrt())

    # DDPM eq. 15, solved for x_0 = inverse_data * x_t - inverse_noise * epsilon. Divided in float64, as alpha_bar falls
    # to 4e-5.
    @cached_property
    def inverse_data(self) -> Table:
        return Table((1 / self.alpha_bars_S).sqrt())

    @cached_property
    def inverse_noise(self) -> Table:
        return Table((1 / self.alpha_bars_S - 1).sqrt())

    # DDPM eq. 7: the mean of x_{t-1} is posterior_data * x_0 + posterior_noisy * x_t.
    @cached_property
    def posterior_data(self) -> Table:
        return Table(self.previous_alpha_bars_S.sqrt() * self.betas_S / (1 - self.alpha_bars_S))

    @cached_property
    def posterior_noisy(self) -> Table:
        return Table((1 - self.betas_S).sqrt() * (1 - self.previous_alpha_bars_S) / (1 - self.alpha_bars_S))

    @cached_property
    def posterior_log_variances(self) -> Table:
        return Table(self.posterior_log_variances_S)

    @cached_property
    def log_betas(self) -> Table:
        return Table(self.betas_S.log())


class Gaussian(NamedTuple):
    """A normal distribution of each value of an image; both broadcast to (B, C, H, W)."""

    mean: Tensor
    log_variance: Tensor


class Losses(NamedTuple):
    """Terms of iDDPM's hybrid loss, which is their sum, each (B,), float32."""

    mse: Tensor
    """Mean squared error of epsilon."""
    vb: Tensor
    """Term of the variational bound, bits per dimension, with a gradient for the variance only."""


@cache
def linear_schedule(steps: int = DDPM_STEPS) -> Schedule:
    """Betas from 1e-4 to 0.02 in equal steps (DDPM, section 4)."""
    return Schedule(torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), torch.arange(steps))


def respaced(schedule: Schedule, steps: int) -> Schedule:
    """Schedule of `steps` of the steps, evenly spaced, with the first and the last (iDDPM, section 4).

    Raises:
        ValueError: fewer than one step, or more than there are.
    """
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"steps is {steps}; the schedule has {len(schedule)}, choose from 1 to that")
    last = len(schedule) - 1
    # A single step has to be the last: sampling starts in pure noise.
    kept = torch.linspace(0, last, steps, dtype=torch.float64).round().long() if steps > 1 else torch.tensor([last])
    alpha_bars = schedule.alpha_bars_S[kept]
    # iDDPM eq. 19: betas with the same alpha_bars.
    betas = 1 - alpha_bars / torch.cat((alpha_bars.new_ones(1), alpha_bars[:-1]))
    return Schedule(betas, schedule.timesteps_S[kept])


def noised(schedule: Schedule, x: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    """Sample x_t given the data x_0, after the noise of steps 0 to `step`; x and noise (B, C, H, W)."""
    # DDPM eq. 4.
    return schedule.data.at(step, x) * x + schedule.noise.at(step, x) * noise


def denoised(schedule: Schedule, x_t: Tensor, epsilon: Tensor, step: Tensor) -> Tensor:
    """Data x_0 from x_t and its noise epsilon."""
    # DDPM eq. 15.
    return schedule.inverse_data.at(step, x_t) * x_t - schedule.inverse_noise.at(step, x_t) * epsilon


def posterior(schedule: Schedule, x: Tensor, x_t: Tensor, step: Tensor) -> Gaussian:
    """Distribution of x_{t-1} given x_t and the data x_0; at step 0 its log variance is that of step 1."""
    # DDPM eq. 7.
    mean = schedule.posterior_data.at(step, x_t) * x + schedule.posterior_noisy.at(step, x_t) * x_t
    return Gaussian(mean, schedule.posterior_log_variances.at(step, x_t))


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Split an output into epsilon and iDDPM's v in [-1, 1], (B, C, H, W) each; v is None if no variance is learned.

    Raises:
        ValueError: the output has neither C nor 2C channels.
    """
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(f"the output has {output.shape[1]} channels; give {channels}, or {2 * channels} with variance")
    return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None


def reverse(schedule: Schedule, epsilon: Tensor, v: Tensor | None, x_t: Tensor, step: Tensor) -> Gaussian:
    """The network's distribution of x_{t-1} given x_t; epsilon and v come from `split`.

    The learned variance is between the posterior's (v = -1) and beta (v = 1); without v it is the posterior's.
    """
    mean, smallest = posterior(schedule, denoised(schedule, x_t, epsilon, step), x_t, step)
    if v is None:
        return Gaussian(mean, smallest)
    # iDDPM eq. 15. No torch.lerp: a sampler's scalars stay on the CPU.
    largest = schedule.log_betas.at(step, v)
    return Gaussian(mean, smallest + (v + 1) / 2 * (largest - smallest))


def kl_divergence(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p ‖ q) in nats, elementwise."""
    ratio = (p.log_variance - q.log_variance).exp()
    return (ratio - 1 + q.log_variance - p.log_variance + (p.mean - q.mean).square() * (-q.log_variance).exp()) / 2


def _normal_cdf(z: Tensor) -> Tensor:
    # The tanh approximation of GELU (arXiv 1606.08415), exact to 3e-4, as in the published losses. The exact function
    # would change them by some thousandths.
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def discretised_nll(x: Tensor, q: Gaussian) -> Tensor:
    """Negative log likelihood in nats, elementwise, of 8-bit data x in [-1, 1] under q; bins are 2/255 wide."""
    # DDPM eq. 13: the outermost bins reach to infinity.
    inverse_scale = (-q.log_variance / 2).exp()
    upper = _normal_cdf((x - q.mean + 1 / 255) * inverse_scale)
    lower = _normal_cdf((x - q.mean - 1 / 255) * inverse_scale)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    # A lower bound of the probability keeps the logarithm and its gradient finite.
    return -(upper - lower).clamp(min=1e-12).log()


def variational_bound(schedule: Schedule, x: Tensor, x_t: Tensor, q: Gaussian, step_B: Tensor) -> Tensor:
    """Term of the bound on -log p(x) for step (B,), in bits per dimension, (B,); q comes from `reverse`."""
    # DDPM eq. 5: L_{t-1} for t > 0, L_0 for the last step to the data.
    kl = kl_divergence(posterior(schedule, x, x_t, step_B), q)
    nats = torch.where(spread(step_B == 0, x), discretised_nll(x, q), kl)
    return nats.flatten(1).mean(dim=1) / math.log(2)


def ddpm_losses(output: Tensor, x: Tensor, noise: Tensor, step_B: Tensor, schedule: Schedule) -> Losses:
    """iDDPM's hybrid loss of a network's output for x_t = noised(schedule, x, noise, step_B).

    Without learned variance vb is zero.

    Args:
        output: (B, C or 2C, H, W).
        x: data, (B, C, H, W).
        noise: (B, C, H, W).
        step_B: steps, int64.
        schedule: the full schedule.
    """
    x, noise = x.float(), noise.float()
    epsilon, v = split(output.float(), x.shape[1])
    mse = mean_square(epsilon - noise)
    if v is None:
        return Losses(mse, torch.zeros_like(mse))
    x_t = noised(schedule, x, noise, step_B)
    # iDDPM section 3.1: the bound teaches the variance alone.
    q = reverse(schedule, epsilon.detach(), v, x_t, step_B)
    return Losses(mse, variational_bound(schedule, x, x_t, q, step_B))


def _backwards(schedule: Schedule) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Call number of the noise, step, and timestep for the network, from noise to data."""
    for i, step in enumerate(reversed(range(len(schedule)))):
        yield i, torch.tensor(step), schedule.timesteps_S[step]


def ddpm_ancestral(model: Model, x: Tensor, schedule: Schedule, noise: Noise) -> Tensor:
    """Sample from the reverse process, without clipping: S evaluations, S - 1 calls of `noise` (DDPM, algorithm 2).

    Args:
        model: maps x and a timestep, a scalar int64 tensor on the CPU, to (B, C or 2C, H, W), guidance included.
        x: standard normal noise, (B, C, H, W).
        schedule: the steps to take.
        noise: standard normal noise like x.
    """
    for i, step, timestep in _backwards(schedule):
        epsilon, v = split(model(x, timestep).to(x.dtype), x.shape[1])
        q = reverse(schedule, epsilon, v, x, step)
        x = q.mean if step == 0 else q.mean + (q.log_variance / 2).exp() * noise(i)
    return x


def ddim(model: Model, x: Tensor, schedule: Schedule, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """Sample by DDIM (arXiv 2010.02502): S evaluations; a learned variance is ignored.

    Args:
        model: as for `ddpm_ancestral`.
        x: standard normal noise, (B, C, H, W).
        schedule: the steps to take.
        eta: factor of the noise; 0 is deterministic, 1 is DDPM with the posterior's variance.
        noise: standard normal noise like x; needed unless eta is 0.

    Raises:
        ValueError: eta is not 0 and there is no noise.
    """
    if eta != 0 and noise is None:
        raise ValueError(f"eta is {eta}, but there is no noise; give noise, or eta 0")
    before, betas = schedule.previous_alpha_bars_S, schedule.betas_S
    # DDIM eq. 16; 1 - alpha_bar_t / alpha_bar_{t-1} is beta. Step 0 adds no noise, since alpha_bar_{-1} is 1.
    sigmas = eta * ((1 - before) / (1 - schedule.alpha_bars_S) * betas).sqrt()
    to_data, to_noise, fresh = Table(before.sqrt()), Table((1 - before - sigmas.square()).sqrt()), Table(sigmas)
    for i, step, timestep in _backwards(schedule):
        epsilon, _ = split(model(x, timestep).to(x.dtype), x.shape[1])
        data = denoised(schedule, x, epsilon, step)
        # DDIM eq. 12.
        x = to_data.at(step, x) * data + to_noise.at(step, x) * epsilon
        if noise is not None and sigmas[step] > 0:
            x = x + fresh.at(step, x) * noise(i)
    return x
