"""Training the text encoder: T5's encoder with linear layers that predict facts, which are not kept.

Shape suffixes: B captions, L tokens of a caption, W width of features, F facts.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
from transformers.utils import logging

from ...log import Log
from ...randomness import derive_seed
from ..captions import WORDS
from .facts import FACTS, IGNORED, OBJECTS, UNKNOWN, Example, held_out_examples, texts, training_examples
from .options import TextEncoderOptions

RECORD = "training.json"
"""File in the encoder's folder with its options and accuracy."""
VERSION = 2
"""Version of the training task; encoders of other versions are refused."""
LINES = 5
"""Number of lines of progress."""
SEEN = 500
"""Number of seen captions for the accuracy."""
PAD, EOS = "<pad>", "</s>"


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, in lower case, without punctuation; `</s>` ends a text, and other words are `<unk>`."""
    vocabulary = {word: number for number, word in enumerate((PAD, EOS, UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


class FactBatch(NamedTuple):
    """A batch of captions."""

    input_ids: Tensor
    """(B, L), int64."""
    attention_mask: Tensor
    """(B, L), int64."""
    facts_BLF: Tensor
    """Classes, int64, or IGNORED."""
    objects_BF: Tensor
    """Classes of the whole captions, the facts of the second object after those of the first."""


class FactReader(nn.Module):
    """The encoder and the linear layers that predict facts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: TextEncoderOptions) -> None:
        super().__init__()
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=options.width,
            d_kv=options.width // options.heads,
            d_ff=4 * options.width,
            num_layers=options.layers,
            num_heads=options.heads,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        self.encoder = T5EncoderModel(config)
        classes = [len(values) for values in FACTS.values()]
        self.of_words = nn.ModuleList(nn.Linear(options.width, count) for count in classes)
        self.of_whole = nn.ModuleList(nn.Linear(options.width, count + 1) for count in OBJECTS * classes)

    def forward(self, batch: FactBatch) -> dict[str, list[Tensor]]:
        """Logits of each fact: from every word, (B, L, classes), and from their mean, (B, classes + 1)."""
        out = self.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        x_BLW = out.last_hidden_state
        mask_BL1 = batch.attention_mask[..., None].to(x_BLW.dtype)
        # As `models.text.TextEmbedder` takes it: normalised, then the mean.
        mean_BW = (F.layer_norm(x_BLW, x_BLW.shape[-1:]) * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
        return {
            "words": [reader(x_BLW) for reader in self.of_words],
            "mean": [reader(mean_BW) for reader in self.of_whole],
        }

    def loss(self, batch: FactBatch) -> Tensor:
        """Cross-entropy in nats, summed over the facts of an object, mean over objects; of words and whole together."""
        truths = [*batch.facts_BLF.unbind(-1), *batch.objects_BF.unbind(-1)]
        losses = [
            F.cross_entropy(logits.flatten(0, -2), truth.flatten(), ignore_index=IGNORED)
            for logits, truth in zip(itertools.chain(*self(batch).values()), truths)
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def accuracy(self, batch: FactBatch) -> dict[str, float]:
        """Shares of captions whose facts are all predicted correctly, from the words and from the mean."""
        shares = {}
        for (name, logits), truth in zip(self(batch).items(), (batch.facts_BLF, batch.objects_BF)):
            found = torch.stack([fact.argmax(dim=-1) for fact in logits], dim=-1)
            right_B = ((found == truth) | (truth == IGNORED)).flatten(1).all(dim=1)
            shares[name] = right_B.float().mean().item()
        return shares


def make_text_encoder(output: Path, options: TextEncoderOptions, log: Log = print) -> dict[str, Any]:
    """Train an encoder and save it with its tokenizer, whole or not at all; an existing one is kept.

    Returns:
        Content of `training.json`: options, last loss, and the shares of `accuracy`.

    Raises:
        ValueError: the folder has other content.
    """
    found = _finished(output, options)
    if found is not None:
        log(f"{output} holds this text encoder already")
        return found
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = make_tokenizer(WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(options.seed, "text/encoder"))
        model = FactReader(tokenizer, options)
        loss = train(model, tokenizer, options, log)
    seen = to_batch(tokenizer, training_examples(options.seed, options.steps + 1, SEEN, masked=0.0))
    held_out = to_batch(tokenizer, held_out_examples(options.seed))
    read = {"seen": model.accuracy(seen), "held_out": model.accuracy(held_out)}
    record = {"version": VERSION, "options": asdict(options), "loss": loss, "read_right": read}
    _save(output, model, tokenizer, record)
    shares = "; ".join(
        f"of {split.replace('_', '-')} captions {share['words']:.1%} by their words, {share['mean']:.1%} by the mean"
        for split, share in read.items()
    )
    log(f"wrote {output}: reads right {shares}")
    return record


def train(model: FactReader, tokenizer: PreTrainedTokenizerFast, options: TextEncoderOptions, log: Log) -> float:
    """Train, and return the loss of the last step."""
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.01)
    every, value = math.ceil(options.steps / LINES), math.nan
    model.train()
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate(step, options.steps)
        loss = model.loss(to_batch(tokenizer, training_examples(options.seed, step, options.batch_size)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0 or step == options.steps:
            value = loss.item()
            log(f"text encoder: step {step}/{options.steps}  loss {value:.4f}")
    model.eval()
    return value


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: up over the first tenth, then a cosine down to 0."""
    warmup = max(steps // 10, 1)
    return min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * max(step - warmup, 0) / max(steps - warmup, 1)))


def to_batch(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> FactBatch:
    """Tokenize captions and pad their facts."""
    tokens = tokenizer(texts(examples), padding=True, return_tensors="pt")
    facts_BLF = torch.full((*tokens["input_ids"].shape, len(FACTS)), IGNORED)
    for row, example in zip(facts_BLF, examples):
        row[: len(example.words)] = torch.tensor(example.facts)
    objects_BF = torch.tensor([example.objects for example in examples])
    return FactBatch(tokens["input_ids"], tokens["attention_mask"], facts_BLF, objects_BF)


def _finished(output: Path, options: TextEncoderOptions) -> dict[str, Any] | None:
    """The record of a folder with the encoder of these options; None if the folder is missing or empty."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        record = json.loads((output / RECORD).read_text())
        if (record["version"], record["options"]) == (VERSION, asdict(options)):
            return record
    except (OSError, KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{output} holds something else, or an encoder of other options or version; give another folder")


def _save(output: Path, model: FactReader, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> None:
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.encoder.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    if output.is_dir():
        output.rmdir()  # it is empty
    partial.rename(output)
