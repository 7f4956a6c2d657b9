"""All figures of a report, in its order."""

from __future__ import annotations

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
from .record import Findings
from .style import Panel, drawing

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
    *("loss", "loss_by_time", "loss_levels", "balance", "capacity", "classes", "hard_to_easy", "maps"),
    *("experts", "frequency", "places", "coactivation", "similarity", "guidance"),
)
"""Names of all figures that there may be."""


def panels(findings: Findings) -> dict[str, list[Panel]]:
    """The figures by section. A panel without a figure says why; what no run could show is left out."""
    with drawing():
        sections: dict[str, list[Panel]] = {}
        if findings.loss:
            sections["Training"] = [draw(findings) for draw in TRAINING]
            sections["Training"] += [balance(findings)] if findings.sampling is not None else []
        if findings.sampling is not None:
            for section, draws in ROUTING.items():
                sections[section] = [draw(findings, findings.sampling) for draw in draws]
    return {name: found for name, some in sections.items() if (found := [p for p in some if p.figure or p.caption])}
