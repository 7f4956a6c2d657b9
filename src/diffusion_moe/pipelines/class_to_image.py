"""The pipeline from classes to images, for latent and pixel models.

Shape suffixes: B images, C channels, H and W pixels of the model's own space (latents, or the image itself).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..models import Backbone
from ..models.labels import by_name, checked, class_number
from .denoising import Conditions, DenoisingPipeline, Request, StepCallback

Label = int | str


class ClassToImagePipeline(DenoisingPipeline):
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

    def __init__(
        self,
        transformer: Backbone,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        if transformer.settings.text_dim:
            raise ValueError("the transformer takes text; make a TextToImagePipeline of it")
        self.set_up(transformer, scheduler, vae)
        names = None if id2label is None else {int(number): name for number, name in id2label.items()}
        self.register_to_config(id2label=names)
        self.labels = by_name(names or {})

    def get_label_ids(self, labels: Label | Sequence[Label]) -> list[int]:
        """Numbers of classes that are given by name or number.

        Args:
            labels: an integer is a number; a text is a name first, then a number: `#2` is always number 2, `name:2` the
                class named 2.

        Raises:
            ValueError: an unknown or ambiguous text, or a number out of range.
        """
        if isinstance(labels, Tensor):
            labels = labels.flatten().tolist()
        one = isinstance(labels, str) or not isinstance(labels, Iterable)
        return [self._label_id(label) for label in ([labels] if one else labels)]  # type: ignore[union-attr, arg-type]

    def _label_id(self, label: Label) -> int:
        if isinstance(label, str):
            return class_number(label, self.labels, self.settings.num_classes)
        return checked(operator.index(label), self.settings.num_classes)

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
        height: int | None = None,
        width: int | None = None,
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
            height: of the images, in pixels; None: the model's own size. width: likewise.
            generator: one for the whole batch, or one an image: then no image depends on its batch.
            latents: noise of standard deviation 1 to start from, (B, C, H, W).
            threshold_scale: below 1 more compute for each token, above 1 less (`moe.scale_thresholds`); 1 afterwards.
            output_type: pil; np, (B, H, W, C) in [0, 1]; pt, (B, C, H, W) in [0, 1]; or latent, as the model drew it.
            callback_on_step_end: called with the pipeline, the number of the step, the scheduler's timestep and the
                tensors of callback_on_step_end_tensor_inputs; what it returns takes their place.

        Raises:
            ValueError: arguments that do not fit the model or each other; each says what would.
        """
        labels = self._class_numbers(class_labels, num_images_per_label, num_images)
        request = Request(
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            guidance_channels,
            height,
            width,
            generator,
            latents,
            threshold_scale,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        conditions: Conditions = {}
        null: Conditions | None = None
        if self.settings.num_classes:
            class_B = torch.tensor(labels, device=self._execution_device)
            conditions = {"class_labels": class_B}
            if self.transformer.null_class is not None:
                null = {"class_labels": torch.full_like(class_B, self.transformer.null_class)}
        return self.denoise(len(labels), conditions, null, request, return_dict)

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


# What save_pretrained records and from_pretrained looks up: the public name.
ClassToImagePipeline.__module__ = "diffusion_moe"
