"""Images from a model: image number i is a function of (seed, i), whatever the batch size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import DDPM_SOLVERS, FLOW_SOLVERS, EvaluationConfig, ModelConfig
from ..data.latent_space import LatentScaling
from ..diffusion.ddpm import DDPM_STEPS, ddim, ddpm_ancestral, linear_schedule, respaced
from ..diffusion.guidance import Model, guided
from ..diffusion.prediction import convert
from ..diffusion.solvers import SOLVERS, Counted, dopri5, even_times, sde
from ..distributed import from_main, to_device
from ..log import Log
from ..models import Backbone
from ..moe import RoutingReport, limit_capacity, scale_thresholds
from ..moe.precision import choose_precision
from ..randomness import normal
from ..text import TextFeatures
from .acceleration import Network, accelerated
from .loading import best_device

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

DECODED_AT_A_TIME = 32
"""Images: a VAE's decoder needs far more memory for each than the model."""


def class_schedule(num_samples: int, num_classes: int) -> Tensor | None:
    """Classes 0, 1, ... in turn, int64, (S,); None for an unconditional model."""
    return torch.arange(num_samples) % num_classes if num_classes else None


class Prompts(NamedTuple):
    """Text features of images, a row an image."""

    text: TextFeatures
    negative: TextFeatures
    """Prompts that guidance leads away from; a row without a token: the model's null prompt."""

    def rows(self, indices: Tensor, device: torch.device) -> Prompts:
        """The prompts of some of the images, on a device."""
        return Prompts(self.text.rows(indices).to(device), self.negative.rows(indices).to(device))

    def padded_to(self, length: int) -> Prompts:
        """The same prompts, padded to at least `length` tokens."""
        return Prompts(*(text.padded_to(max(length, text.mask.shape[1])) for text in self))


class PromptRows(Protocol):
    """Anything that knows the prompt of each image."""

    def rows(self, indices: Tensor, device: torch.device) -> Prompts:
        """The prompts of some of the images, by their numbers."""


@dataclass
class SamplingStats:
    """The cost of sampling so far."""

    batches: int = 0
    evaluations: int = 0
    """Calls of the guided model, summed over batches; with guidance, a call runs the network twice."""
    served: Tensor | float = 0
    """Pairs of token and expert, summed over MoE layers and network evaluations."""
    offered: int = 0
    """Tokens that routers saw, summed likewise."""
    dropped: Tensor | float | None = None
    """Choices that exceeded a capacity limit, summed likewise; None without a limit."""

    def note(self, reports: tuple[RoutingReport, ...]) -> None:
        """Count what one network evaluation routed."""
        if reports:  # tensors are summed where they are: reading one would wait for the GPU
            self.served = self.served + torch.stack([report.counts_E.sum() for report in reports]).sum()
            self.offered += sum(report.num_tokens for report in reports)
        for dropped in (report.dropped for report in reports if report.dropped is not None):
            self.dropped = dropped + (0 if self.dropped is None else self.dropped)

    def totals(self) -> dict[str, float]:
        """The counts as plain numbers."""
        return {name: float(value) for name, value in vars(self).items() if value is not None}

    def add(self, totals: dict[str, float]) -> None:
        """Add the totals of other stats."""
        for name, value in totals.items():
            setattr(self, name, value + (getattr(self, name) or 0))

    def summary(self) -> dict[str, float | None]:
        """Evaluations an image, routed experts a token on average (null without experts), and the share dropped."""
        served = float(self.served)
        numbers: dict[str, float | None] = {
            "function_evaluations": self.evaluations / max(1, self.batches),
            "average_capacity": served / self.offered if self.offered else None,
        }
        if self.dropped is not None:
            numbers["dropped_share"] = float(self.dropped) / max(1.0, served + float(self.dropped))
        return numbers


def with_precision(settings: EvaluationConfig, log: Log) -> EvaluationConfig:
    """Settings with a precision chosen, that of the main process for all; logs it."""
    chosen = from_main(choose_precision(settings.precision, best_device()))
    log(f"computing in {chosen}")
    return replace(settings, precision=chosen.precision)


