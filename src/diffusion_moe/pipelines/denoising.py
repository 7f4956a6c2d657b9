"""The base of our pipelines: noise, the scheduler's loop with guidance, and decoding.

Shape suffixes: B images, C channels, H and W pixels of the model's own space (latents, or the image itself).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..config import ModelConfig
from ..data.latent_space import LatentScaling
from ..diffusion.guidance import inside
from ..diffusion.prediction import convert
from ..models.token_drop import TokenDrop
from ..moe import scale_thresholds
from .schedulers import check_scheduler

Conditions = dict[str, Tensor | None]
"""Arguments of the model's forward besides image and time; the first axis is the image."""
StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
Call = TypeVar("Call", bound=Callable[..., Any])
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Further options, by name.

    Args:
        num_inference_steps: steps of the scheduler.
        guidance_scale: s in uncond + s * (cond - uncond); 1 for none.
        guidance_interval: times t strictly between which there is guidance; 0 is noise, 1 is data. The whole interval
            includes both ends.
        guidance_channels: number of first channels that are guided; None: all.
        path_drop_guidance: guide away from a prediction that skips the middle blocks (SPRINT; a model with fusion).
        height: height of the images, in pixels; None: the model's own.
        width: width of the images, in pixels; None: the model's own.
        generator: one for the whole batch, or one per image, which makes each image independent of its batch.
        latents: initial noise of standard deviation 1, (B, C, H, W).
        threshold_scale: factor on the routers' thresholds during the call (`moe.scale_thresholds`); below 1 more
            experts for each token, above 1 fewer.
        output_type: pil; np, (B, H, W, C) in [0, 1]; pt, (B, C, H, W) in [0, 1]; or latent, the model's own output.
        callback_on_step_end: called with the pipeline, the index of the step, the scheduler's timestep, and the
            tensors of callback_on_step_end_tensor_inputs, which its return value replaces.
        callback_on_step_end_tensor_inputs: names of those tensors; only latents exist.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: int | None = None
    path_drop_guidance: bool = False
    height: int | None = None
    width: int | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    latents: Tensor | None = None
    threshold_scale: float = 1.0
    output_type: str = "pil"
    callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)

    @property
    def callback_inputs(self) -> Sequence[str]:
        """Names of the tensors that the callback gets."""
        callback = self.callback_on_step_end
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            return callback.tensor_inputs
        return self.callback_on_step_end_tensor_inputs


def takes_request(call: Call) -> Call:
    """Show the fields of `Request` in the signature and docstring of a call that takes them as `**options`."""
    signature = inspect.signature(call)
    own = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    further = [p for name, p in inspect.signature(Request).parameters.items() if name not in own]
    call.__signature__ = signature.replace(parameters=[*own.values(), *further])  # type: ignore[attr-defined]
    call.__doc__ = f"{inspect.getdoc(call)}\n\n{inspect.getdoc(Request)}"
    return call


