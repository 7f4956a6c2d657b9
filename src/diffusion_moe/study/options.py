"""Options of `study`. This file imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import require


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study: its plan, page and records."""

    plan: bool = False
    """Print variants, parameters, compute and the estimated time, and stop."""
    page: Path | None = None
    """Write the page here from the records alone, without training; else OUTPUT/study.md after each run."""
    records: Path | None = None
    """File of the records, a JSON line a finished run; OUTPUT/records.jsonl unless given."""
    gflops: float = 20.0
    """Speed that the plan assumes for runs without a record: billions of operations a second."""

    def __post_init__(self) -> None:
        require(self.gflops > 0, f"gflops is {self.gflops}; it must be positive")
        require(not (self.plan and self.page), "--plan and --page are both given; give one")