def check_solver(config: ModelConfig, settings: EvaluationConfig) -> None:
    """Raise a ValueError for a solver or guidance that does not fit the model."""
    fitting = FLOW_SOLVERS if config.process == "flow" else DDPM_SOLVERS
    if settings.solver not in fitting:
        raise ValueError(
            f"solver is {settings.solver}, but the model's process is {config.process}; choose {' or '.join(fitting)}"
        )
    if config.process == "ddpm" and settings.guidance_interval != (0.0, 1.0):
        raise ValueError(
            f"guidance_interval is {settings.guidance_interval}, but ddpm models have no times t; remove it"
        )
    if settings.guidance_scale != 1 and config.num_classes and not config.guidable:
        raise ValueError(
            f"guidance_scale is {settings.guidance_scale}, but the model has no null class; set it to 1 for no guidance"
        )
    if settings.path_drop_guidance and not config.fusion:
        raise ValueError("path_drop_guidance is true, but the model has no fusion (model.fusion); remove it")


@torch.no_grad()
def generate_batches(
    model: Backbone,
    labels: Tensor | None,
    num_samples: int,
    settings: EvaluationConfig,
    vae: AutoencoderKL | None = None,
    stats: SamplingStats | None = None,
    first: int = 0,
    *,
    prompts: PromptRows | None = None,
    size: tuple[int, int] | None = None,
    network: Network | None = None,
) -> Iterator[Tensor]:
    """Generate images `first` to num_samples - 1, a batch at a time.

    Args:
        model: in eval mode; its device is used.
        labels: class of each image, int64, (S,).
        num_samples: the last image's number, plus 1.
        settings: solver, guidance and batch size.
        vae: decodes what the model generates.
        stats: filled with what it cost.
        first: number of the first image.
        prompts: of each image, for a model with text.
        size: height and width in the model's space; None: sample_size.
        network: what `accelerated` made of this model and these settings; None: made here.

    Yields:
        NCHW, float32, [-1, 1] by convention but not clipped, on the CPU.

    Raises:
        ValueError: see `check_solver` and `acceleration.check_acceleration`.
    """
    config, stats = model.settings, stats or SamplingStats()
    check_solver(config, settings)
    if (prompts is None) == bool(config.text_dim):
        raise ValueError(f"prompts are {'missing' if prompts is None else 'given'}, but text_dim is {config.text_dim}")
    network = network or accelerated(model, settings)
    shape = (config.in_channels, *(size or (config.sample_size, config.sample_size)))
    scale_thresholds(model, settings.threshold_scale)
    limit_capacity(model, settings.capacity_limit)
    try:
        for samples in torch.arange(first, num_samples).split(settings.batch_size):
            classes = None if labels is None else to_device(labels[samples], model.device)
            texts = None if prompts is None else prompts.rows(samples, model.device)
            if texts is not None:  # the model would pad them too; so a captured graph meets one length
                texts = texts.padded_to(config.text_length)
            call = Counted(guided_network(config, network, classes, texts, settings, stats))
            x = solve(call, config, settings, to_device(samples, model.device), shape)
            stats.batches += 1
            stats.evaluations += call.evaluations
            yield (x if vae is None else decode(vae, x)).float().cpu()
    finally:
        scale_thresholds(model, 1.0)
        limit_capacity(model, None)


