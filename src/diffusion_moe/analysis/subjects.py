"""What the images of a text model's analysis show, and which kinds of prompts take the place of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import EvaluationConfig
from ..data import ImageDataset
from ..data.captions import CachedCaptions
from ..evaluation.options import TextOptions
from ..evaluation.prompts import Once, PromptSource, Texts, check_text_options, held_out_captions
from ..evaluation.shapes_scorer import Questions
from ..log import Log
from ..run_folder import RunFolder
from ..sampling.generate import Prompts
from ..sampling.loading import load_text_encoder
from ..sampling.prompts import read_prompts
from ..sampling.source import Source
from ..shapes.prompts import CATEGORIES, SPLITS, Prompt, evaluation_prompts
from ..text import TextFeatures
from .records import RoutingRecord
from .style import MANY


class Subjects(NamedTuple):
    """A prompt for each image."""

    shown: PromptSource
    kinds_I: Tensor
    """Kind of the prompt of each image, int64."""
    names: list[str]
    """Of the kinds."""
    kind: str
    """What a kind is: category or prompt."""

    def texts(self, count: int) -> list[str]:
        """The prompts of the first images; empty where only their features are known."""
        if not isinstance(self.shown, Texts):
            return []
        return [self.shown.texts[i % len(self.shown)] for i in range(count)]


def subjects_of(source: Source, settings: EvaluationConfig, options: TextOptions, log: Log) -> Subjects | None:
    """The prompts of an analysis: a file's, or a run's held-out captions, or of coloured shapes questions.

    Kinds are the categories of shapes, or the prompts of a short file; else all prompts are of one kind.

    Returns:
        None for a model without text.

    Raises:
        ValueError: there are none, they cannot be read or encoded, or options do not fit.
    """
    check_text_options(source, options)
    if not source.config.text_dim:
        return None
    count, warn, run = settings.num_samples, Once(log), RunFolder(source.path)
    if options.prompts is not None:
        texts = read_prompts(None, options.prompts)
        shown = Texts(texts, str(options.prompts), load_text_encoder(source, options.text_encoder, warn))
        if len(texts) <= MANY:
            return Subjects(shown, torch.arange(count) % len(texts), list(texts), "prompt")
        return Subjects(shown, torch.zeros(count, dtype=torch.long), ["all"], "prompt")
    if run.recipe.is_file() and run.read_recipe().data.kind == "shapes":
        asked, encoder = in_turn(count, settings.seed), load_text_encoder(source, options.text_encoder, warn)
        questions = Questions(asked, "coloured shapes, their categories in turn", encoder)
        kinds = torch.tensor([CATEGORIES.index(prompt.category) for prompt in asked])
        return Subjects(questions, kinds, [name.replace("_", " ") for name in CATEGORIES], "category")
    captions = held_out_captions(source, count, options.text_encoder, warn)
    return Subjects(captions, torch.zeros(count, dtype=torch.long), ["all"], "prompt")


def in_turn(count: int, seed: int) -> list[Prompt]:
    """Questions about coloured shapes: one of each category that training has seen, one of each held out, and again."""
    C = len(CATEGORIES)
    each = -(-count // (len(SPLITS) * C))
    found = {split: evaluation_prompts(seed, each, split) for split in SPLITS}  # category by category
    return [found[split][c * each + i] for i in range(each) for split in SPLITS for c in range(C)][:count]


@dataclass(frozen=True)
class Noted:
    """Prompts that tell a record which kinds they are of, before each batch."""

    subjects: Subjects
    record: RoutingRecord

    def rows(self, places: Tensor, device: torch.device) -> Prompts:
        """Of the images of these numbers."""
        self.record.kinds_B = self.subjects.kinds_I[places]
        return self.subjects.shown.rows(places, device)


def captions_of(
    source: Source, dataset: ImageDataset, rows: list[int], text_encoder: str | None
) -> TextFeatures | None:
    """The first captions of some images as a model sees them; None for one without text.

    Raises:
        ValueError: the encoder cannot be loaded, or is not the model's.
    """
    if not source.config.text_dim:
        return None
    if isinstance(dataset.texts, CachedCaptions):
        return dataset.first_texts(torch.tensor(rows))
    encoder = load_text_encoder(source, text_encoder, Once(lambda line: None))
    return TextFeatures.together(encoder.encode_all([dataset.captions(row)[0] for row in rows]))
