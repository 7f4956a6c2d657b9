"""The pipeline from prompts to images, for latent and pixel models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import Backbone
from ..text import TextEncoder, TextFeatures
from .denoising import DenoisingPipeline, Request, takes_request

Prompt = str | Sequence[str]
logger = logging.getLogger(__name__)


class TextToImagePipeline(DenoisingPipeline):
    """Generation of images of prompts, with a scheduler of diffusers.

    A model without `vae` whose `in_channels` is 1 or 3 generates pixels in [-1, 1]. Every other model generates
    latents, which a `vae` decodes; without one only `output_type="latent"` is possible.

    Args:
        transformer: a DiT or JiT with text_dim and without classes.
        scheduler: one of `pipelines.schedulers.FITTING`.
        text_encoder: the text encoder it was trained with.
        tokenizer: tokenizer of that encoder.
        vae: decoder of the latents.

    Raises:
        ValueError: the scheduler, the vae or the text encoder does not fit the transformer.

    Example:
        >>> pipe = DiffusionPipeline.from_pretrained("folder")
        >>> image = pipe("a red circle", negative_prompt="blue", guidance_scale=4.0).images[0]
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: Backbone,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vae: AutoencoderKL | None = None,
    ) -> None:
        settings = transformer.settings
        if not settings.text_dim or settings.num_classes:
            given = f"text_dim {settings.text_dim} and num_classes {settings.num_classes}"
            need = "this pipeline is for models with text and without classes"
            raise ValueError(f"the transformer has {given}; {need}")
        super().__init__(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )

    @torch.no_grad()
    @takes_request
    def __call__(
        self,
        prompt: Prompt,
        negative_prompt: Prompt | None = None,
        *,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        return_dict: bool = True,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            prompt: a text, or several.
            negative_prompt: text that guidance leads away from, one for all or one per prompt; None: no prompt.
            guidance_scale: see below.
            num_images_per_prompt: images of each prompt, one after another.
            return_dict: return an `ImagePipelineOutput`; false: a tuple.

        Raises:
            ValueError: arguments that do not fit the model or each other; the message says what would.
        """
        request = Request(guidance_scale=guidance_scale, **options)
        self.check_request(request)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        if negatives is not None and len(negatives) != len(prompts):
            counts = f"{len(negatives)} negative prompts for {len(prompts)} prompts"
            raise ValueError(f"there are {counts}; give one, or one per prompt")
        if num_images_per_prompt < 1 or not prompts:
            counts = f"{len(prompts)} prompts and num_images_per_prompt is {num_images_per_prompt}"
            raise ValueError(f"there are {counts}; both must be positive")
        text = self.encode_prompts(prompts)
        negative = text.nothing() if negatives is None else self.encode_prompts(negatives)
        length = max(text.mask.shape[1], negative.mask.shape[1])
        indices = torch.arange(len(prompts)).repeat_interleave(num_images_per_prompt).to(text.mask.device)
        has_pooled = self.settings.text_pooled_dim > 0
        conditions, null = (each.padded_to(length).rows(indices).arguments(has_pooled) for each in (text, negative))
        return self.denoise(len(indices), conditions, null, request, return_dict)

    def encode_prompts(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts, in the transformer's dtype; prompts that are too long are cut, with a warning."""
        encoder = TextEncoder(
            self.text_encoder, self.tokenizer, self.settings.text_length, "of the pipeline", warn=logger.warning
        )
        text = encoder.encode(prompts).to(self._execution_device)
        dtype = self.transformer.dtype
        pooled = None if text.pooled is None else text.pooled.to(dtype)
        return text._replace(features=text.features.to(dtype), pooled=pooled)


# The public name, which save_pretrained writes and from_pretrained looks up.
TextToImagePipeline.__module__ = "diffusion_moe"
