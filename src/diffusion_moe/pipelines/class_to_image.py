"""The pipeline from classes to images, for latent and pixel models.

Shape suffixes: B images, C channels, H and W pixels of the model's own space (latents, or the image itself).
"""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..config import ModelConfig
from ..data.latent_space import LatentScaling
from ..diffusion.guidance import inside
from ..diffusion.prediction import convert
from ..models import Backbone
from ..moe import scale_thresholds
from .schedulers import check_scheduler, wants_variance

Label = int | str
StepCallback = Callable[["ClassToImagePipeline", int, Tensor, dict[str, Any]], dict[str, Any]]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ClassToImagePipeline(DiffusionPipeline):
    """Images of given classes, or of an unconditional model, by a scheduler of diffusers.

    A model whose `in_channels` is 1 or 3 and that comes without `vae` draws pixels in [-1, 1]; every other draws
    latents that a `vae` decodes, and without one only `output_type="latent"` is to be had.

    Args:
        transformer: a DiT or JiT. scheduler: one of `pipelines.schedulers.FITTING`; see `default_scheduler`.
        vae: decodes the latents. id2label: names of the classes, synonyms separated by commas.

    Raises:
        ValueError: the scheduler or the vae does not fit the transformer.

    Example:
        >>> pipe = ClassToImagePipeline(model, default_scheduler(model.settings), id2label={0: "tench", 1: "goldfish"})
        >>> image = pipe("goldfish", guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images[0]
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - the names and types are diffusers'
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: Backbone,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        check_scheduler(scheduler, transformer.settings)
        _check_vae(vae, transformer.settings)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = None if id2label is None else {int(number): name for number, name in id2label.items()}
        self.register_to_config(id2label=names)
        self.labels = _by_name(names or {})
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._guidance_scale, self._interrupt = 1.0, False

    @property
    def settings(self) -> ModelConfig:
        """Settings of the transformer."""
        return self.transformer.settings

    @property
    def draws_pixels(self) -> bool:
        """Whether the transformer's output is the image itself."""
        return self.vae is None and self.settings.in_channels in (1, 3)

    @property
    def guidance_scale(self) -> float:
        """Guidance of the steps to come; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether the steps to come are left out; a callback may set `_interrupt`."""
        return self._interrupt

    def get_label_ids(self, labels: Label | Sequence[Label]) -> list[int]:
        """Numbers of classes that are given by name or number.

        Raises:
            ValueError: an unknown or ambiguous name, or a number out of range.
        """
        if isinstance(labels, Tensor):
            labels = labels.flatten().tolist()
        one = isinstance(labels, str) or not isinstance(labels, Iterable)
        return [self._label_id(label) for label in ([labels] if one else labels)]  # type: ignore[union-attr, arg-type]

    def _label_id(self, label: Label) -> int:
        if isinstance(label, str):
            numbers = self.labels.get(label.strip(), ())
            if len(numbers) > 1:
                raise ValueError(f"the name {label!r} has classes {', '.join(map(str, numbers))}; give the number")
            if not numbers:
                closest = difflib.get_close_matches(label, self.labels, n=1, cutoff=0.0)
                hint = f"the closest is {closest[0]!r}" if closest else "the pipeline has no id2label; give the number"
                raise ValueError(f"no class has the name {label!r}; {hint}")
            label = numbers[0]
        number = operator.index(label)
        if not 0 <= number < self.settings.num_classes:
            raise ValueError(f"class {number} is out of range; the model has 0 to {self.settings.num_classes - 1}")
        return number

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        num_images_per_label: int = 1,
        num_images: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        threshold_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: a class by name or number, or several; None for an unconditional model.
            num_inference_steps: steps of the scheduler. guidance_scale: s in uncond + s * (cond - uncond); 1 for none.
            guidance_interval: times t, strictly between which there is guidance; 0 is noise, 1 is data, and both ends
                of the whole interval belong to it. guidance_channels: guide the first so many channels only; None: all.
            num_images_per_label: images of each label, one after another. num_images: of an unconditional model.
            generator: one for the whole batch, or one an image: then no image depends on its batch.
            latents: noise of standard deviation 1 to start from, (B, C, H, W).
            threshold_scale: below 1 more compute for each token, above 1 less (`moe.scale_thresholds`); 1 afterwards.
            output_type: pil; np, (B, H, W, C) in [0, 1]; pt, (B, C, H, W) in [0, 1]; or latent, as the model drew it.
            callback_on_step_end: called with the pipeline, the number of the step, the scheduler's timestep and the
                tensors of callback_on_step_end_tensor_inputs; what it returns takes their place.

        Raises:
            ValueError: arguments that do not fit the model or each other; each says what would.
        """
        settings, device = self.settings, self._execution_device
        labels = self._class_numbers(class_labels, num_images_per_label, num_images)
        check_scheduler(self.scheduler, settings)
        _check_vae(self.vae, settings)
        self._check_guidance(guidance_scale, guidance_interval, guidance_channels)
        self._check_output_type(output_type)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callbacks are given {', '.join(self._callback_tensor_inputs)}, not {', '.join(unknown)}")
        self._guidance_scale, self._interrupt = guidance_scale, False
        x = self._noise(len(labels), latents, generator)
        class_B = torch.tensor(labels, device=device) if settings.num_classes else None
        step_options = self._step_options(generator)
        with self._inference(threshold_scale):
            for i, step in enumerate(self.progress_bar(self._timesteps(num_inference_steps))):
                if self.interrupt:
                    continue
                guide = guidance_channels or settings.in_channels, guidance_interval
                output = self._scheduler_input(x, i, step, class_B, *guide)
                x = self.scheduler.step(output, step, x, **step_options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                    x = callback_on_step_end(self, i, step, tensors).get("latents", x)  # type: ignore[operator]
        images = self.image_processor.postprocess(x if output_type == "latent" else self.decode(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents, (B, channels, H, W), in [-1, 1] by convention; pixels are already that."""
        if self.vae is None:
            return latents
        latents = LatentScaling.of_vae(self.vae.config).unscaled(latents)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]

    def _class_numbers(
        self, class_labels: Label | Sequence[Label] | None, per_label: int, num_images: int | None
    ) -> list[int]:
        """The class of each image; zeros for an unconditional model."""
        if per_label < 1 or (num_images is not None and num_images < 1):
            raise ValueError(f"num_images_per_label is {per_label}, num_images {num_images}; they must be positive")
        if not self.settings.num_classes:
            if class_labels is not None or per_label != 1:
                raise ValueError("the model is unconditional; give num_images, and neither class_labels nor _per_label")
            return [0] * (num_images or 1)
        if class_labels is None or num_images is not None:
            raise ValueError("the model has classes; give class_labels and num_images_per_label instead of num_images")
        numbers = [number for number in self.get_label_ids(class_labels) for _ in range(per_label)]
        if not numbers:
            raise ValueError("class_labels is empty; give at least one")
        return numbers

    def _check_guidance(self, scale: float, interval: tuple[float, float], channels: int | None) -> None:
        low, high = interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval is {interval}; give two times with 0 <= low < high <= 1")
        if channels is not None and not 0 < channels <= self.settings.in_channels:
            raise ValueError(f"guidance_channels is {channels}; the model has 1 to {self.settings.in_channels}")
        if scale == 1:
            return
        if self.transformer.null_class is None:
            raise ValueError(f"guidance_scale is {scale}, but the model has no null class; leave it at 1")
        if self.settings.process == "ddpm" and tuple(interval) != (0.0, 1.0):
            raise ValueError(
                f"guidance_interval is {interval}, but a ddpm model has steps, no times; leave it at (0, 1)"
            )

    def _check_output_type(self, output_type: str) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
        if output_type != "latent" and self.vae is None and not self.draws_pixels:
            raise ValueError(
                f"output_type {output_type!r} needs a vae, as the model draws latents; give one "
                "(pipe.register_modules(vae=AutoencoderKL.from_pretrained(...))) or output_type='latent'"
            )

    def _noise(self, count: int, latents: Tensor | None, generator: Any) -> Tensor:
        """Where the scheduler starts, float32: the noise of the model's process."""
        settings = self.settings
        shape = (count, settings.in_channels, settings.sample_size, settings.sample_size)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator is a list of {len(generator)} for {count} images; give one an image")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; the images asked for need {shape}")
        scale = settings.noise_scale if settings.process == "flow" else 1.0
        return scale * latents.to(self._execution_device, torch.float32)

    def _timesteps(self, steps: int) -> Tensor:
        """Prepare the scheduler; Euler's steps are made equal before its own shift."""
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}; it must be positive")
        even = {}
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            even = {"sigmas": torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()}
        self.scheduler.set_timesteps(steps, device=self._execution_device, **even)
        return self.scheduler.timesteps

    def _step_options(self, generator: Any) -> dict[str, Any]:
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

    @contextmanager
    def _inference(self, threshold_scale: float) -> Iterator[None]:
        """The transformer in eval mode (routers of kind diffmoe pool the batch otherwise) and its thresholds scaled."""
        scale_thresholds(self.transformer, threshold_scale)
        training = self.transformer.training
        self.transformer.eval()
        try:
            yield
        finally:
            scale_thresholds(self.transformer, 1.0)
            self.transformer.train(training)

    def _scheduler_input(
        self, x: Tensor, i: int, step: Tensor, class_B: Tensor | None, channels: int, interval: tuple[float, float]
    ) -> Tensor:
        """What the scheduler takes at its i-th step: epsilon and perhaps its variance, or dx/dsigma, float32."""
        settings, C = self.settings, self.settings.in_channels
        if settings.process == "ddpm":
            output = self._predict(x, step, class_B, self.guidance_scale != 1, channels)
            return output if wants_variance(self.scheduler) else output[:, :C]
        # Not from the timestep, which some schedulers round: sigma is 1 - t.
        t = 1 - self.scheduler.sigmas[i].to(x.device, torch.float32)
        # Rounded, as 1 - sigma misses ends such as 0.1, which steps of equal t meet, by the last bits.
        guided = self.guidance_scale != 1 and inside(t.round(decimals=6), interval)
        output = self._predict(x, t, class_B, guided, channels)
        return -convert(output[:, :C], x, t, settings.prediction, "velocity", settings.min_gap)

    def _predict(self, x: Tensor, t: Tensor, class_B: Tensor | None, guided: bool, channels: int) -> Tensor:
        """What the transformer answers, with guidance of the first channels, float32, (B, C or 2C, H, W)."""

        def answer(x: Tensor, class_B: Tensor | None) -> Tensor:
            return self.transformer(x.to(self.transformer.dtype), t, class_B, return_dict=False)[0].float()

        if not guided:
            return answer(x, class_B)
        assert class_B is not None
        null_B = torch.full_like(class_B, self.transformer.null_class)
        # Where routing pools the batch, a doubled one would mix the two.
        if self.settings.router == "diffmoe" and self.settings.inference_pool == "batch":
            null, output = answer(x, null_B), answer(x, class_B)
        else:
            null, output = answer(torch.cat((x, x)), torch.cat((null_B, class_B))).chunk(2)
        guided_part = torch.lerp(null[:, :channels], output[:, :channels], self.guidance_scale)
        return torch.cat((guided_part, output[:, channels:]), dim=1)


def _check_vae(vae: AutoencoderKL | None, settings: ModelConfig) -> None:
    if vae is not None and vae.config.latent_channels != settings.in_channels:
        raise ValueError(
            f"the vae has {vae.config.latent_channels} latent channels, but the transformer {settings.in_channels}; "
            "take the vae whose latents it was trained on"
        )


def _by_name(id2label: dict[int, str]) -> dict[str, tuple[int, ...]]:
    """Every synonym, and the whole text, with the classes it may mean."""
    labels: dict[str, tuple[int, ...]] = {}
    for number, text in sorted(id2label.items()):
        for name in sorted({text.strip(), *(part.strip() for part in text.split(","))}):
            labels[name] = (*labels.get(name, ()), number)
    return labels


# What save_pretrained records and from_pretrained looks up: the public name.
ClassToImagePipeline.__module__ = "diffusion_moe"
