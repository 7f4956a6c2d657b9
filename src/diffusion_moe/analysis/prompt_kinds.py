"""Prompts of a text model's analysis, and their kinds, which replace classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import ImageDataset
from ..data.captions import CachedCaptions
from ..evaluation.options import TextOptions
from ..evaluation.prompts import Once, PromptSource, Texts, check_text_options, text_prompts
from ..evaluation.shapes_scorer import CATEGORIES, Questions, questions_in_turn
from ..log import Log
from ..sampling.generate import Prompts
from ..sampling.loading import load_text_encoder
from ..sampling.sampler import Sampler
from ..sampling.source import Source
from ..text import TextFeatures
from .recorder import RoutingRecord
from .style import MANY


@dataclass(frozen=True)
class PromptKinds:
    """A prompt for each image."""

    prompts: PromptSource
    kinds_I: Tensor
    """Kind of the prompt of each image, int64."""
    names: list[str]
    """Names of the kinds."""
    kind: str
    """Meaning of a kind: category or prompt."""
    record: RoutingRecord | None = None
    """Set the kinds of a batch in this record when its prompts are taken."""

    def rows(self, indices: Tensor, device: torch.device) -> Prompts:
        """Prompts of the images of these numbers."""
        if self.record is not None:
            self.record.kinds_B = self.kinds_I[indices]
        return self.prompts.rows(indices, device)

    def texts(self, count: int) -> list[str]:
        """Prompts of the first images; empty where only their features are stored."""
        if not isinstance(self.prompts, Texts):
            return []
        return [self.prompts.texts[i % len(self.prompts)] for i in range(count)]


def prompt_kinds_of(sampler: Sampler, options: TextOptions, log: Log) -> PromptKinds | None:
    """The prompts of an analysis: those of a file, a run's held-out captions, or questions about coloured shapes.

    Kinds are the categories of shapes or the prompts of a short file; otherwise all prompts are of one kind.
    None for a model without text.
    """
    source, count = sampler.source, sampler.settings.num_samples
    check_text_options(source, options)
    if not source.config.text_dim:
        return None
    if options.prompts is None and source.recipe is not None and source.recipe.data.kind == "shapes":
        asked = questions_in_turn(count, sampler.settings.seed)
        encoder = load_text_encoder(source, options.text_encoder, Once(log))
        questions = Questions(asked, "coloured shapes, their categories in turn", encoder)
        kinds = torch.tensor([CATEGORIES.index(prompt.category) for prompt in asked])
        return PromptKinds(questions, kinds, [name.replace("_", " ") for name in CATEGORIES], "category")
    prompts = text_prompts(sampler, options, log)
    if options.prompts is not None and isinstance(prompts, Texts) and len(prompts) <= MANY:
        return PromptKinds(prompts, torch.arange(count) % len(prompts), prompts.texts, "prompt")
    return PromptKinds(prompts, torch.zeros(count, dtype=torch.long), ["all"], "prompt")


def captions_of(
    source: Source, dataset: ImageDataset, rows: list[int], text_encoder: str | None
) -> TextFeatures | None:
    """Features of the first captions of some images; None for a model without text."""
    if not source.config.text_dim:
        return None
    if isinstance(dataset.texts, CachedCaptions):
        return dataset.first_texts(torch.tensor(rows))
    encoder = load_text_encoder(source, text_encoder, lambda line: None)
    return TextFeatures.together(encoder.encode_all([dataset.captions(row)[0] for row in rows]))
