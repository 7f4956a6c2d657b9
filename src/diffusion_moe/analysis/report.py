"""The report: one HTML file for phone and desktop, light and dark, without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from .figure_notes import sampling_note, weights_note
from .findings import Findings, Sampling
from .routing_metrics import dead_experts, duplicate_experts, effective_experts, imbalance, ratio, shares
from .style import Panel, for_page

NAMES = {"dit": "DiT", "jit": "JiT"}
_PAGE = Template(Path(__file__).with_name("report.html").read_text())


def html_report(
    findings: Findings, sections: Mapping[str, Sequence[Panel]], svgs: Mapping[str, str], files: Sequence[str]
) -> str:
    """The page.

    Args:
        svgs: figure of each panel by its name.
        files: names of the data files next to the report.
    """
    names = [name for name in sections if sections[name]]
    anchors = {name: f"section-{name.lower()}" for name in names}
    return _PAGE.substitute(
        title=escape(f"Routing report: {findings.name}"),
        heading=escape(findings.name),
        summary=escape(_summary(findings)),
        notes="\n".join(f'<p class="soft">{escape(note)}</p>' for note in findings.missing),
        links="".join(f'<a href="#{anchors[name]}">{name}</a>' for name in names),
        numbers="" if findings.sampling is None else _numbers(findings, findings.sampling),
        sections="\n".join(_section(name, anchors[name], sections[name], svgs) for name in names),
        data=_data(files),
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


def _numbers(findings: Findings, sampling: Sampling) -> str:
    """Key values, and a table of the layers."""
    counts, weights = sampling.counts, findings.weights
    assert weights is not None
    share_LE = shares(counts.served_LSKE.sum((1, 2)))
    capacity_L = ratio(counts.served_LSK.sum((1, 2)), counts.tokens_LSK.sum((1, 2)))
    dead, duplicates = dead_experts(share_LE), duplicate_experts(weights.experts_LEE)
    glance = {
        "experts a token, on average": f"{ratio(counts.served_LSK.sum(), counts.tokens_LSK.sum()):.3f}",
        **_text_numbers(sampling),
        "busiest expert over mean load, worst layer": f"{imbalance(share_LE).max():.2f}",
        "dead experts (below 1 % of an even load)": f"{len(dead)} of {share_LE.size}",
        "pairs of duplicates (cosine above 0.9)": str(len(duplicates)),
    }
    rows, others_EE = [], ~np.eye(share_LE.shape[1], dtype=bool)
    for layer in range(len(share_LE)):
        cells = [
            str(layer + 1),
            f"{capacity_L[layer]:.3f}",
            f"{imbalance(share_LE)[layer]:.2f}",
            f"{effective_experts(share_LE)[layer]:.2f}",
            _list(str(e) for at, e in dead if at == layer),
            _list(f"{a} and {b}" for at, a, b in duplicates if at == layer),
            f"{np.nanmax(weights.experts_LEE[layer][others_EE], initial=-1):.2f}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ["MoE layer", "experts a token", "busiest / mean", "effective experts"]
    heads += ["dead", "duplicates", "closest pair"]
    return "\n".join(
        [
            '<dl class="numbers">',
            *(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in glance.items()),
            "</dl>",
            '<h2 id="layers">Layers</h2><div class="scroll"><table><thead><tr>',
            *(f'<th scope="col">{head}</th>' for head in heads),
            "</tr></thead><tbody>",
            *rows,
            "</tbody></table></div>",
            f'<p class="soft">Loads are those of the evaluations with a {findings.condition}. Effective experts: exp '
            "of the entropy of the loads. Closest pair: the highest cosine of two experts’ weights.</p>",
        ]
    )


def _text_numbers(sampling: Sampling) -> dict[str, str]:
    """Experts of an image token and of a text token, where both are routed."""
    if sampling.text is None:
        return {}
    counts, text = sampling.counts, sampling.text
    served, tokens = text.served_S.sum(), text.tokens_S.sum()
    image = ratio(counts.served_LSK.sum() - served, counts.tokens_LSK.sum() - tokens)
    return {
        "experts an image token": f"{image:.3f}",
        "experts a text token": f"{ratio(served, tokens):.3f}",
        "text tokens’ share of all assignments": f"{ratio(served, counts.served_LSK.sum()):.1%}",
    }


def _list(items) -> str:  # type: ignore[no-untyped-def]
    return ", ".join(items) or "none"


def _section(name: str, anchor: str, some: Sequence[Panel], svgs: Mapping[str, str]) -> str:
    parts = []
    for panel in some:
        title, caption = escape(panel.title), escape(panel.caption)
        if panel.figure is None:
            parts.append(f'<div class="absent" id="{panel.name}"><h3>{title}</h3>{caption}</div>')
        else:
            svg = for_page(svgs[panel.name], title)
            parts.append(
                f'<figure id="{panel.name}"><h3>{title}</h3>\n{svg}<figcaption>{caption}</figcaption></figure>'
            )
    return f'<section><h2 id="{anchor}">{name}</h2>\n<div class="figures">\n' + "\n".join(parts) + "\n</div></section>"


def _data(files: Sequence[str]) -> str:
    if not files:
        return ""
    listed = ", ".join(f"<code>{escape(file)}</code>" for file in files)
    return (
        '<section><h2 id="data">Data</h2>\n<p class="soft">Next to this file are the figures as PNG and SVG and the '
        f"numbers behind them: {listed}. docs/analysis.md explains their columns.</p></section>"
    )
