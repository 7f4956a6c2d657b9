"""Features of texts from an encoder. Shape suffixes: B texts, L tokens of a text, W width, P pooled width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import to_device

Precision = Literal["fp32", "bf16"]


class TextFeatures(NamedTuple):
    """Features of a batch of texts; a text whose mask is false everywhere is no prompt."""

    features: Tensor
    """(B, L, W)."""
    mask: Tensor
    """True for tokens, false for padding, bool, (B, L); tokens come first."""
    pooled: Tensor | None = None
    """(B, P), if the encoder has a pooled feature."""

    @classmethod
    def padded(cls, texts: Sequence[Tensor], pooled: Tensor | None = None) -> TextFeatures:
        """A batch of texts of different lengths, (L, W) each."""
        lengths = torch.tensor([len(text) for text in texts])
        features = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        return cls(features, torch.arange(features.shape[1]) < lengths[:, None], pooled)

    @classmethod
    def together(cls, texts: Sequence[TextFeatures]) -> TextFeatures:
        """A batch of single texts without padding."""
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return cls.padded([text.features[0] for text in texts], torch.cat(pooled) if pooled else None)

    @classmethod
    def joined(cls, first: TextFeatures, second: TextFeatures) -> TextFeatures:
        """Both batches as one, the shorter one padded."""
        length = max(first.mask.shape[1], second.mask.shape[1])
        one, two = first.padded_to(length), second.padded_to(length)
        pooled = None
        if one.pooled is not None and two.pooled is not None:
            pooled = torch.cat((one.pooled, two.pooled))
        return cls(torch.cat((one.features, two.features)), torch.cat((one.mask, two.mask)), pooled)

    def padded_to(self, length: int) -> TextFeatures:
        """The same texts padded to `length` tokens."""
        room = length - self.mask.shape[1]
        return self._replace(features=F.pad(self.features, (0, 0, 0, room)), mask=F.pad(self.mask, (0, room)))

    def rows(self, indices: Tensor | slice) -> TextFeatures:
        """Some of the texts, by their indices in the batch."""
        return self._each(lambda part: part[indices])

    def to(self, device: torch.device) -> TextFeatures:
        """The same texts on a device, float32."""
        return self._each(lambda part: to_device(part, device)).cast(torch.float32)

    def cast(self, dtype: torch.dtype) -> TextFeatures:
        """The same texts with features of this type."""
        return self._each(lambda part: part if part.dtype == torch.bool else part.to(dtype))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TextFeatures:
        pooled = None if self.pooled is None else change(self.pooled)
        return TextFeatures(change(self.features), change(self.mask), pooled)

    def dropped(self, dropped_B: Tensor) -> TextFeatures:
        """The same texts without prompts where `dropped_B` is true."""
        return self._replace(mask=self.mask & ~dropped_B[:, None])

    def nothing(self) -> TextFeatures:
        """The same number of texts without prompts."""
        return self._replace(mask=torch.zeros_like(self.mask))

    def arguments(self, with_pooled: bool = True) -> dict[str, Tensor | None]:
        """Arguments for the forward of a model with or without pooled features."""
        return {
            "encoder_hidden_states": self.features,
            "encoder_attention_mask": self.mask,
            "pooled_projections": self.pooled if with_pooled else None,
        }


@dataclass(frozen=True)
class TextSpace:
    """The text encoder of features."""

    encoder: str
    """Hub id or folder of the text encoder."""
    sha256: str
    """Hash of its weights in bfloat16, and of its tokenizer's vocabulary."""
    width: int
    pooled_width: int
    """0 without a pooled feature."""
    length: int
    """Tokens that texts are cut to."""
    precision: Precision
    """Precision of the encoder."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TextSpace:
        """The space from `dataclasses.asdict`; KeyError, TypeError or ValueError if it is damaged."""
        sizes = {name: int(content[name]) for name in ("width", "pooled_width", "length")}
        if content["precision"] not in ("fp32", "bf16") or min(sizes.values()) < 0:
            raise ValueError(f"precision is {content['precision']}, sizes are {sizes}")
        return cls(str(content["encoder"]), str(content["sha256"]), precision=content["precision"], **sizes)
