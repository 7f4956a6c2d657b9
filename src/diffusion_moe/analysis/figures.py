"""All figures of a report, in its order."""

from __future__ import annotations

from .findings import Findings
from .plot_compute import capacity_by_time, compute_maps, experts_of_classes, hard_to_easy
from .plot_experts import (
    activation_frequency,
    experts_of_classes_and_times,
    guidance_effect,
    places_of_experts,
    similarity,
    together,
)
from .plot_training import balance, logged_loss_by_time, loss_by_time, training_loss
from .style import Panel, figure_style

TRAINING = (training_loss, loss_by_time, logged_loss_by_time)
ROUTING = {
    "Compute": (capacity_by_time, experts_of_classes, hard_to_easy, compute_maps),
    "Experts": (
        experts_of_classes_and_times,
        activation_frequency,
        places_of_experts,
        together,
        similarity,
        guidance_effect,
    ),
}
PANELS = (
    "loss",
    "loss_by_time",
    "loss_levels",
    "balance",
    "capacity",
    "classes",
    "hard_to_easy",
    "maps",
    "experts",
    "frequency",
    "places",
    "coactivation",
    "similarity",
    "guidance",
)
"""Names of all possible figures."""


def panels(findings: Findings) -> dict[str, list[Panel]]:
    """The figures by section. A panel without a figure has the reason; panels that no run could show are left out."""
    with figure_style():
        sections: dict[str, list[Panel]] = {}
        if findings.loss:
            sections["Training"] = [plot(findings) for plot in TRAINING]
            sections["Training"] += [balance(findings)] if findings.sampling is not None else []
        if findings.sampling is not None:
            for section, plots in ROUTING.items():
                sections[section] = [plot(findings, findings.sampling) for plot in plots]
    for name, some in sections.items():
        sections[name] = [panel for panel in some if panel.figure or panel.caption]
    return {name: some for name, some in sections.items() if some}
