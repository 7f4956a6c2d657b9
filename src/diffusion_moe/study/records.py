"""The records of a study: a JSON line a finished run, and a line a scale with the seconds of a step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import require
from ..run_folder import lock_file, write_atomically
from .definition import Study, recipe_hash

Record = dict[str, Any]
"""A finished run, see `measure.measure_run`; or a timing, see `timing.time_scale`."""


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
            isinstance(record, dict) and ("recipe_hash" in record or "step_seconds" in record),
            f"line {number} of {path} is no record of a study; remove it, and its run is measured again",
        )
        records.append(record)
    return records


def append_record(path: Path, record: Record) -> None:
    """Add a record; a reader, and a process that is killed, find the file whole with it or without it."""
    with lock_file(path.with_name(f".{path.name}.lock")):
        before = path.read_text() if path.is_file() else ""
        write_atomically(path, f"{before}{json.dumps(record)}\n")


def current(study: Study, records: Sequence[Record]) -> list[Record]:
    """The records of the study's runs in their order: one a run, the newest; those of other recipes are left out."""
    by_hash = {(r["recipe_hash"], r["variant"], r["scale"], r["seed"]): r for r in runs_of(records)}
    runs = [(run.hash, run.variant, run.scale, run.seed) for run in study.runs()]
    return [by_hash[key] for key in runs if key in by_hash]


def runs_of(records: Sequence[Record]) -> list[Record]:
    """The records of runs, without timings."""
    return [record for record in records if "recipe_hash" in record]


def step_seconds(study: Study, records: Sequence[Record], scale: str) -> dict[str, float] | None:
    """Seconds of a training step by variant, of the newest timing of these recipes; None if there is none."""
    wanted = recipe_hashes(study, scale)
    timings = [record for record in records if record.get("recipe_hashes") == wanted]
    return timings[-1]["step_seconds"] if timings else None


def recipe_hashes(study: Study, scale: str) -> dict[str, str]:
    """Hash of each variant's recipe at a scale, with the first seed."""
    return {name: recipe_hash(recipe) for (name, at), recipe in study.recipes.items() if at == scale}
