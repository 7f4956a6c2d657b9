"""A report of one run or model folder: gather, plot, write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..config import EvaluationConfig
from ..log import Log
from ..run_folder import write_atomically
from ..sampling.source import Source
from .figures import PANELS, panels
from .findings import Findings, gather_findings
from .options import AnalyzeOptions
from .report import html_report
from .style import to_png, to_svg
from .tables import TABLES, tables, to_parquet

REPORT = "report.html"
DATA = "data"
"""Folder of the parquet files, next to the report."""
ALL_FILES = {f"{name}.{ending}" for name in PANELS for ending in ("png", "svg")} | {
    f"{DATA}/{t}.parquet" for t in TABLES
}
"""All files that may be next to a report."""


def analyze(source: Source, settings: EvaluationConfig, options: AnalyzeOptions, log: Log) -> Path:
    """Write a report and return its path.

    Raises:
        ValueError: see `gather_findings`; or the output is a file.
    """
    folder = options.output or source.path / "figures"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is {folder}, which is a file; give a folder")
    findings = gather_findings(source, settings, options.compared(), log, options)
    files = report_files(findings)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
    # Files of an earlier report would be mistaken for a part of this one.
    for name in ALL_FILES - files.keys():
        (folder / name).unlink(missing_ok=True)
    return folder / REPORT


def report_files(findings: Findings) -> dict[str, bytes]:
    """Contents of every file by name, the report last. The same findings give the same bytes."""
    sections = panels(findings)
    figures = {panel.name: panel.figure for some in sections.values() for panel in some if panel.figure is not None}
    svgs = {name: to_svg(figure, name) for name, figure in figures.items()}
    about = describe(findings)
    data = {f"{DATA}/{name}.parquet": to_parquet(columns, about) for name, columns in tables(findings).items()}
    files = {f"{name}.png": to_png(figure) for name, figure in figures.items()}
    files |= {f"{name}.svg": svg.encode() for name, svg in svgs.items()}
    return files | data | {REPORT: html_report(findings, sections, svgs, list(data)).encode()}


def describe(findings: Findings) -> dict[str, Any]:
    """Metadata of the data files."""
    about = {"name": findings.name, "origin": findings.origin, "model": dataclasses.asdict(findings.model)}
    return about | ({} if findings.sampling is None else {"sampling": findings.sampling.about})
