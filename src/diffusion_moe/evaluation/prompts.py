"""What the images of an evaluation show: prompts from a file, a run's held-out captions, or questions about shapes."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig, EvaluationConfig
from ..data import load_dataset
from ..data.captions import CachedCaptions
from ..log import Log
from ..run_folder import RunFolder
from ..sampling.generate import Prompts
from ..sampling.prompts import read_prompts
from ..sampling.source import Source
from ..shapes.prompts import CATEGORIES, SPLITS, Prompt, evaluation_prompts
from ..text import TextEncoder, TextFeatures, TextSpace
from .features import HASH_DIGITS
from .options import TextOptions


class PromptSource(ABC):
    """A prompt for each image: number i's is number i of them, which begin again after the last."""

    origin: str
    """Where they are from."""
    space: TextSpace
    """Whose features they get."""
    sha256: str
    """Start of a hash of them."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def features(self, numbers: Tensor) -> TextFeatures:
        """Of some of them, int64, each below their number."""

    def rows(self, places: Tensor, device: torch.device) -> Prompts:
        """Of the images of these numbers; guidance leads away from the model's null prompt."""
        text = self.features(places % len(self)).to(device)
        return Prompts(text, text.nothing())

    def identity(self) -> dict[str, Any]:
        """What images depend on."""
        return {"prompts": self.sha256, "text_encoder": self.space.sha256}

    def record(self) -> dict[str, Any]:
        """For the record of a score."""
        about = {"origin": self.origin, "count": len(self), "sha256": self.sha256}
        return {"prompts": about, "text_encoder": self.space.to_dict()}


class Texts(PromptSource):
    """Texts, encoded a batch at a time."""

    def __init__(self, texts: Sequence[str], origin: str, encoder: TextEncoder) -> None:
        self.texts, self.origin, self.encoder = list(texts), origin, encoder
        self.sha256 = digest_of(self.texts)
        self.space = encoder.space()

    def __len__(self) -> int:
        return len(self.texts)

    def features(self, numbers: Tensor) -> TextFeatures:
        return TextFeatures.together(self.encoder.encode_all([self.texts[number] for number in numbers.tolist()]))


class Questions(Texts):
    """Prompts about coloured shapes, whose images can be judged."""

    def __init__(self, prompts: Sequence[Prompt], origin: str, encoder: TextEncoder) -> None:
        super().__init__([prompt.text for prompt in prompts], origin, encoder)
        self.prompts = list(prompts)
        self.sha256 = digest_of([prompt.as_dict() for prompt in prompts])


class Cached(PromptSource):
    """The first captions of a latent cache's images, whose features are stored."""

    def __init__(self, captions: CachedCaptions, count: int, origin: str) -> None:
        self.captions, self.count, self.origin, self.space = captions, count, origin, captions.space
        self.sha256 = digest_of([captions.sha256, count])

    def __len__(self) -> int:
        return self.count

    def features(self, numbers: Tensor) -> TextFeatures:
        return self.captions.take(numbers, torch.zeros_like(numbers))


@dataclass
class Once:
    """Says the first line it is given: batches are encoded one by one, and each would tell of its cut prompts."""

    log: Log
    said: bool = False

    def __call__(self, line: str) -> None:
        if not self.said:
            self.log(line)
        self.said = True


