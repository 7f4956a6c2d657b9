"""The pipeline from classes to images, for latent and pixel models."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..models import Backbone
from ..models.labels import by_name, checked, class_number
from .denoising import Conditions, DenoisingPipeline, Request, takes_request

Label = int | str


class ClassToImagePipeline(DenoisingPipeline):
    """Generation of images of given classes, or by an unconditional model, with a scheduler of diffusers.

    A model without `vae` whose `in_channels` is 1 or 3 generates pixels in [-1, 1]. Every other model generates
    latents, which a `vae` decodes; without one only `output_type="latent"` is possible.

    Args:
        transformer: a DiT or JiT.
        scheduler: one of `pipelines.schedulers.FITTING`; see `default_scheduler`.
        vae: decoder of the latents.
        id2label: names of the classes, synonyms separated by commas.

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
        if transformer.settings.text_dim:
            raise ValueError("the transformer takes text; use TextToImagePipeline")
        super().__init__(transformer=transformer, scheduler=scheduler, vae=vae)
        names = None if id2label is None else {int(number): name for number, name in id2label.items()}
        self.register_to_config(id2label=names)
        self.labels = by_name(names or {})

    def get_label_ids(self, labels: Label | Sequence[Label]) -> list[int]:
        """Numbers of classes.

        Args:
            labels: integers are numbers. Texts are names, or else numbers: `#2` is always number 2, `name:2` always
                the class named 2.

        Raises:
            ValueError: an unknown or ambiguous text, or a number out of range.
        """
        if isinstance(labels, Tensor):
            labels = labels.flatten().tolist()
        one = isinstance(labels, str) or not isinstance(labels, Iterable)
        each: Iterable[Any] = [labels] if one else labels  # type: ignore[assignment]
        count = self.settings.num_classes
        return [
            class_number(label, self.labels, count) if isinstance(label, str) else checked(operator.index(label), count)
            for label in each
        ]

    @torch.no_grad()
    @takes_request
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | None = None,
        *,
        num_images_per_label: int = 1,
        num_images: int | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            class_labels: a class by name or number, or several; None for an unconditional model.
            num_images_per_label: images of each label, one after another.
            num_images: images of an unconditional model.
            return_dict: return an `ImagePipelineOutput`; false: a tuple.

        Raises:
            ValueError: arguments that do not fit the model or each other; the message says what would.
        """
        labels, request = self._class_numbers(class_labels, num_images_per_label, num_images), Request(**options)
        class_B, null_class = torch.tensor(labels, device=self._execution_device), self.transformer.null_class
        conditions: Conditions = {"class_labels": class_B} if self.settings.num_classes else {}
        null: Conditions | None = None
        if null_class is not None:
            null = {"class_labels": torch.full_like(class_B, null_class)}
        return self.denoise(len(labels), conditions, null, request, return_dict)

    def _class_numbers(
        self, class_labels: Label | Sequence[Label] | None, per_label: int, num_images: int | None
    ) -> list[int]:
        """Class of each image; zeros for an unconditional model."""
        if per_label < 1 or (num_images is not None and num_images < 1):
            raise ValueError(f"num_images_per_label is {per_label}, num_images {num_images}; they must be positive")
        if not self.settings.num_classes:
            if class_labels is not None or per_label != 1:
                raise ValueError(
                    "the model is unconditional; give num_images instead of class_labels and num_images_per_label"
                )
            return [0] * (num_images or 1)
        if class_labels is None or num_images is not None:
            raise ValueError("the model has classes; give class_labels and num_images_per_label instead of num_images")
        numbers = [number for number in self.get_label_ids(class_labels) for _ in range(per_label)]
        if not numbers:
            raise ValueError("class_labels is empty; give at least one")
        return numbers


# The public name, which save_pretrained writes and from_pretrained looks up.
ClassToImagePipeline.__module__ = "diffusion_moe"
