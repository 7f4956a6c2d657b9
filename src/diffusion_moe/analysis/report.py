"""The report: one HTML file for phone and desktop, light and dark, without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from markupsafe import Markup, escape

from .figure_notes import sampling_note, weights_note
from .findings import Findings, Sampling
from .routing_metrics import dead_experts, duplicate_experts, effective_experts, imbalance, ratio, shares
from .style import Panel, for_page

NAMES = {"dit": "DiT", "jit": "JiT"}
_PAGE = Path(__file__).with_name("report.html")


def html_report(
    findings: Findings, sections: Mapping[str, Sequence[Panel]], svgs: Mapping[str, str], files: Sequence[str]
) -> str:
    """The page.

    Args:
        svgs: figure of each panel by its name.
        files: names of the data files next to the report.
    """
    page = Template(_PAGE.read_text(), autoescape=True, trim_blocks=True)
    return page.render(
        findings=findings,
        summary=_summary(findings),
        sections=sections,
        svg_of=lambda panel: Markup(for_page(svgs[panel.name], escape(panel.title))),
        files=files,
        **({} if findings.sampling is None else _numbers(findings, findings.sampling)),
    )


def _summary(findings: Findings) -> str:
    model = findings.model
    blocks = f"{NAMES[model.backbone]} of {model.depth} blocks, width {model.hidden_size}"
    if findings.sampling is None:
        return f"{blocks}; no routers: every feed-forward layer is dense. From {weights_note(findings)}."
    layers = len(findings.sampling.counts.tokens_LSK)
    many = f"{layers} MoE layer{'s' * (layers != 1)} of {model.num_experts} experts, {model.router} routing"
    shared = f", a shared expert ({model.shared})" if model.shared in ("gelu", "swiglu") else ""
    note = sampling_note(findings, findings.sampling)
    return f"{blocks}; {many}{shared}. What the routers did while sampling {note}"


def _numbers(findings: Findings, sampling: Sampling) -> dict[str, Any]:
    """Key values, and the cells of each layer by the heads of their columns."""
    counts, weights = sampling.counts, findings.weights
    assert weights is not None
    share_LE = shares(counts.served_LSKE.sum((1, 2)))
    capacity_L = ratio(counts.served_LSK.sum((1, 2)), counts.tokens_LSK.sum((1, 2)))
    dead, duplicates = dead_experts(share_LE), duplicate_experts(weights.experts_LEE)
    others_EE = ~np.eye(share_LE.shape[1], dtype=bool)
    numbers = {
        "experts a token, on average": f"{ratio(counts.served_LSK.sum(), counts.tokens_LSK.sum()):.3f}",
        **_text_numbers(sampling),
        "busiest expert over mean load, worst layer": f"{imbalance(share_LE).max():.2f}",
        "dead experts (below 1 % of an even load)": f"{len(dead)} of {share_LE.size}",
        "pairs of duplicates (cosine above 0.9)": len(duplicates),
    }
    layers = [
        {
            "MoE layer": layer + 1,
            "experts a token": f"{capacity_L[layer]:.3f}",
            "busiest / mean": f"{imbalance(share_LE)[layer]:.2f}",
            "effective experts": f"{effective_experts(share_LE)[layer]:.2f}",
            "dead": ", ".join(str(e) for at, e in dead if at == layer) or "none",
            "duplicates": ", ".join(f"{a} and {b}" for at, a, b in duplicates if at == layer) or "none",
            "closest pair": f"{np.nanmax(weights.experts_LEE[layer][others_EE], initial=-1):.2f}",
        }
        for layer in range(len(share_LE))
    ]
    return {"numbers": numbers, "layers": layers}


def _text_numbers(sampling: Sampling) -> dict[str, str]:
    """Experts of an image token and of a text token, where both are routed."""
    if not sampling.tokens:
        return {}
    image, text = (ratio(part.served_S.sum(), part.tokens_S.sum()) for part in sampling.tokens.values())
    share = ratio(sampling.tokens["text"].served_S.sum(), sampling.counts.served_LSK.sum())
    return {
        "experts an image token": f"{image:.3f}",
        "experts a text token": f"{text:.3f}",
        "text tokens’ share of all assignments": f"{share:.1%}",
    }
