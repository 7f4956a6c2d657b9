"""The options of `diffusion-moe analyze`. This file imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..evaluation.options import TextOptions


@dataclass(frozen=True)
class AnalyzeOptions(TextOptions):
    """Folder of the report, and runs to compare."""

    output: Path | None = None
    """Folder for report.html, the figures and their data; figures/ inside the folder unless given."""
    compare: str | None = None
    """Runs whose losses are plotted too, as runs/a,runs/b; they must have the same data and loss."""

    def compared(self) -> list[Path]:
        """The runs one by one."""
        return [] if self.compare is None else [Path(part.strip()) for part in self.compare.split(",") if part.strip()]
