"""The records of a study: a JSON line a finished run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import require
from ..run_folder import write_atomically
from .definition import Study

Record = dict[str, Any]
"""A finished run: see `measure.measure_run`."""


def read_records(path: Path) -> list[Record]:
    """The records of a file; none if there is no file.

    Raises:
        ValueError: a line is no record.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        require(
            isinstance(record, dict) and "recipe_hash" in record,
            f"line {number} of {path} is no record of a study; remove it, and its run is measured again",
        )
        records.append(record)
    return records


def append_record(path: Path, record: Record) -> None:
    """Add a record; a reader, and a process that is killed, find the file whole with it or without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.is_file() else ""
    write_atomically(path, f"{before}{json.dumps(record)}\n")


def current(study: Study, records: Sequence[Record]) -> list[Record]:
    """The records of the study's runs in their order: one a run, the newest; those of other recipes are left out."""
    by_hash = {(r["recipe_hash"], r["variant"], r["scale"], r["seed"]): r for r in records}
    runs = [(run.hash, run.variant, run.scale, run.seed) for run in study.runs()]
    return [by_hash[key] for key in runs if key in by_hash]
