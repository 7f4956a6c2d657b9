"""Options of the command; imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import require


@dataclass(frozen=True)
class EncodeOptions:
    """Which VAE, what to store, and where."""

    vae: str
    """Hub id or folder of an AutoencoderKL."""
    output: Path
    """Folder of the cache. The same command on the same folder goes on where it stopped."""
    store: Literal["moments", "samples"] = "moments"
    """moments: mean and standard deviation, so that every epoch draws anew; samples: one draw, half the size."""
    flip: bool = True
    """Store the mirrored image's latent too, as data.flip needs it."""
    shard_images: int = 4096
    """Images of one file; a stopped command loses what is not yet a whole file."""
    batch_size: int = 32
    """Images encoded at a time."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the VAE computes in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one; of several processes each takes its own."""
    seed: int = 0
    """Of the draws (store: samples)."""
    captions: str | None = None
    """Encode captions too: a column (kind: huggingface), key of metadata.jsonl (folder), or txt or a key of the json
    files (webdataset). May be added to a cache that is there."""
    text_encoder: str | None = None
    """Hub id or folder of the text encoder (captions)."""
    text_length: int = 77
    """Tokens that captions are cut to (captions)."""
    text_precision: Literal["fp32", "bf16"] = "fp32"
    """What the text encoder computes in (captions)."""
    verify: bool = False
    """Compare files that are there with their hashes, and encode damaged ones again."""

    def __post_init__(self) -> None:
        require(
            (self.captions is None) == (self.text_encoder is None),
            f"captions is {self.captions} and text_encoder {self.text_encoder}; give both or neither",
        )
        require(self.text_length > 0, f"text_length is {self.text_length}; it must be positive")
        require(self.shard_images > 0, f"shard_images is {self.shard_images}; it must be positive")
        require(self.batch_size > 0, f"batch_size is {self.batch_size}; it must be positive")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; choose from 0 to 2^63 - 1")
