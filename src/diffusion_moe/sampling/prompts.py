"""Prompts as a user gives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..log import Log
from ..text import TextFeatures
from .generate import Prompts
from .loading import load_text_encoder
from .options import SampleOptions
from .source import Source


def encode_prompts(prompts: Sequence[str], options: SampleOptions, source: Source, log: Log) -> Prompts:
    """Features of prompts, each `per_class` times one after another, on the CPU."""
    encoder = load_text_encoder(source, options.text_encoder, log)
    texts = encoder.encode_all(prompts)
    text = TextFeatures.together(texts).rows(torch.arange(len(prompts)).repeat_interleave(options.per_class))
    if options.negative_prompt is None:
        return Prompts(text, text.nothing())
    negative = TextFeatures.together(encoder.encode_all([options.negative_prompt]))
    return Prompts(text, negative.rows(torch.zeros(len(text.mask), dtype=torch.long)))


def requested_prompts(options: SampleOptions, source: Source) -> tuple[str, ...]:
    """The prompts of options; empty for a model without text.

    Raises:
        ValueError: they cannot be read, or they do not fit the model.
    """
    prompts = read_prompts(options.prompt, options.prompts)
    if bool(prompts) != bool(source.config.text_dim):
        remedy = "takes no text; remove the prompts" if prompts else "takes text; give --prompt or --prompts"
        raise ValueError(f"the model of {source.path} {remedy}")
    if prompts and source.config.num_classes:
        raise ValueError(f"the model of {source.path} takes classes and text, which only its forward can be given")
    return prompts


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
