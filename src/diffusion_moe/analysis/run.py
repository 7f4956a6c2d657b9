"""A report of one run or model folder: gather, plot, write."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..config import EvaluationConfig
from ..log import Log
from ..run_folder import write_atomically
from ..sampling.source import Source
from . import plot_compute, plot_experts, plot_training
from .findings import Findings, gather_findings
from .options import AnalyzeOptions
from .report import html_report
from .style import Panel, figure_style, to_png, to_svg
from .tables import TABLES, tables, to_parquet

TRAINING = {
    "loss": plot_training.training_loss,
    "loss_by_time": plot_training.loss_by_time,
    "loss_levels": plot_training.logged_loss_by_time,
    "balance": plot_training.balance,
}
ROUTING = {
    "Compute": {
        "capacity": plot_compute.capacity_by_time,
        "classes": plot_compute.experts_of_classes,
        "hard_to_easy": plot_compute.hard_to_easy,
        "maps": plot_compute.compute_maps,
    },
    "Experts": {
        "experts": plot_experts.experts_of_classes_and_times,
        "frequency": plot_experts.activation_frequency,
        "places": plot_experts.positions_of_experts,
        "coactivation": plot_experts.together,
        "similarity": plot_experts.similarity,
        "guidance": plot_experts.guidance_effect,
    },
}
PANELS = (*TRAINING, *(name for plots in ROUTING.values() for name in plots))
"""Names of all possible figures."""
REPORT = "report.html"
DATA = "data"
"""Folder of the parquet files, next to the report."""
ALL_FILES = {
    *(f"{name}.{ending}" for name in PANELS for ending in ("png", "svg")),
    *(f"{DATA}/{name}.parquet" for name in TABLES),
}
"""All files that may be next to a report."""


def analyze(source: Source, settings: EvaluationConfig, options: AnalyzeOptions, log: Log) -> Path:
    """Write a report and return its path; raises as `gather_findings` does."""
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


def panels(findings: Findings) -> dict[str, list[Panel]]:
    """The figures by section. A panel without a figure has the reason; panels that no run could show are left out."""
    sampling, sections = findings.sampling, dict[str, list[Panel]]()
    with figure_style():
        if findings.loss:
            sections["Training"] = [plot(findings)._replace(name=name) for name, plot in TRAINING.items()]
        if sampling is not None:
            for section, plots in ROUTING.items():
                sections[section] = [plot(findings, sampling)._replace(name=name) for name, plot in plots.items()]
    for section, some in sections.items():
        sections[section] = [panel for panel in some if panel.figure or panel.caption]
    return {section: some for section, some in sections.items() if some}


def report_files(findings: Findings) -> dict[str, bytes]:
    """Contents of every file by name, the report last. The same findings give the same bytes."""
    sections = panels(findings)
    figures = {panel.name: panel.figure for some in sections.values() for panel in some if panel.figure is not None}
    svgs = {name: to_svg(figure, name) for name, figure in figures.items()}
    about = {"name": findings.name, "origin": findings.origin, "model": dataclasses.asdict(findings.model)}
    about |= {} if findings.sampling is None else {"sampling": findings.sampling.about}
    data = {f"{DATA}/{name}.parquet": to_parquet(columns, about) for name, columns in tables(findings).items()}
    files = {f"{name}.png": to_png(figure) for name, figure in figures.items()}
    files |= {f"{name}.svg": svg.encode() for name, svg in svgs.items()}
    return files | data | {REPORT: html_report(findings, sections, svgs, list(data)).encode()}
