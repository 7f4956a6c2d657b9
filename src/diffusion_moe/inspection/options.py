"""Options of `inspect`; imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InspectOptions:
    """Output of `inspect`."""

    json: bool = False
    """Print one JSON object instead of text."""
    output: Path | None = None
    """Folder to write contact-sheet.png to: some images of each class, as training sees them."""
    pixels: Path | None = None
    """File NAME.npz to write all images to, as training sees them: `images` (uint8, NHWC), `labels`, `files`."""

    def __post_init__(self) -> None:
        if self.pixels is not None and self.pixels.suffix != ".npz":
            raise ValueError(f"pixels is {self.pixels}; give a file that ends in .npz")
