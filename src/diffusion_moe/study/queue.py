"""The queue of a study's runs, which may be stopped at any moment and shared by several processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..log import Log
from ..run_folder import RunFolder, lock_file
from ..training.loop import train
from .definition import Study, StudyRun
from .measure import measure_run, statistics_for
from .records import append_record, current, read_records, step_seconds
from .timing import time_scale

CLASSIFIER_SECONDS = 3600.0
"""Longest wait for the statistics that another process makes."""


def run_study(study: Study, records: Path, log: Log, after_run: Callable[[], None]) -> int | None:
    """Train and measure all runs that have no record yet, then time the steps of all variants.

    An unfinished run resumes from its checkpoint. A finished one keeps its model and loses its checkpoints. Several
    processes may work on one study: each takes the next run that no other one has.

    Args:
        study: the study.
        records: the file to which a line a run is added.
        log: receives lines of progress.
        after_run: called after each new record.

    Returns:
        The signal that stopped the queue; None if it is done, or other processes train the runs that are left.

    Raises:
        ValueError: a recipe cannot be trained.
    """
    study.check_equal()
    output = study.fields.output
    output.mkdir(parents=True, exist_ok=True)
    with RunFolder(output).reserved(log, wait_seconds=CLASSIFIER_SECONDS):
        for recipe in study.recipes.values():
            statistics_for(study, recipe, log)
    for number, run in enumerate(study.runs(), start=1):
        with lock_file(output / "locks" / run.name, wait=False) as free:
            if not free or _is_recorded(study, run, records):
                continue
            log(f"run {number} of {len(list(study.runs()))}: {run.variant}, scale {run.scale}, seed {run.seed}")
            folder = output / "runs" / run.name
            outcome = train(run.recipe, folder, log=log)
            if outcome.interrupted_by is not None:
                return outcome.interrupted_by
            record = measure_run(study, run, folder, log)
            append_record(records, record)
            shutil.rmtree(RunFolder(folder).checkpoints)
            log(f"held-out loss {record['val_loss']:.4f} after {record['seconds']:.0f} s")
        after_run()
    left = len(list(study.runs())) - len(current(study, read_records(records)))
    if left:
        log(f"{left} runs are trained by other processes; when one has ended, the same command goes on")
        return None
    for scale in study.scales:
        if step_seconds(study, read_records(records), scale) is None:
            log(f"timing the steps of all variants in turns, scale {scale}")
            append_record(records, time_scale(study, scale))
            after_run()
    return None


def _is_recorded(study: Study, run: StudyRun, records: Path) -> bool:
    return run.hash in {record["recipe_hash"] for record in current(study, read_records(records))}
