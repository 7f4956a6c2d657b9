"""Images from a model: number i is a function of (seed, i), whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import DDPM_SOLVERS, FLOW_SOLVERS, EvaluationConfig, ModelConfig
from ..data.latent_space import LatentScaling
from ..diffusion.ddpm import DDPM_STEPS, ddim, ddpm_ancestral, linear_schedule, respaced
from ..diffusion.guidance import Model, guided
from ..diffusion.prediction import convert
from ..diffusion.solvers import SOLVERS, Counted, dopri5, even_times, sde
from ..distributed import from_main
from ..log import Log
from ..models import Backbone
from ..moe import RoutingReport, limit_capacity, scale_thresholds
from ..moe.precision import choose_precision
from ..randomness import normal
from ..text import TextFeatures
from .acceleration import Network, accelerated

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

DECODED_AT_A_TIME = 32
"""Images: a VAE's decoder needs far more memory for each than the model."""


def class_schedule(num_samples: int, num_classes: int) -> Tensor | None:
    """Classes 0, 1, ... in turn, int64, (S,); None for an unconditional model."""
    return torch.arange(num_samples) % num_classes if num_classes else None


class Prompts(NamedTuple):
    """What images show, a row an image."""

    text: TextFeatures
    negative: TextFeatures
    """What guidance leads away from; without a token: the model's null prompt."""

    def rows(self, places: Tensor, device: torch.device) -> Prompts:
        """Of some of the images, on a device."""
        return Prompts(self.text.rows(places).to(device), self.negative.rows(places).to(device))

    def padded_to(self, length: int) -> Prompts:
        """With room for at least so many tokens each."""
        return Prompts(*(text.padded_to(max(length, text.mask.shape[1])) for text in self))


class PromptRows(Protocol):
    """Anything that knows what each image shows."""

    def rows(self, places: Tensor, device: torch.device) -> Prompts:
        """Of some of the images, by their numbers."""


@dataclass
class SamplingStats:
    """What generation has cost so far."""

    batches: int = 0
    evaluations: int = 0
    """Calls of the guided model, summed over batches; guidance runs the network twice in a call."""
    served: list[Tensor] = field(default_factory=list)
    """For each network evaluation, pairs of token and expert in all MoE layers."""
    offered: int = 0
    """Tokens that routers saw, summed over layers and network evaluations."""
    dropped: list[Tensor] = field(default_factory=list)
    """For each network evaluation with a capacity limit, the choices that found no room."""

    def note(self, reports: tuple[RoutingReport, ...]) -> None:
        """Count what one network evaluation routed."""
        if reports:
            self.served.append(torch.stack([report.counts_E.sum() for report in reports]).sum())
            self.offered += sum(report.num_tokens for report in reports)
            self.dropped += [report.dropped.clone() for report in reports if report.dropped is not None]

    def summary(self) -> dict[str, float | None]:
        """Evaluations an image, routed experts a token on average (null without experts), and the share dropped."""
        served = float(torch.stack(self.served).sum()) if self.served else 0.0
        numbers: dict[str, float | None] = {
            "function_evaluations": self.evaluations / max(1, self.batches),
            "average_capacity": served / self.offered if self.offered else None,
        }
        if self.dropped:
            dropped = float(torch.stack(self.dropped).sum())
            numbers["dropped_share"] = dropped / max(1.0, served + dropped)
        return numbers


def usual_device() -> torch.device:
    """Where models are sampled: see `Source.load`."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_precision(settings: EvaluationConfig, log: Log) -> EvaluationConfig:
    """Settings with the precision that they leave open, the main process' for all; says which."""
    chosen = from_main(choose_precision(settings.precision, usual_device()))
    log(f"computing in {chosen}")
    return replace(settings, precision=chosen.precision)


def check_solver(config: ModelConfig, settings: EvaluationConfig) -> None:
    """Whether solver and guidance fit the model.

    Raises:
        ValueError: they do not.
    """
    fitting = FLOW_SOLVERS if config.process == "flow" else DDPM_SOLVERS
    if settings.solver not in fitting:
        raise ValueError(
            f"solver is {settings.solver}, but the model's process is {config.process}; choose {' or '.join(fitting)}"
        )
    if config.process == "ddpm" and settings.guidance_interval != (0.0, 1.0):
        raise ValueError(
            f"guidance_interval is {settings.guidance_interval}, but ddpm models have no times t; leave it out"
        )
    if settings.guidance_scale != 1 and config.num_classes and not config.guidable:
        raise ValueError(
            f"guidance_scale is {settings.guidance_scale}, but the model has no null class; set it to 1 for no guidance"
        )