class DenoisingPipeline(DiffusionPipeline):
    """A transformer, a scheduler that fits it, and an optional VAE."""

    _optional_components = ["vae"]  # noqa: RUF012 - the names and types are diffusers'
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self, **components: Any) -> None:
        """Register the components by name: transformer, scheduler, vae (or None), and further ones of a subclass."""
        super().__init__()
        self.register_modules(**components)
        self._check_components()
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._guidance_scale, self._interrupt = 1.0, False

    @property
    def settings(self) -> ModelConfig:
        """Settings of the transformer."""
        return self.transformer.settings

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the next steps; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def downscaling(self) -> int:
        """Ratio of the image's height to that of its latents."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def check_request(self, request: Request) -> None:
        """Refuse options that do not fit the model or each other; the message says what would."""
        self._check_components()
        self._check_guidance(request.guidance_scale, request.guidance_interval, request.guidance_channels)
        if request.path_drop_guidance and not self.settings.fusion:
            raise ValueError("path_drop_guidance is true, but the model has no fusion; remove it")
        output_type, unknown = request.output_type, set(request.callback_inputs) - set(self._callback_tensor_inputs)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
        if output_type != "latent" and self.vae is None and self.settings.in_channels not in (1, 3):
            raise ValueError(
                f"output_type {output_type!r} needs a vae, as the model generates latents; give one "
                "(pipe.register_modules(vae=AutoencoderKL.from_pretrained(...))) or output_type='latent'"
            )
        if unknown:
            raise ValueError(f"callbacks are given {', '.join(self._callback_tensor_inputs)}, not {', '.join(unknown)}")

    def denoise(
        self, count: int, conditions: Conditions, null: Conditions | None, request: Request, return_dict: bool
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate so many images.

        Args:
            conditions: conditions of the images.
            null: conditions that guidance leads away from; None: the model has none.
            return_dict: return an `ImagePipelineOutput`; false: a tuple.
        """
        self.check_request(request)
        self._guidance_scale, self._interrupt = request.guidance_scale, False
        x, callback = self._noise(count, request), request.callback_on_step_end
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_options = {"generator": request.generator} if takes_generator else {}
        with self._inference(request.threshold_scale):
            for i, step in enumerate(self.progress_bar(self._timesteps(request.num_inference_steps))):
                if self._interrupt:  # a callback may set it
                    continue
                output = self._scheduler_input(x, i, step, conditions, null, request)
                x = self.scheduler.step(output, step, x, **step_options, return_dict=False)[0]
                if callback is not None:
                    tensors = {"latents": x} if request.callback_inputs else {}
                    x = callback(self, i, step, tensors).get("latents", x)  # type: ignore[operator]
        output_type = request.output_type
        images = self.image_processor.postprocess(x if output_type == "latent" else self.decode(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: Tensor) -> Tensor:
        """Images, (B, channels, H, W), in [-1, 1], of latents; pixels are returned as they are."""
        if self.vae is None:
            return latents
        latents = LatentScaling.of_vae(self.vae.config).unscaled(latents)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]

    def _check_guidance(self, scale: float, interval: tuple[float, float], channels: int | None) -> None:
        low, high = interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval is {interval}; give two times with 0 <= low < high <= 1")
        if channels is not None and not 0 < channels <= self.settings.in_channels:
            raise ValueError(f"guidance_channels is {channels}; the model has 1 to {self.settings.in_channels}")
        if scale == 1:
            return
        if not self.settings.guidable:
            raise ValueError(f"guidance_scale is {scale}, but the model has no null class; set it to 1")
        if self.settings.process == "ddpm" and tuple(interval) != (0.0, 1.0):
            reason = "which is not supported for models of process ddpm; remove it"
            raise ValueError(f"guidance_interval is {interval}, {reason}")

    def _check_components(self) -> None:
        check_scheduler(self.scheduler, self.settings)
        if self.vae is not None and self.vae.config.latent_channels != self.settings.in_channels:
            raise ValueError(
                f"the vae has {self.vae.config.latent_channels} latent channels, but the transformer "
                f"{self.settings.in_channels}; use the vae whose latents it was trained on"
            )

    def _noise(self, count: int, request: Request) -> Tensor:
        """Initial noise of the scheduler, float32, with the standard deviation of the model's process."""
        settings, latents, generator = self.settings, request.latents, request.generator
        shape = (count, settings.in_channels, *self._size(request.height, request.width))
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator is a list of {len(generator)} for {count} images; give one per image")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; the images asked for need {shape}")
        scale = settings.noise_scale if settings.process == "flow" else 1.0
        return scale * latents.to(self._execution_device, torch.float32)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in the model's space, from those of an image in pixels."""
        multiple = self.downscaling * self.settings.patch_size
        sides = []
        for name, side in (("height", height), ("width", width)):
            side = self.settings.sample_size * self.downscaling if side is None else side
            if side < multiple or side % multiple:
                raise ValueError(f"{name} is {side}; it must be a positive multiple of {multiple}")
            sides.append(side // self.downscaling)
        return sides[0], sides[1]

    def _timesteps(self, steps: int) -> Tensor:
        """Timesteps of the prepared scheduler; Euler's steps are equal before its own shift."""
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}; it must be positive")
        even = {}
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            even = {"sigmas": torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()}
        self.scheduler.set_timesteps(steps, device=self._execution_device, **even)
        return self.scheduler.timesteps

    @contextmanager
    def _inference(self, threshold_scale: float) -> Iterator[None]:
        """Context with the transformer in eval mode and its thresholds scaled."""
        scale_thresholds(self.transformer, threshold_scale)
        training = self.transformer.training
        self.transformer.eval()
        try:
            yield
        finally:
            scale_thresholds(self.transformer, 1.0)
            self.transformer.train(training)

    def _scheduler_input(
        self, x: Tensor, i: int, step: Tensor, conditions: Conditions, null: Conditions | None, request: Request
    ) -> Tensor:
        """Input of the scheduler at its i-th step: epsilon, with its variance if wanted, or dx/dsigma, float32."""
        settings, C = self.settings, self.settings.in_channels
        channels, guides = request.guidance_channels or C, self.guidance_scale != 1
        if settings.process == "ddpm":
            output = self._predict(x, step, conditions, null if guides else None, channels, request)
            # A learned variance is taken together with epsilon.
            return output if self.scheduler.config.get("variance_type") == "learned_range" else output[:, :C]
        # t is 1 - sigma. Some schedulers round their timesteps, so these are not used.
        t = 1 - self.scheduler.sigmas[i].to(x.device, torch.float32)
        # Rounded, because 1 - sigma differs in the last bits from an end such as 0.1.
        guides = guides and inside(t.round(decimals=6), request.guidance_interval)
        output = self._predict(x, t, conditions, null if guides else None, channels, request)
        return -convert(output[:, :C], x, t, settings.prediction, "velocity", settings.min_gap)

    def _predict(
        self,
        x: Tensor,
        t: Tensor,
        conditions: Conditions,
        null: Conditions | None,
        channels: int,
        request: Request,
    ) -> Tensor:
        """Output of the transformer, with guidance of the first channels, float32, (B, C or 2C, H, W)."""

        def output_of(x: Tensor, conditions: Conditions, **drop: TokenDrop) -> Tensor:
            x = x.to(self.transformer.dtype)
            return self.transformer(x, t, **conditions, **drop, return_dict=False)[0].float()

        if null is None:
            return output_of(x, conditions)
        # A router that pools the batch would mix the two halves of a doubled batch.
        if request.path_drop_guidance:
            without, output = output_of(x, null, token_drop=TokenDrop(path=True)), output_of(x, conditions)
        elif self.settings.pools_batch:
            without, output = output_of(x, null), output_of(x, conditions)
        else:
            pairs = {name: (null[name], conditions[name]) for name in conditions}
            both = {name: None if a is None or b is None else torch.cat((a, b)) for name, (a, b) in pairs.items()}
            without, output = output_of(torch.cat((x, x)), both).chunk(2)
        guided_part = torch.lerp(without[:, :channels], output[:, :channels], self.guidance_scale)
        return torch.cat((guided_part, output[:, channels:]), dim=1)
