"""All figures of a report, in its order."""

from __future__ import annotations

from .findings import Findings
from .plot_compute import capacity_by_time, compute_maps, experts_of_classes, hard_to_easy
from .plot_experts import (
    activation_frequency,
    experts_of_classes_and_times,
    guidance_effect,
    positions_of_experts,
    similarity,
    together,
)
from .plot_training import balance, logged_loss_by_time, loss_by_time, training_loss
from .style import Panel, figure_style

TRAINING = {"loss": training_loss, "loss_by_time": loss_by_time, "loss_levels": logged_loss_by_time}
ROUTING = {
    "Compute": {
        "capacity": capacity_by_time,
        "classes": experts_of_classes,
        "hard_to_easy": hard_to_easy,
        "maps": compute_maps,
    },
    "Experts": {
        "experts": experts_of_classes_and_times,
        "frequency": activation_frequency,
        "places": positions_of_experts,
        "coactivation": together,
        "similarity": similarity,
        "guidance": guidance_effect,
    },
}
PANELS = (*TRAINING, "balance", *(name for plots in ROUTING.values() for name in plots))
"""Names of all possible figures."""


def panels(findings: Findings) -> dict[str, list[Panel]]:
    """The figures by section. A panel without a figure has the reason; panels that no run could show are left out."""
    sampling, sections = findings.sampling, dict[str, list[Panel]]()
    with figure_style():
        if findings.loss:
            sections["Training"] = [plot(findings)._replace(name=name) for name, plot in TRAINING.items()]
            sections["Training"] += [balance(findings)._replace(name="balance")] if sampling is not None else []
        if sampling is not None:
            for section, plots in ROUTING.items():
                sections[section] = [plot(findings, sampling)._replace(name=name) for name, plot in plots.items()]
    for section, some in sections.items():
        sections[section] = [panel for panel in some if panel.figure or panel.caption]
    return {section: some for section, some in sections.items() if some}
