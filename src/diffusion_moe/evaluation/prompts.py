"""Prompts of an evaluation's images: from a file, or a run's held-out captions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data import load_dataset
from ..data.captions import CachedCaptions
from ..log import Log
from ..sampling.generate import Prompts
from ..sampling.loading import load_text_encoder
from ..sampling.prompts import read_prompts
from ..sampling.sampler import Sampler
from ..sampling.source import Source
from ..text import TextEncoder, TextFeatures, TextSpace
from .features import digest_of
from .options import TextOptions


class PromptSource(ABC):
    """A prompt for each image: image i has prompt i; after the last prompt they begin again."""

    origin: str
    """Source of the prompts, for people."""
    space: TextSpace
    """The encoder of their features."""
    sha256: str
    """Start of a hash of the prompts."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of prompts."""

    @abstractmethod
    def features(self, indices: Tensor) -> TextFeatures:
        """Features of some prompts, int64, each index below their number."""

    def rows(self, indices: Tensor, device: torch.device) -> Prompts:
        """The prompts of the images of these numbers; guidance leads away from the model's null prompt."""
        text = self.features(indices % len(self)).to(device)
        return Prompts(text, text.nothing())

    def identity(self) -> dict[str, Any]:
        """Everything that images depend on."""
        return {"prompts": self.sha256, "text_encoder": self.space.sha256}

    def metadata(self) -> dict[str, Any]:
        """Origin, number and hash of the prompts, and their encoder, for a file of scores."""
        prompts = {"origin": self.origin, "count": len(self), "sha256": self.sha256}
        return {"prompts": prompts, "text_encoder": asdict(self.space)}


class Texts(PromptSource):
    """Texts, encoded a batch at a time."""

    def __init__(self, texts: Sequence[str], origin: str, encoder: TextEncoder) -> None:
        self.texts, self.origin, self.encoder = list(texts), origin, encoder
        self.sha256 = digest_of(self.texts)
        self.space = encoder.space()

    def __len__(self) -> int:
        return len(self.texts)

    def features(self, indices: Tensor) -> TextFeatures:
        return TextFeatures.together(self.encoder.encode_all([self.texts[index] for index in indices.tolist()]))


class Cached(PromptSource):
    """The first captions of a latent cache's images, whose features are stored."""

    def __init__(self, captions: CachedCaptions, count: int, origin: str) -> None:
        self.captions, self.count, self.origin, self.space = captions, count, origin, captions.space
        self.sha256 = digest_of([captions.sha256, count])

    def __len__(self) -> int:
        return self.count

    def features(self, indices: Tensor) -> TextFeatures:
        return self.captions.take(indices, torch.zeros_like(indices))


@dataclass
class Once:
    """A log of the first line only: texts are encoded batch by batch, and each batch would log its cut prompts."""

    log: Log
    logged: bool = False

    def __call__(self, line: str) -> None:
        if not self.logged:
            self.log(line)
        self.logged = True


def check_text_options(source: Source, options: TextOptions) -> None:
    """Raise a ValueError for prompts of a model without text, and for a model of classes and text."""
    if source.config.text_dim and source.config.num_classes:
        raise ValueError(f"the model of {source.path} takes classes and text, which only its forward can be given")
    for name, value in (("prompts", options.prompts), ("text_encoder", options.text_encoder)):
        if value is not None and not source.config.text_dim:
            raise ValueError(f"{name} is {value}, but the model of {source.path} takes no text; remove the option")


def text_prompts(sampler: Sampler, options: TextOptions, log: Log) -> PromptSource:
    """The prompts of a file, or the first caption of each of a run's held-out images, a prompt an image at most."""
    source, warn = sampler.source, Once(log)
    if options.prompts is not None:
        texts = read_prompts(None, options.prompts)
        return Texts(texts, str(options.prompts), load_text_encoder(source, options.text_encoder, warn))
    remedy = "give --prompts FILE, a prompt a line"
    if source.recipe is None:
        raise ValueError(f"{source.path} is no run, so it has no captions of its own; {remedy}")
    data = source.recipe.data
    if data.test_fraction == 0:
        raise ValueError(f"data.test_fraction is 0, so there are no held-out captions; {remedy}")
    try:
        dataset = load_dataset(replace(data, text_encoder=None), "test")
    except ValueError as error:
        raise ValueError(f"the run's captions cannot be read: {error}; or {remedy}") from error
    origin = "held-out captions of " + " ".join(filter(None, (data.kind, data.path)))
    count = min(sampler.settings.num_samples, len(dataset))
    if not isinstance(dataset.texts, CachedCaptions):
        captions = [dataset.captions(index)[0] for index in range(count)]
        return Texts(captions, origin, load_text_encoder(source, options.text_encoder, warn))
    cached = dataset.texts
    if options.text_encoder is not None:
        raise ValueError(
            f"text_encoder is {options.text_encoder}, but the captions of {cached.folder} are encoded; remove the "
            "option, or give --prompts FILE"
        )
    if source.text_space is not None and cached.space.sha256 != source.text_space.sha256:
        raise ValueError(
            f"the captions of {cached.folder} are of another text encoder than the model of {source.path}; encode "
            "them again, or give --prompts FILE"
        )
    return Cached(cached, count, origin)