@torch.no_grad()
def generate_batches(
    model: Backbone,
    labels: Tensor | None,
    num_samples: int,
    settings: EvaluationConfig,
    vae: AutoencoderKL | None = None,
    usage: SamplingStats | None = None,
    first: int = 0,
    *,
    prompts: PromptRows | None = None,
    size: tuple[int, int] | None = None,
    network: Network | None = None,
) -> Iterator[Tensor]:
    """Generate images `first` to num_samples - 1, a batch at a time.

    Args:
        model: in eval mode; its device is used. labels: class of each image, int64, (S,).
        vae: decodes what the model generates. usage: filled with what it cost.
        prompts: of each image, for a model with text. size: height and width in the model's space; None: sample_size.
        network: what `accelerated` made of this model and these settings, to be used again; None: made here.

    Yields:
        NCHW, float32, [-1, 1] by convention but not clipped, on the CPU.

    Raises:
        ValueError: see `check_solver` and `acceleration.check_acceleration`.
    """
    config, usage = model.settings, usage or SamplingStats()
    check_solver(config, settings)
    if (prompts is None) == bool(config.text_dim):
        raise ValueError(f"prompts are {'missing' if prompts is None else 'given'}, but text_dim is {config.text_dim}")
    network = network or accelerated(model, settings)
    scale_thresholds(model, settings.threshold_scale)
    limit_capacity(model, settings.capacity_limit)
    try:
        for samples in torch.arange(first, num_samples).split(settings.batch_size):
            classes = None if labels is None else labels[samples].to(model.device)
            asked = None if prompts is None else prompts.rows(samples, model.device)
            # The model would pad them too; a captured graph then meets one length.
            asked = asked and asked.padded_to(config.text_length)
            x = _solve(model, network, classes, samples.to(model.device), settings, usage, asked, size)
            yield (x if vae is None else decode(vae, x)).float().cpu()
    finally:
        scale_thresholds(model, 1.0)
        limit_capacity(model, None)


def _solve(
    model: Backbone,
    network: Network,
    classes: Tensor | None,
    samples: Tensor,
    settings: EvaluationConfig,
    usage: SamplingStats,
    prompts: Prompts | None,
    size: tuple[int, int] | None,
) -> Tensor:
    """One batch, (B, C, H, W) in the model's space."""
    config = model.settings
    shape = (config.in_channels, *(size or (config.sample_size, config.sample_size)))

    def noise(step: int) -> Tensor:  # step 0 is the start
        return config.noise_scale * normal(settings.seed, "sample", step, samples, shape)

    answer = Counted(_guided(config, network, classes, settings, usage, prompts))
    x, solver = noise(0), settings.solver
    if config.process == "ddpm":
        schedule = respaced(linear_schedule(DDPM_STEPS), settings.steps)
        x = (
            ddim(answer, x, schedule)
            if solver == "ddim"
            else ddpm_ancestral(answer, x, schedule, lambda k: noise(k + 1))
        )
    elif solver == "dopri5":
        x = dopri5(answer, x, settings.rtol, settings.atol)
    elif solver == "sde":
        x = sde(answer, x, even_times(settings.steps), lambda k: noise(k + 1))
    else:
        x = SOLVERS[solver](answer, x, even_times(settings.steps))
    usage.batches += 1
    usage.evaluations += answer.evaluations
    return x


def _guided(
    config: ModelConfig,
    network: Network,
    classes: Tensor | None,
    settings: EvaluationConfig,
    usage: SamplingStats,
    prompts: Prompts | None = None,
) -> Model:
    """The velocity (flow), or epsilon and variance (ddpm), with guidance."""

    def answer(labels: Tensor | None, text: TextFeatures | None) -> Callable[[Tensor, Tensor], Tensor]:
        def of(x: Tensor, t: Tensor) -> Tensor:
            out = network(x, t.to(x.device), labels, *(() if text is None else (text,)))
            usage.note(out.routing)
            if config.process == "ddpm":
                return out.sample.float()
            prediction = out.sample[:, : config.in_channels].float()
            return convert(prediction, x, t.to(x.device), config.prediction, "velocity", config.min_gap)

        return of

    text, negative = (None, None) if prompts is None else prompts
    conditional = answer(classes, text)
    if classes is None and text is None:
        return conditional
    null = None if classes is None else torch.full_like(classes, config.num_classes) if config.null_class else classes
    joint = answer(
        None if classes is None or null is None else torch.cat((classes, null)),
        None if text is None or negative is None else TextFeatures.joined(text, negative),
    )

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        output, without = joint(torch.cat((x, x)), t).chunk(2)
        return output, without

    # One batch of both, but where routing pools the batch and would mix them.
    channels = settings.guidance_channels or config.in_channels
    scale, interval = settings.guidance_scale, settings.guidance_interval
    return guided(conditional, answer(null, negative), scale, interval, channels, None if config.pools_batch else both)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents as the model sees them to images, NCHW, [-1, 1]."""
    latents = LatentScaling.of_vae(vae.config).unscaled(latents)
    return torch.cat([vae.decode(some).sample for some in latents.split(DECODED_AT_A_TIME)])


def generate(
    model: Backbone,
    labels: Tensor | None,
    num_samples: int,
    settings: EvaluationConfig,
    vae: AutoencoderKL | None = None,
    usage: SamplingStats | None = None,
    *,
    prompts: PromptRows | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """All images of `generate_batches` as one tensor."""
    options: dict[str, Any] = {"prompts": prompts, "size": size}
    return torch.cat(list(generate_batches(model, labels, num_samples, settings, vae, usage, **options)))


def provenance(settings: EvaluationConfig, usage: SamplingStats) -> dict[str, Any]:
    """How the images were made, for every file and number that comes of them."""
    adaptive = settings.solver == "dopri5"
    return {
        "solver": settings.solver,
        "steps": None if adaptive else settings.steps,
        **({"rtol": settings.rtol, "atol": settings.atol, "batch_size": settings.batch_size} if adaptive else {}),
        "guidance_scale": settings.guidance_scale,
        "guidance_interval": list(settings.guidance_interval),
        "guidance_channels": settings.guidance_channels,
        "threshold_scale": settings.threshold_scale,
        "dtype": choose_precision(settings.precision, usual_device()).precision,
        "seed": settings.seed,
        **usage.summary(),
    }
