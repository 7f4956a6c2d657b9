"""Any vision model of `transformers` as an extractor, such as DINOv2 (FD-DINOv2: arXiv 2306.04675)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Extractor, ExtractorIdentity, fingerprint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of colours, for models that name none."""
CLASS_TOKENS = ("cls_token", "class_embedding")


class VisionModel(Extractor):
    """`pool` (S, D): the class token after the last layer; without one, the mean over positions.

    Images are resized to the model's square by an antialiased bicubic filter in float32, whatever their shape.
    """

    channels = 3

    def __init__(self, name: str) -> None:
        model, settings = _load(name)
        self.module = model
        self.size = _side(settings, model.config)
        mean = tuple(settings.get("image_mean") or IMAGENET_MEAN)
        std = tuple(settings.get("image_std") or IMAGENET_STD)
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (mean, std))
        self.has_class_token = any(key.split(".")[-1] in CLASS_TOKENS for key, _ in model.named_parameters())
        numbers = ",".join(f"{x:g}" for x in (*mean, *std))
        self.identity = ExtractorIdentity(
            name,
            fingerprint(model),
            f"bicubic antialiased to {self.size}, normalised by {numbers}",
            "class token" if self.has_class_token else "mean over places",
        )

    def to(self, device: torch.device) -> Extractor:
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return super().to(device)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        pixels = resize(images, self.size) / 255
        pixels = (pixels - self.mean) / self.std
        hidden = self.module(pixel_values=pixels).last_hidden_state
        if hidden.dim() == 4:  # a convolutional network's map
            hidden = hidden.flatten(2).transpose(1, 2)
        return {"pool": hidden[:, 0] if self.has_class_token else hidden.mean(1)}


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 NCHW to float32 of `size` x `size`, 0 to 255, not rounded: Pillow's bicubic filter on float planes."""
    pixels = images.float()
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return pixels


def _load(name: str) -> tuple[Any, dict[str, Any]]:
    """The model in eval mode, and its preprocessor's settings."""
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.image_processing_base import ImageProcessingMixin
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ValueError(
            f"{name} needs transformers ({error}); install it with `pip install diffusion-moe[eval]`"
        ) from error
    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        model = AutoModel.from_pretrained(name, config=config, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot load the extractor {name}: {reason}; give inception, classifier, or a vision model's id or folder"
        ) from error
    model = getattr(model, "vision_model", model)  # for models that also read text
    if not hasattr(model.config, "image_size") and not hasattr(model.config, "num_channels"):
        raise ValueError(f"{name} is a {type(model).__name__}, which reads no images; give a vision model")
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):  # it has none
        settings = {}
    return model.eval().requires_grad_(False), settings


def _side(settings: dict[str, Any], config: Any) -> int:
    """Height and width of the images in pixels that the model was trained on."""
    for key in ("crop_size", "size"):
        value = settings.get(key)
        if isinstance(value, int):
            return value
        if isinstance(value, dict):
            return int(value.get("height") or value.get("shortest_edge") or 224)
    side = getattr(config, "image_size", None) or 224
    return int(side[0] if isinstance(side, list | tuple) else side)