def solve(
    call: Model, config: ModelConfig, settings: EvaluationConfig, samples: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Integrate `call` from the noise of these image numbers to samples, (B, C, H, W) in the model's space."""

    def noise(step: int) -> Tensor:  # step 0 is the start
        return config.noise_scale * normal(settings.seed, "sample", step, samples, shape)

    def step_noise(step: int) -> Tensor:
        return noise(step + 1)

    solver, x = settings.solver, noise(0)
    if config.process == "ddpm":
        schedule = respaced(linear_schedule(DDPM_STEPS), settings.steps)
        return ddim(call, x, schedule) if solver == "ddim" else ddpm_ancestral(call, x, schedule, step_noise)
    if solver == "dopri5":
        return dopri5(call, x, settings.rtol, settings.atol)
    if solver == "sde":
        return sde(call, x, even_times(settings.steps), step_noise)
    return SOLVERS[solver](call, x, even_times(settings.steps))


def guided_network(
    config: ModelConfig,
    network: Network,
    classes: Tensor | None,
    prompts: Prompts | None,
    settings: EvaluationConfig,
    stats: SamplingStats,
) -> Model:
    """The velocity (flow), or epsilon and variance (ddpm), with guidance."""

    def predict(labels: Tensor | None, text: TextFeatures | None, skips: bool = False) -> Model:
        """The model for given labels and prompts; `skips` leaves out the middle blocks."""
        skipping = {"skips_middle": True} if skips else {}

        def prediction(x: Tensor, t: Tensor) -> Tensor:
            t, texts = _on_device(t, x.device), () if text is None else (text,)
            out = network(x, t, labels, *texts, **skipping)
            stats.note(out.routing)
            if config.process == "ddpm":
                return out.sample.float()
            mean = out.sample[:, : config.in_channels].float()  # the rest is a learned variance
            return convert(mean, x, t, config.prediction, "velocity", config.min_gap)

        return prediction

    text, negative = (None, None) if prompts is None else prompts
    conditional = predict(classes, text)
    if classes is None and text is None:
        return conditional
    null = torch.full_like(classes, config.num_classes) if classes is not None and config.null_class else classes
    joint = predict(
        None if classes is None or null is None else torch.cat((classes, null)),
        None if text is None or negative is None else TextFeatures.joined(text, negative),
    )

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        output, other = joint(torch.cat((x, x)), t).chunk(2)
        return output, other

    # Both in one batch, unless routing pools the batch and would mix them, or one of them skips blocks.
    channels, skips = settings.guidance_channels or config.in_channels, settings.path_drop_guidance
    apart = config.pools_batch or skips
    scale, interval = settings.guidance_scale, settings.guidance_interval
    without = predict(null, negative, skips)
    return guided(conditional, without, scale, interval, channels, None if apart else both)


def _on_device(t: Tensor, device: torch.device) -> Tensor:
    """A solver's scalar, which is on the CPU, on a device; written by a kernel, because its copy would wait."""
    return t if t.device == device else torch.full((), t.item(), dtype=t.dtype, device=device)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents as the model sees them to images, NCHW, [-1, 1]."""
    latents = LatentScaling.of_vae(vae.config).unscaled(latents)
    return torch.cat([vae.decode(some).sample for some in latents.split(DECODED_AT_A_TIME)])


def vae_scale_factor(vae: AutoencoderKL | None) -> int:
    """Pixels along a side for each of a latent; 1 without a VAE."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def generate(
    model: Backbone, labels: Tensor | None, num_samples: int, settings: EvaluationConfig, *options: Any, **more: Any
) -> Tensor:
    """All images of `generate_batches`, whose arguments these are, as one tensor."""
    return torch.cat(list(generate_batches(model, labels, num_samples, settings, *options, **more)))


def sampling_metadata(settings: EvaluationConfig, stats: SamplingStats) -> dict[str, Any]:
    """Settings of sampling, and what it cost."""
    adaptive = settings.solver == "dopri5"
    return {
        "solver": settings.solver,
        "steps": None if adaptive else settings.steps,
        **({"rtol": settings.rtol, "atol": settings.atol, "batch_size": settings.batch_size} if adaptive else {}),
        "guidance_scale": settings.guidance_scale,
        "guidance_interval": list(settings.guidance_interval),
        "guidance_channels": settings.guidance_channels,
        "path_drop_guidance": settings.path_drop_guidance,
        "threshold_scale": settings.threshold_scale,
        "dtype": choose_precision(settings.precision, best_device()).precision,
        "seed": settings.seed,
        **stats.summary(),
    }
