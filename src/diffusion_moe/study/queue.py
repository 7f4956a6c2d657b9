"""The queue of a study's runs, which may be stopped at any moment and goes on when it is started again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..log import Log
from ..run_folder import RunFolder
from ..training.loop import train
from .definition import Study
from .measure import measure_run, statistics_for
from .records import append_record, current, read_records


def run_study(study: Study, records: Path, log: Log, after_run: Callable[[], None]) -> int | None:
    """Train and measure all runs that have no record yet.

    An unfinished run resumes from its checkpoint. A finished one keeps its model and loses its checkpoints.

    Args:
        study: the study.
        records: the file to which a line a run is added.
        log: receives lines of progress.
        after_run: called after each new record.

    Returns:
        The signal that stopped the queue; None if all runs are done.

    Raises:
        ValueError: a recipe cannot be trained, or another process works on this study.
    """
    study.check_equal()
    output = study.fields.output
    output.mkdir(parents=True, exist_ok=True)
    runs = list(study.runs())
    with RunFolder(output).reserved(log, wait_seconds=5.0):
        for recipe in study.recipes.values():
            statistics_for(study, recipe, log)
        for number, run in enumerate(runs, start=1):
            known = {record["recipe_hash"] for record in current(study, read_records(records))}
            if run.hash in known:
                continue
            log(f"run {number} of {len(runs)}: {run.variant}, scale {run.scale}, seed {run.seed}")
            folder = output / "runs" / run.name
            outcome = train(run.recipe, folder, log=log)
            if outcome.interrupted_by is not None:
                return outcome.interrupted_by
            record = measure_run(study, run, folder, log)
            append_record(records, record)
            shutil.rmtree(RunFolder(folder).checkpoints)
            log(f"held-out loss {record['val_loss']:.4f} after {record['seconds']:.0f} s")
            after_run()
    return None
