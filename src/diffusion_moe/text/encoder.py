"""Frozen text encoders of `transformers`, by hub id or folder: T5, CLIP, or any other encoder.

None of their code is downloaded, and only safetensors weights are read.

Shape suffixes: B texts, L tokens of a text, W width, P pooled width.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed import to_device
from ..log import Log
from .features import Precision, TextFeatures, TextSpace

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = 3
"""Prompts or words that a warning names at most."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


class TextEncoder:
    """An encoder and its tokenizer, in eval mode.

    Args:
        model: the encoder.
        tokenizer: its tokenizer.
        length: tokens that prompts are cut to, or fewer if the encoder has fewer positions.
        name: hub id or folder, for messages and metadata.
        warn: receives a line when prompts are cut or have unknown words; Python's warnings by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        name: str = "",
        warn: Log = _warn,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.warn = warn
        self._space: TextSpace | None = None
        self.length = min(length, _max_positions(model.config))
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of the text encoder {name} has no padding token; give another encoder")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def precision(self) -> Precision:
        return "bf16" if next(self.model.parameters()).dtype == torch.bfloat16 else "fp32"

    def to(self, device: torch.device) -> TextEncoder:
        """Move the encoder, in place."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of the last layer, on the encoder's device, float32, padded to the longest prompt."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        self._warn_of_cuts(prompts)
        self._warn_of_unknown_words(prompts, tokens)
        ids, mask = (to_device(tokens[name], self.device) for name in ("input_ids", "attention_mask"))
        output = self.model(input_ids=ids, attention_mask=mask)
        features, mask = output.last_hidden_state, mask.bool()
        if not tokens["attention_mask"][:, 0].all():  # padded on the left: move the tokens to the front
            order = (~mask).long().argsort(dim=1, stable=True)
            features = features.gather(1, order[..., None].expand_as(features))
            mask = mask.gather(1, order)
        return TextFeatures(features, mask, pooled_feature(output)).cast(torch.float32)

    def encode_all(self, prompts: Sequence[str], batch_size: int = 64) -> list[TextFeatures]:
        """Features of each prompt by itself, without padding, on the CPU."""
        texts: list[TextFeatures] = []
        for start in range(0, len(prompts), batch_size):
            batch = self.encode(prompts[start : start + batch_size]).to(torch.device("cpu"))
            for i, length in enumerate(batch.mask.sum(dim=1).tolist()):
                one = batch.rows(slice(i, i + 1))
                texts.append(one._replace(features=one.features[:, :length], mask=one.mask[:, :length]))
        return texts

    def space(self) -> TextSpace:
        """Metadata of the features."""
        if self._space is None:
            empty = self.encode([""])
            pooled = 0 if empty.pooled is None else empty.pooled.shape[1]
            width = empty.features.shape[2]
            self._space = TextSpace(self.name, self.sha256(), width, pooled, self.length, self.precision)
        return self._space

    def sha256(self) -> str:
        """A hash of weights and vocabulary, the same for both precisions."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            bits = tensor.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16)
            digest.update(bits.numpy().tobytes())
        for word, number in sorted(self.tokenizer.get_vocab().items()):
            digest.update(f"{word} {number}\n".encode())
        return digest.hexdigest()

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        suspects = [prompt for prompt in prompts if len(prompt) >= self.length // 2]  # a token has a byte at least
        if not suspects:
            return
        lengths = map(len, self.tokenizer(suspects, truncation=False, verbose=False)["input_ids"])
        cut = [f"{prompt[:40]!r}... ({count})" for prompt, count in zip(suspects, lengths) if count > self.length]
        if cut:
            named = ", ".join(cut[:EXAMPLES])
            more = f" and {len(cut) - EXAMPLES} more" if len(cut) > EXAMPLES else ""
            self.warn(f"prompts of more than {self.length} tokens are cut to that: {named}{more}")

    def _warn_of_unknown_words(self, prompts: Sequence[str], tokens: BatchEncoding) -> None:
        unknown, tokenizer = self.tokenizer.unk_token_id, self.tokenizer
        if unknown in (None, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):  # as CLIP's
            return
        if not bool((tokens["input_ids"] == unknown).any()):
            return
        words = [
            prompt[first:end]
            for prompt, encoding in zip(prompts, tokens.encodings or [])
            for number, (first, end) in zip(encoding.ids, encoding.offsets)
            if number == unknown
        ]
        named = ", ".join(repr(word) for word in sorted(set(words))[:EXAMPLES])
        self.warn(f"the text encoder {self.name} does not know {named or 'some words of the prompts'}")


def pooled_feature(output: Any) -> Tensor | None:
    """Pooled feature, (B, P): CLIP's projected one, that of CLIP's or BERT's pooler, or None."""
    projected = getattr(output, "text_embeds", None)
    return getattr(output, "pooler_output", None) if projected is None else projected


def load_encoder(name: str, length: int, precision: Precision = "fp32", warn: Log = _warn) -> TextEncoder:
    """Load an encoder and its tokenizer by folder or hub id, on the CPU.

    A folder may hold both, or the sub-folders `text_encoder` and `tokenizer` of a pipeline. A hub id is OWNER/NAME, or
    OWNER/NAME/text_encoder for that of a pipeline.

    Raises:
        ValueError: the encoder cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = str(Path(name).resolve()) if Path(name).exists() else name
    model_location, tokenizer_location = _locations(name)
    try:
        config = AutoConfig.from_pretrained(**model_location)
        kind = _encoder_class(config)
        model = kind.from_pretrained(**model_location, use_safetensors=True, dtype=DTYPES[precision])
        if config.is_encoder_decoder and hasattr(model, "get_encoder") and hasattr(model, "decoder"):
            model = model.get_encoder()
        tokenizer = AutoTokenizer.from_pretrained(**tokenizer_location)
    except Exception as error:  # transformers raises almost anything on files of other kinds
        raise ValueError(f"cannot load the text encoder {name}: {' '.join(str(error).split())[:300]}") from error
    return TextEncoder(model, tokenizer, length, name, warn)


def _locations(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of from_pretrained for the model and for the tokenizer."""
    path, parts = Path(name), name.split("/", 2)
    repository, folder = name, ""
    if (path / "text_encoder").is_dir() and (path / "tokenizer").is_dir():
        folder = "text_encoder"
    elif not path.exists() and len(parts) == 3:
        repository, folder = "/".join(parts[:2]), parts[2]
    encoder: dict[str, Any] = {"pretrained_model_name_or_path": repository, "subfolder": folder}
    encoder["trust_remote_code"] = False
    return encoder, encoder | {"subfolder": folder.replace("text_encoder", "tokenizer")}


def _encoder_class(config: Any) -> Any:
    """Class that reads the encoder's part of a checkpoint."""
    import transformers
    from transformers import AutoModel, AutoModelForTextEncoding

    if config.model_type in ("clip", "clip_text_model"):
        named = (config.architectures or [""])[0]
        projected = named == "CLIPTextModelWithProjection"
        return transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    known = type(config) in AutoModelForTextEncoding._model_mapping
    return AutoModelForTextEncoding if known else AutoModel


def _max_positions(config: Any) -> int:
    """Number of positions of an encoder; very large for relative positions."""
    if getattr(config, "relative_attention_num_buckets", None):
        return 2**31
    return int(getattr(config, "max_position_embeddings", None) or 2**31)
