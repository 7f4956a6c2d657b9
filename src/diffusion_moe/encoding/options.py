"""Options of `encode`; imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import require


@dataclass(frozen=True)
class EncodeOptions:
    """VAE, contents and folder of a latent cache."""

    vae: str
    """Hub id or folder of an AutoencoderKL."""
    output: Path
    """Folder of the cache. The same command on the same folder resumes."""
    store: Literal["moments", "samples"] = "moments"
    """moments: mean and standard deviation, from which every epoch samples; samples: one sample, half the size."""
    flip: bool = True
    """Store the mirrored image's latent too, which data.flip needs."""
    shard_images: int = 4096
    """Images of one file; a stopped command loses its unfinished file."""
    batch_size: int = 32
    """Images encoded at a time."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the VAE."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one; each process takes a GPU of its own."""
    seed: int = 0
    """Seed of the samples (store: samples)."""
    captions: str | None = None
    """Encode captions too: a column (kind: huggingface), key of metadata.jsonl (folder), or txt or a key of the json
    files (webdataset). May be added to an existing cache."""
    text_encoder: str | None = None
    """Hub id or folder of the text encoder (captions)."""
    text_length: int = 77
    """Tokens that captions are cut to (captions)."""
    text_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the text encoder (captions)."""
    verify: bool = False
    """Compare existing files with their hashes, and encode damaged ones again."""

    def __post_init__(self) -> None:
        require(
            (self.captions is None) == (self.text_encoder is None),
            f"captions is {self.captions} and text_encoder {self.text_encoder}; give both or neither",
        )
        for name in ("text_length", "shard_images", "batch_size"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; choose from 0 to 2^63 - 1")
