"""The pipeline from prompts to images, for latent and pixel models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import Backbone
from ..text import TextEncoder, TextFeatures
from .denoising import DenoisingPipeline, Request, StepCallback

Prompt = str | Sequence[str]
logger = logging.getLogger(__name__)


class TextToImagePipeline(DenoisingPipeline):
    """Images of prompts, by a scheduler of diffusers.

    A model whose `in_channels` is 1 or 3 and that comes without `vae` draws pixels in [-1, 1]; every other draws
    latents that a `vae` decodes, and without one only `output_type="latent"` is to be had.

    Args:
        transformer: a DiT or JiT with text_dim and without classes. scheduler: one of `pipelines.schedulers.FITTING`.
        text_encoder: the one it was trained with, and its tokenizer. vae: decodes the latents.

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
        super().__init__()
        settings = transformer.settings
        if not settings.text_dim or settings.num_classes:
            raise ValueError(
                f"the transformer has text_dim {settings.text_dim} and num_classes {settings.num_classes}; this "
                "pipeline is for models with text and without classes"
            )
        self.set_up(transformer, scheduler, vae, text_encoder=text_encoder, tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        negative_prompt: Prompt | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        num_images_per_prompt: int = 1,
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
            prompt: a text, or several. negative_prompt: what guidance leads away from, one for all or one a prompt;
                None: the model's null prompt.
            num_inference_steps: steps of the scheduler. guidance_scale: s in uncond + s * (cond - uncond); 1 for none.
            guidance_interval: times t, strictly between which there is guidance; 0 is noise, 1 is data, and both ends
                of the whole interval belong to it. guidance_channels: guide the first so many channels only; None: all.
            num_images_per_prompt: images of each prompt, one after another.
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
        self.check_request(request)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = self._negatives(negative_prompt, len(prompts))
        if num_images_per_prompt < 1 or not prompts:
            raise ValueError(
                f"there are {len(prompts)} prompts and num_images_per_prompt is {num_images_per_prompt}; both must be "
                "positive"
            )
        text = self.encode_prompts(prompts)
        negative = text.nothing() if negatives is None else self.encode_prompts(negatives)
        length = max(text.mask.shape[1], negative.mask.shape[1])
        places = torch.arange(len(prompts)).repeat_interleave(num_images_per_prompt).to(text.mask.device)
        has_pooled = self.settings.text_pooled_dim > 0
        conditions, null = (each.padded_to(length).rows(places).arguments(has_pooled) for each in (text, negative))
        return self.denoise(len(places), conditions, null, request, return_dict)

    def encode_prompts(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts, in the transformer's dtype; longer ones than it takes are cut, with a warning."""
        encoder = TextEncoder(
            self.text_encoder, self.tokenizer, self.settings.text_length, "of the pipeline", warn=logger.warning
        )
        text = encoder.encode(prompts).to(self._execution_device)
        dtype = self.transformer.dtype
        pooled = None if text.pooled is None else text.pooled.to(dtype)
        return text._replace(features=text.features.to(dtype), pooled=pooled)

    def _negatives(self, negative_prompt: Prompt | None, count: int) -> list[str] | None:
        if negative_prompt is None:
            return None
        negatives = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != count:
            raise ValueError(f"there are {len(negatives)} negative prompts for {count} prompts; give one, or one each")
        return negatives


# What save_pretrained records and from_pretrained looks up: the public name.
TextToImagePipeline.__module__ = "diffusion_moe"