def digest_of(content: Any) -> str:
    """Start of a SHA-256 over plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:HASH_DIGITS]


def prompts_of(
    source: Source, settings: EvaluationConfig, options: TextOptions, own: DataConfig | None, log: Log
) -> PromptSource | None:
    """The prompts of an evaluation's images; None for a model without text.

    Args:
        own: a run's data that judges its images itself; of coloured shapes the prompts are questions about them.

    Raises:
        ValueError: there are none, they cannot be read or encoded, or options do not fit.
    """
    check_text_options(source, options)
    if not source.config.text_dim:
        return None
    warn = Once(log)
    if own is not None and own.kind == "shapes":
        if options.prompts is not None:
            raise ValueError(
                f"prompts is {options.prompts}, but coloured shapes are judged by questions of their own; leave it "
                "out, or give --reference FILE to compare features instead"
            )
        asked = questions(settings.num_samples, settings.seed)
        origin = f"coloured shapes, {len(asked) // len(_GROUPS)} of each category and split, seed {settings.seed}"
        return Questions(asked, origin, source.load_text_encoder(options.text_encoder, warn))
    if options.prompts is not None:
        texts = read_prompts(None, options.prompts)
        return Texts(texts, str(options.prompts), source.load_text_encoder(options.text_encoder, warn))
    return held_out_captions(source, settings.num_samples, options.text_encoder, warn)


def check_text_options(source: Source, options: TextOptions) -> None:
    """Whether a model takes prompts, if there are any, and nothing else.

    Raises:
        ValueError: it does not.
    """
    if source.config.text_dim and source.config.num_classes:
        raise ValueError(f"the model of {source.path} takes classes and text, which only its forward can be given")
    for name, value in (("prompts", options.prompts), ("text_encoder", options.text_encoder)):
        if value is not None and not source.config.text_dim:
            raise ValueError(f"{name} is {value}, but the model of {source.path} takes no text; leave it out")


_GROUPS = tuple(product(SPLITS, CATEGORIES))


def questions(num_samples: int, seed: int) -> list[Prompt]:
    """As many of each category, seen and held out; the seen ones first.

    Raises:
        ValueError: the number cannot be spread evenly.
    """
    each, left = divmod(num_samples, len(_GROUPS))
    if left or not each:
        near = " or ".join(str(n * len(_GROUPS)) for n in (each, each + 1) if n)
        raise ValueError(
            f"num_samples is {num_samples}, but prompts of coloured shapes are of {len(CATEGORIES)} categories, seen "
            f"and held out, as many each; give a multiple of {len(_GROUPS)}, as {near}"
        )
    return [prompt for split in SPLITS for prompt in evaluation_prompts(seed, each, split)]


def held_out_captions(source: Source, count: int, text_encoder: str | None, log: Log) -> Texts | Cached:
    """The first caption of each of a run's held-out images, of as many as `count`.

    Raises:
        ValueError: the folder is no run, nothing is held out, or the captions cannot be read or encoded.
    """
    run, remedy = RunFolder(source.path), "give --prompts FILE, a prompt a line"
    if not run.recipe.is_file():
        raise ValueError(f"{source.path} is no run, so it has no captions of its own; {remedy}")
    data = run.read_recipe().data
    if data.test_fraction == 0:
        raise ValueError(f"data.test_fraction is 0, so there are no held-out captions; {remedy}")
    try:
        dataset = load_dataset(replace(data, text_encoder=None), "test")
    except ValueError as error:
        raise ValueError(f"the run's captions cannot be read: {error}; or {remedy}") from error
    origin = "held-out captions of " + " ".join(filter(None, (data.kind, data.path)))
    numbers = range(min(count, len(dataset)))
    if isinstance(dataset.texts, CachedCaptions):
        _check_cache(source, dataset.texts, text_encoder)
        return Cached(dataset.texts, len(numbers), origin)
    texts = [dataset.captions(number)[0] for number in numbers]
    return Texts(texts, origin, source.load_text_encoder(text_encoder, log))


def _check_cache(source: Source, captions: CachedCaptions, text_encoder: str | None) -> None:
    if text_encoder is not None:
        raise ValueError(
            f"text_encoder is {text_encoder}, but the captions of {captions.folder} are encoded; leave it out, or give "
            "--prompts FILE"
        )
    if source.text_space is not None and captions.space.sha256 != source.text_space.sha256:
        raise ValueError(
            f"the captions of {captions.folder} are of another text encoder than the model of {source.path}; encode "
            "them anew, or give --prompts FILE"
        )
