"""The verb `study`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..study.options import StudyOptions
from .command_line import CommandLine
from .output import log
from .parsing import parse


def study(arguments: Sequence[str]) -> int:
    """Train variants of a recipe on the same seeds and write a page of verdicts: paired differences with intervals.

    The same command resumes a study that was stopped. The file is explained in docs/compare.md of the repository.
    """
    line = CommandLine("study", study.__doc__ or "", (StudyOptions,), first=("file", "a YAML file of a study"))
    given = parse(line, arguments)
    options = given.options(StudyOptions)
    from ..study.definition import read_study
    from ..study.records import read_records

    file = Path(given.first)
    if not file.is_file():
        raise ValueError(f"there is no file {file}; give the YAML file of a study")
    made = read_study(file)
    records = options.records or made.fields.output / "records.jsonl"
    if options.plan:
        from ..study.plan import print_plan

        print_plan(made, read_records(records), options.gflops, log)
        made.check_equal()
        return 0
    from ..study.write import write_page

    if options.page is not None:
        write_page(made, records, options.page, log)
        return 0
    from ..study.queue import run_study

    page = made.fields.output / "study.md"
    stopped = run_study(made, records, log, lambda: write_page(made, records, page, lambda line: None))
    if stopped is not None:
        return 128 + stopped
    write_page(made, records, page, log)
    return 0
