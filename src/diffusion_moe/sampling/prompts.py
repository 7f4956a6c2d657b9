"""Prompts as a user gives them, and sizes in pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import ModelConfig
from ..log import Log
from ..text import TextFeatures
from .generate import Prompts
from .source import Source

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class PromptRequest:
    """Texts to draw."""

    prompts: tuple[str, ...]
    negative: str | None = None
    """What guidance leads away from; None: the model's null prompt."""
    text_encoder: str | None = None
    """Where the encoder is, if not where training left it."""

    def encoded(self, source: Source, each: int, log: Log) -> Prompts:
        """Features of the prompts, `each` times one after another, on the CPU."""
        encoder = source.load_text_encoder(self.text_encoder, log)
        texts = encoder.encode_all(self.prompts)
        text = TextFeatures.together(texts).rows(torch.arange(len(self.prompts)).repeat_interleave(each))
        if self.negative is None:
            return Prompts(text, text.nothing())
        negative = TextFeatures.together(encoder.encode_all([self.negative]))
        return Prompts(text, negative.rows(torch.zeros(len(text.mask), dtype=torch.long)))

    def record(self, each: int) -> dict[str, Any]:
        """For the file beside the images."""
        return {"prompts": list(self.prompts), "per_prompt": each, "negative_prompt": self.negative}

    def name(self) -> str:
        """A part of a file's name that other prompts do not share."""
        text = "\n".join((*self.prompts, repr(self.negative)))
        return f"prompts{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_prompts(prompt: str | None, file: Path | None) -> tuple[str, ...]:
    """The one prompt, or those of a text file, a line each; empty without either.

    Raises:
        ValueError: both are given, or the file cannot be read or is empty.
    """
    if prompt is not None and file is not None:
        raise ValueError(f"prompt is {prompt!r} and prompts {file}; give one of them")
    if file is None:
        return () if prompt is None else (prompt,)
    try:
        lines = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts from {file}: {error}") from error
    if not lines:
        raise ValueError(f"prompts {file} holds no line; write one prompt a line")
    return lines


def model_size(
    size: tuple[int | None, int | None], config: ModelConfig, vae: AutoencoderKL | None
) -> tuple[int, int] | None:
    """Height and width in the model's space of an image's in pixels; None: the model's own.

    Raises:
        ValueError: the patches do not fill them.
    """
    if size == (None, None):
        return None
    shrinks_by = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    multiple, own = shrinks_by * config.patch_size, shrinks_by * config.sample_size
    height, width = (own if side is None else side for side in size)
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            raise ValueError(f"{name} is {side}; it must be a positive multiple of {multiple}")
    return height // shrinks_by, width // shrinks_by
