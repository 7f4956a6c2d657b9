"""The files of a study's page: the text, and the figure beside it."""

from __future__ import annotations

from pathlib import Path

from ..log import Log
from ..run_folder import write_atomically
from .definition import Study
from .page import Results, make_page
from .records import read_records, runs_of


def write_page(study: Study, records: Path, page: Path, log: Log) -> None:
    """Write the page, and its figure as PAGE-curves.png beside it.

    Args:
        study: the study.
        records: file of its records.
        page: the Markdown file.
        log: receives what was written, and the number of records that do not belong to the study.
    """
    known = read_records(records)
    results = Results(study, known)
    others = len(runs_of(known)) - len(results.records)
    if others:
        log(f"{others} records of other recipes are left out")
    figure = None
    if results.records:
        from .figure import loss_curves

        figure = loss_curves(results)
    page.parent.mkdir(parents=True, exist_ok=True)
    name = f"{page.stem}-curves.png"
    if figure is not None:
        write_atomically(page.with_name(name), figure)
    write_atomically(page, make_page(study, known, None if figure is None else name))
    log(f"wrote {page}")
